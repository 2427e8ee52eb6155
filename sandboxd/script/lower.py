"""Steps of a plan -> records of a script: one function a kind of step, nothing decided here.

Each function gets the writer and the step and emits the system calls that carry it out; the tag of
every record is the step's number, so that a failing record names its step. Only calls that both
architectures have are used, so this file is the same for both.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Any

from sandboxd import plan
from sandboxd.messages import MAPS
from sandboxd.script.record import Condition, Label, Operand
from sandboxd.script.writer import (
    AT_FDCWD,
    FIRST_DESCRIPTOR,
    FIRST_SLOT,
    O_CLOEXEC,
    O_CREAT,
    O_DIRECTORY,
    O_EXCL,
    O_PATH,
    O_WRONLY,
    PROCESS,
    RESOLVE_NO_MAGICLINKS,
    RESOLVE_NO_SYMLINKS,
    RULESET,
    SOCKET,
    SYSCTLS,
    TREE,
    Writer,
)

AT_EMPTY_PATH = 0x1000
AT_RECURSIVE = 0x8000
AT_SYMLINK_NOFOLLOW = 0x100
MS_BIND, MS_REC, MS_PRIVATE = 0x1000, 0x4000, 0x40000
MS_NOSUID, MS_NODEV, MS_NOEXEC = 2, 4, 8
MNT_DETACH = 2
OPEN_TREE_CLONE = 1
MOVE_MOUNT_F_EMPTY_PATH, MOVE_MOUNT_T_EMPTY_PATH = 4, 0x40
SIGCHLD, SIG_BLOCK_ALL = 17, (1 << 64) - 1
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_NO_NEW_PRIVS = 1, 4, 38
PR_CAPBSET_DROP, PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL = 24, 47, 4
LAST_CAPABILITY = 40  # CAP_CHECKPOINT_RESTORE; newer kernels have no more (capabilities(7))
CAPABILITY_VERSION_3 = 0x20080522
SECCOMP_SET_MODE_FILTER = 1
LANDLOCK_RULE_PATH_BENEATH = 1
SIOCSIFFLAGS, IFF_UP_RUNNING = 0x8914, 0x41
AF_INET, AF_UNIX, SOCK_DGRAM, SOCK_CLOEXEC = 2, 1, 2, 0o2000000
MSG_WAITALL, MSG_NOSIGNAL = 0x100, 0x4000
POLLIN, POLLRDHUP = 0x1, 0x2000
SIGKILL, SIG_SETMASK, STDOUT, STDERR = 9, 2, 1, 2
RLIM_INFINITY = (1 << 64) - 1
RESOURCES = {
    "CPU": 0, "FSIZE": 1, "DATA": 2, "STACK": 3, "CORE": 4, "NPROC": 6, "NOFILE": 7,
    "MEMLOCK": 8, "AS": 9, "SIGPENDING": 11, "MSGQUEUE": 12, "NICE": 13, "RTPRIO": 14,
}  # fmt: skip


def lower(writer: Writer, steps: Iterable[plan.Step]) -> None:
    """Emit the records of all steps; tags are the steps' numbers."""
    for number, step in enumerate(steps):
        writer.asm.tag = number
        _KINDS[type(step)](writer, step)
    writer.asm.tag = -1


def _private_propagation(w: Writer, _: plan.PrivatePropagation) -> None:
    w.call("mount", 0, w.path("/"), 0, MS_REC | MS_PRIVATE, 0)


def _open_tree(w: Writer, step: plan.OpenTree) -> None:
    flags = OPEN_TREE_CLONE | O_CLOEXEC | (AT_RECURSIVE if step.recursive else 0)
    keep, directory, path = w.asm.label(), AT_FDCWD, w.path(step.source)
    if step.strict:
        how = w.asm.words((O_PATH | O_CLOEXEC, 0, RESOLVE_NO_SYMLINKS | RESOLVE_NO_MAGICLINKS))
        tree = w.asm.label()
        w.call("openat2", AT_FDCWD, path, how, 24, store=tree.field("a0"), ignore=step.optional)
        w.asm.place(tree)
        directory, path, flags = 0, w.path(""), flags | AT_EMPTY_PATH
    w.call("open_tree", directory, path, flags, store=keep.field("a0"), ignore=step.optional)
    w.asm.place(keep)
    w.call("dup3", 0, FIRST_SLOT + step.slot, O_CLOEXEC, ignore=step.optional)
    w.close_strays()


def _attach(w: Writer, step: plan.Attach) -> None:
    slot, empty = FIRST_SLOT + step.slot, w.path("")
    flags = AT_EMPTY_PATH | (AT_RECURSIVE if step.recursive else 0)
    attributes = w.attributes(step.attributes)
    w.call("mount_setattr", slot, empty, flags, attributes, 32, ignore=step.optional)
    if step.root:
        _move_inside(w, slot, step.root, step.target, optional=step.optional)
        return
    w.call(
        "move_mount", slot, empty, AT_FDCWD, w.path(step.target), MOVE_MOUNT_F_EMPTY_PATH,
        ignore=step.optional,
    )  # fmt: skip


def _move_inside(w: Writer, tree: int, root: str, target: str, *, optional: bool = False) -> None:
    """Attach a detached mount to what a path is within a root."""
    flags, empty, move = (
        MOVE_MOUNT_F_EMPTY_PATH | MOVE_MOUNT_T_EMPTY_PATH,
        w.path(""),
        w.asm.label(),
    )
    w.enter(root, target, move.field("a2"))
    w.asm.place(move)
    w.call("move_mount", tree, empty, 0, empty, flags, ignore=optional)
    w.close_strays()


def _mount_point(w: Writer, step: plan.MountPoint) -> None:
    *above, last = step.path.strip("/").split("/")
    for depth, name in enumerate((*above, last)):
        make = w.asm.label()
        w.enter(step.root, "/".join(above[:depth]), make.field("a0"))
        w.asm.place(make)
        if name is not last or step.directory:
            w.call("mkdirat", 0, w.path(name), 0o755, ignore=True)
        else:
            flags = O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC
            w.call("openat", 0, w.path(name), flags, 0o644, ignore=True)
        w.close_strays()


def _attach_received(w: Writer, step: plan.AttachReceived) -> None:
    w.call(
        "move_mount", FIRST_DESCRIPTOR + step.descriptor, w.path(""), AT_FDCWD,
        w.path(step.target), MOVE_MOUNT_F_EMPTY_PATH,
    )  # fmt: skip


def _tmpfs(w: Writer, step: plan.Tmpfs) -> None:
    flags = 0
    for attribute, flag in (
        (plan.Attributes.NOSUID, MS_NOSUID),
        (plan.Attributes.NODEV, MS_NODEV),
        (plan.Attributes.NOEXEC, MS_NOEXEC),
    ):
        flags |= flag if attribute in step.attributes else 0
    options = [f"mode={step.mode:o}"]
    if step.size is not None:
        options.append(f"size={step.size}")
    if step.inodes is not None:
        options.append(f"nr_inodes={step.inodes}")
    name, data = w.path("tmpfs"), w.path(",".join(options))
    w.call("mount", name, w.path(step.target), name, flags, data)


def _make_dir(w: Writer, step: plan.MakeDir) -> None:
    # The mode's sticky and group bits pass the umask, which boot set to 0 (umask(2)).
    w.call("mkdirat", AT_FDCWD, w.path(step.path), step.mode, ignore=not step.for_job)
    if step.for_job:
        own = w.call("fchownat", AT_FDCWD, w.path(step.path), 0, 0, 0)
        w.mark("uid", own.field("a2"))
        w.mark("uid", own.field("a3"))


def _make_file(w: Writer, step: plan.MakeFile) -> None:
    if step.anew:
        w.call("unlinkat", AT_FDCWD, w.path(step.path), 0, ignore=True)
    w.write_file(step.path, step.content, flags=O_WRONLY | O_CREAT, mode=step.mode)


def _symlink(w: Writer, step: plan.Symlink) -> None:
    w.call("symlinkat", w.path(step.to), AT_FDCWD, w.path(step.path))


def _proc(w: Writer, step: plan.Proc) -> None:
    name = w.path("proc")
    data: Operand = w.path("subset=pid") if step.subset else 0
    w.call("mount", name, w.path(step.target), name, MS_NOSUID | MS_NODEV | MS_NOEXEC, data)


def _bind(w: Writer, step: plan.Bind) -> None:
    if step.root:
        _bind_inside(w, step)
        return
    flags = MS_BIND | (MS_REC if step.recursive else 0)
    target = w.path(step.target)
    w.call("mount", w.path(step.source), target, 0, flags, 0)
    _set_attributes(w, target, step.attributes, recursive=step.recursive)


def _bind_inside(w: Writer, step: plan.Bind) -> None:
    recursive = AT_RECURSIVE if step.recursive else 0
    keep = w.asm.label()
    flags = OPEN_TREE_CLONE | O_CLOEXEC | recursive
    w.call("open_tree", AT_FDCWD, w.path(step.source), flags, store=keep.field("a0"))
    w.asm.place(keep)
    w.call("dup3", 0, TREE, O_CLOEXEC)
    if step.attributes:
        flags, attributes = AT_EMPTY_PATH | recursive, w.attributes(step.attributes)
        w.call("mount_setattr", TREE, w.path(""), flags, attributes, 32)
    _move_inside(w, TREE, step.root, step.target)
    w.call("close", TREE)


def _set_attributes(w: Writer, path: Label, attributes: int, *, recursive: bool) -> None:
    if attributes:
        flags = AT_RECURSIVE if recursive else 0
        w.call("mount_setattr", AT_FDCWD, path, flags, w.attributes(attributes), 32)


def _restrict(w: Writer, step: plan.Restrict) -> None:
    _set_attributes(w, w.path(step.path), step.attributes, recursive=step.recursive)


def _overlay(w: Writer, step: plan.Overlay) -> None:
    name = w.path("overlay")
    lowers = ":".join(lower.replace("\\", "\\\\").replace(":", "\\:") for lower in step.lowers)
    data = f"lowerdir={lowers},userxattr"
    if step.upper:
        data += f",upperdir={step.upper},workdir={step.work}"
    flags = MS_NOSUID | MS_NODEV
    w.call("mount", name, w.path(step.target), name, flags, w.path(data))


def _pivot(w: Writer, step: plan.Pivot) -> None:
    # pivot_root(".", ".") stacks the old root on the new one; see NOTES of pivot_root(2).
    here = w.path(".")
    w.call("chdir", w.path(step.root))
    w.call("pivot_root", here, here)
    w.call("umount2", here, MNT_DETACH)
    w.call("chdir", w.path("/"))


def _write_file(w: Writer, step: plan.WriteFile) -> None:
    w.write_file(step.path, step.content, optional=step.optional)


def _loopback_up(w: Writer, _: plan.LoopbackUp) -> None:
    # ioctl(SIOCSIFFLAGS) with struct ifreq: 16 bytes of name, then the flags (netdevice(7)).
    request = w.asm.data(struct.pack("<16sh22x", b"lo", IFF_UP_RUNNING))
    ioctl = w.asm.label()
    w.call("socket", AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0, store=ioctl.field("a0"))
    w.asm.place(ioctl)
    w.call("ioctl", 0, SIOCSIFFLAGS, request)
    w.close_strays()


def _drop_bounding(w: Writer, _: plan.DropBounding) -> None:
    for capability in range(LAST_CAPABILITY + 1):
        w.call("prctl", PR_CAPBSET_DROP, capability, 0, 0, 0, ignore=True)


def _no_new_privileges(w: Writer, _: plan.NoNewPrivileges) -> None:
    w.call("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)


def _join_network(w: Writer, step: plan.JoinNetwork) -> None:
    w.call("setns", FIRST_DESCRIPTOR + step.descriptor, plan.NAMESPACES["net"])


def _new_time_namespace(w: Writer, step: plan.NewTimeNamespace) -> None:
    w.call("unshare", plan.NAMESPACES["time"])
    offsets = f"monotonic {step.monotonic} 0\nboottime {step.boottime} 0\n"
    w.write_file("/proc/self/timens_offsets", offsets.encode())


def _new_cgroup_namespace(w: Writer, _: plan.NewCgroupNamespace) -> None:
    w.call("unshare", plan.NAMESPACES["cgroup"])


def _hostname(w: Writer, step: plan.Hostname) -> None:
    name = step.name.encode()
    w.call("sethostname", w.asm.data(name), len(name))


def _new_session(w: Writer, _: plan.NewSession) -> None:
    w.call("setsid")


def _set_limit(w: Writer, step: plan.SetLimit) -> None:
    soft = RLIM_INFINITY if step.soft is None else step.soft
    hard = RLIM_INFINITY if step.hard is None else step.hard
    limits = w.asm.words((soft, hard))
    # Raising a hard limit needs a privilege nobody here has; "as far as we may" is no failure.
    w.call("prlimit64", 0, RESOURCES[step.resource], limits, 0, ignore=step.hard is None)


def _keep_proc(w: Writer, _: plan.KeepProc) -> None:
    flags = O_PATH | O_DIRECTORY[w.arch] | O_CLOEXEC
    for name, number in (("/proc/sys/user", SYSCTLS), ("/proc/self/", PROCESS)):
        keep = w.asm.label()
        w.call("openat", AT_FDCWD, w.path(name), flags, 0, store=keep.field("a0"))
        w.asm.place(keep)
        w.call("dup3", 0, number, O_CLOEXEC)


def _become_user(w: Writer, step: plan.BecomeUser) -> None:
    w.call("setgroups", 0, 0, ignore=step.uid is not None)
    for name, wanted in (("setresgid", step.gid), ("setresuid", step.uid)):
        value = 0 if wanted is None else wanted
        record = w.call(name, value, value, value)
        if wanted is None:
            for argument in ("a0", "a1", "a2"):
                w.mark("uid", record.field(argument))


def _leaf_user_namespace(w: Writer, step: plan.LeafUserNamespace) -> None:
    # The maps are the writer's own, so it must be dumpable for a moment (see launcher order trap).
    w.call("prctl", PR_SET_DUMPABLE, 1, 0, 0, 0)
    w.call("unshare", plan.NAMESPACES["user"])
    w.write_file("setgroups", b"deny", directory=PROCESS)
    for name, inside in (("uid_map", step.uid), ("gid_map", step.gid)):
        outer = b"%8d" % (step.outer or 0)
        row = w.asm.data(b"%8d" % inside + outer + b" 1\n")
        if step.outer is None:
            w.mark("digits", row + 8)
        w.write_file(name, row, 8 + 8 + 3, directory=PROCESS)
    for name, most in step.quotas:
        w.write_file(name, b"%d" % most, directory=SYSCTLS)
    w.call("close_range", SYSCTLS, PROCESS, 0)
    for capability in range(LAST_CAPABILITY + 1):
        w.call("prctl", PR_CAPBSET_DROP, capability, 0, 0, 0, ignore=True)


def _drop_capabilities(w: Writer, _: plan.DropCapabilities) -> None:
    header = w.asm.data(struct.pack("<Ii", CAPABILITY_VERSION_3, 0))
    w.call("prctl", PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0)
    w.call("capset", header, w.asm.data(bytes(24)))


def _hide(w: Writer, _: plan.Hide) -> None:
    # Both are reset by every change of credentials, so they come after the last one (prctl(2)).
    w.call("prctl", PR_SET_DUMPABLE, 0, 0, 0, 0)
    w.call("prctl", PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0)


def _landlock(w: Writer, step: plan.Landlock) -> None:
    w.close_strays()
    # struct landlock_ruleset_attr: handled_access_fs, handled_access_net, scoped (landlock(7)).
    size = 24 if step.abi >= 6 else 16 if step.abi >= 4 else 8
    ruleset = w.asm.words((step.handled, 0, step.scoped))
    w.call("landlock_create_ruleset", ruleset, size, 0)
    for path, access in step.rules:
        # struct landlock_path_beneath_attr is packed: u64 allowed_access, s32 parent_fd.
        rule = w.asm.words((access, 0))
        flags = O_PATH | O_CLOEXEC
        w.call("openat", AT_FDCWD, w.path(path), flags, 0, store=rule + 8)
        w.call("landlock_add_rule", RULESET, LANDLOCK_RULE_PATH_BENEATH, rule, 0)
    w.close_strays(RULESET + 1)


def _filter(w: Writer, step: plan.Filter) -> None:
    program = w.asm.words((len(step.program) // 8, w.asm.data(step.program)))
    w.call("seccomp", SECCOMP_SET_MODE_FILTER, 0, program)


def _user_namespace(w: Writer, step: plan.UserNamespace) -> None:
    if step.joined:
        # Who owns a user namespace may enter it from its parent (user_namespaces(7)).
        w.call("setns", STDOUT, plan.NAMESPACES["user"])
        w.call("dup3", STDERR, STDOUT, 0)
    else:
        w.call("unshare", plan.NAMESPACES["user"])
    if step.ids.writer == "self" and not step.joined:
        w.write_file("/proc/self/setgroups", b"deny")
        for name, rows in (("uid_map", step.ids.uids), ("gid_map", step.ids.gids)):
            text = "".join(f"{inside} {outside} {count}\n" for inside, outside, count in rows)
            w.write_file(f"/proc/self/{name}", text.encode())
    # Before there is a second process: the supervisor moves this one into a cgroup, perhaps.
    w.call("sendto", SOCKET, w.asm.data(MAPS), len(MAPS), MSG_NOSIGNAL, 0, 0)
    w.call("recvfrom", SOCKET, w.asm.data(bytes(8)), 8, 0, 0, 0)
    if step.ids.writer != "self":
        w.call("setgroups", 0, 0)
    w.call("setresgid", 0, 0, 0)
    w.call("setresuid", 0, 0, 0)
    w.call("prctl", PR_SET_DUMPABLE, 1, 0, 0, 0)
    w.close_strays()


def _namespaces(w: Writer, step: plan.Namespaces) -> None:
    """The child goes on as PID 1; the parent only waits, to be reaped when it ends."""
    child = w.asm.label()
    w.call("clone", step.flags | SIGCHLD, 0, 0, 0, 0, when=Condition.ZERO, target=child)
    # Not held here, so that its end is the zygote's end.
    w.call("close", SOCKET)
    w.call("wait4", -1, 0, 0, 0)
    w.call("exit_group", 0)
    w.asm.place(child)
    w.call("prctl", PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0)


_KINDS: Mapping[type[plan.Step], Callable[[Writer, Any], None]] = MappingProxyType(
    {
        plan.UserNamespace: _user_namespace,
        plan.Namespaces: _namespaces,
        plan.PrivatePropagation: _private_propagation,
        plan.OpenTree: _open_tree,
        plan.Attach: _attach,
        plan.MountPoint: _mount_point,
        plan.AttachReceived: _attach_received,
        plan.Tmpfs: _tmpfs,
        plan.MakeDir: _make_dir,
        plan.MakeFile: _make_file,
        plan.Symlink: _symlink,
        plan.Proc: _proc,
        plan.Bind: _bind,
        plan.Restrict: _restrict,
        plan.Overlay: _overlay,
        plan.Pivot: _pivot,
        plan.WriteFile: _write_file,
        plan.LoopbackUp: _loopback_up,
        plan.DropBounding: _drop_bounding,
        plan.NoNewPrivileges: _no_new_privileges,
        plan.JoinNetwork: _join_network,
        plan.NewTimeNamespace: _new_time_namespace,
        plan.NewCgroupNamespace: _new_cgroup_namespace,
        plan.Hostname: _hostname,
        plan.NewSession: _new_session,
        plan.SetLimit: _set_limit,
        plan.KeepProc: _keep_proc,
        plan.BecomeUser: _become_user,
        plan.LeafUserNamespace: _leaf_user_namespace,
        plan.DropCapabilities: _drop_capabilities,
        plan.Hide: _hide,
        plan.Landlock: _landlock,
        plan.Filter: _filter,
    }
)
