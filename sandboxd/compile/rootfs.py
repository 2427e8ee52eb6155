"""The file system a job sees: a template built once per tenant, and what each sandbox adds.

Two shapes. A read-only root of the host's /usr is shared: the template *is* the root, and a
sandbox mounts its private /tmp, /box, /dev/shm and /proc over a copy of the mount tree. Any other
root (a directory, or a writable one) is put together per sandbox from the template's pieces, with
an overlay whose upper layer lies on the sandbox's own tmpfs, and becomes / by pivot_root(2).

All that a sandbox may write lies on one tmpfs, so limits.disk and limits.inodes hold for the sum.
"""

from __future__ import annotations

from dataclasses import dataclass

from sandboxd import plan
from sandboxd.errors import HostError
from sandboxd.host import Host
from sandboxd.plan import READ_ONLY, SAFE, Attributes, Step
from sandboxd.policy import Mount, Policy

NEW = "/tmp"
"""Where the template is put together: hidden by then is only the host's /tmp, whose mounts were
taken before. In a sandbox the private tmpfs lies there until the end."""
WORK = "/box"
LOWER = "/lower"
EMPTY = "/mnt"
PRIVATE = (WORK, "/tmp", "/dev/shm")
"""Places of a sandbox's own, which hide what the template has there."""
SHELF = "/.mounts"
"""Where binds below a private place wait in the template, by number, for each sandbox."""
STORE = f"{WORK}/builds"
"""Where the template has the store of builds: below what each sandbox hides at once."""
NOTHING = f"{SHELF}/nothing"
"""An empty directory, where the template has an image's own EMPTY."""
FILES = "files"
MERGED = ("bin", "sbin", "lib", "lib64", "lib32", "libx32")
DIRS = ("usr", "etc", "dev", "dev/shm", "proc", "tmp", "box", "run", "var", "home", "root", "mnt")
LINKS = (
    ("fd", "/proc/self/fd"), ("stdin", "/proc/self/fd/0"), ("stdout", "/proc/self/fd/1"),
    ("stderr", "/proc/self/fd/2"), ("core", "/proc/kcore"),
)  # fmt: skip
# What moby's default profile masks and sets read-only (oci/defaults.go), as far as /proc goes.
MASKED = ("acpi", "asound", "kcore", "keys", "key-users", "latency_stats", "timer_list",
          "timer_stats", "sched_debug", "scsi", "interrupts", "kmsg", "kallsyms", "kpagecount",
          "kpageflags", "kpagecgroup", "vmallocinfo", "slabinfo", "zoneinfo", "pagetypeinfo",
          "config.gz", "bus", "fs", "irq", "sysrq-trigger", "tty", "driver")  # fmt: skip
DIRECTORIES_OF_PROC = frozenset({"acpi", "asound", "scsi", "bus", "fs", "irq", "tty", "driver"})


@dataclass(frozen=True, slots=True)
class _Piece:
    """A host path that is shown in the root."""

    source: str
    target: str
    attributes: Attributes
    directory: bool
    why: str
    optional: bool = False
    recursive: bool = True
    layered: bool = False
    """Shown through the overlay, where there is one."""


def of_host(policy: Policy) -> bool:
    """Whether the root is made of the host's own directories."""
    return policy.root.source == "host" and not policy.root.image


def is_shared(policy: Policy, host: Host) -> bool:
    """Whether the template itself serves as every job's root.

    The layers of an image can be put together in the template as well, by one overlay for all. But
    then nothing can be made in it to mount on, so mounts outside of the private places want a root
    for each sandbox.
    """
    if policy.root.writable:
        return False
    if of_host(policy):
        return True
    on_top = any(not _is_private(mount.target) for mount in policy.mounts)
    wanted = policy.root.driver in ("auto", "kernel")
    return bool(policy.root.image) and not on_top and wanted and host.overlay


def driver(policy: Policy, host: Host) -> str:
    """How the root is layered: "shared", "kernel", "fuse" or "tmpfs"; HostError if impossible."""
    if is_shared(policy, host):
        return "shared"
    how = _layered_by(policy, host)
    if how == "tmpfs" and len(lowers(policy, host)) > 1:
        raise HostError("overlay", f"{policy.origin('root.image')}: its layers need an overlay: "
                        + host.fault_notes.get("overlay", "the policy wants none"),
                        hint="install fuse-overlayfs, or flatten the image")  # fmt: skip
    return how


def _layered_by(policy: Policy, host: Host) -> str:
    wanted = policy.root.driver
    where = policy.origin("root.driver")
    if wanted == "kernel" and not host.overlay:
        raise HostError("overlay", f"{where}: kernel overlayfs does not work here: "
                        + host.fault_notes.get("overlay", "not probed"),
                        hint='use driver = "auto"')  # fmt: skip
    if wanted == "fuse" and not host.fuse_overlayfs:
        raise HostError("fuse", f"{where}: fuse-overlayfs does not work here: "
                        + host.fault_notes.get("fuse_overlayfs", "not probed"),
                        hint="install fuse-overlayfs and make /dev/fuse readable")  # fmt: skip
    if wanted != "auto":
        return wanted
    return "kernel" if host.overlay else "fuse" if host.fuse_overlayfs else "tmpfs"


def lowers(policy: Policy, host: Host) -> tuple[str, ...]:
    """The directories of the host that a layered root overlays, the topmost first."""
    if policy.root.image:
        if host.image is None:
            raise HostError("image", f"{policy.origin('root.image')}: image {policy.root.image!r} "
                            "was not looked up")  # fmt: skip
        return host.image.layers
    return ("/usr",) if policy.root.source == "host" else (policy.root.source,)


def _lower_places(policy: Policy, host: Host) -> tuple[str, ...]:
    """Where they are in the template."""
    if policy.root.image:
        return tuple(f"{LOWER}/{number}" for number in range(len(lowers(policy, host))))
    return ("/usr",) if policy.root.source == "host" else (LOWER,)


# -- the template ----------------------------------------------------------------------------


def template(policy: Policy, host: Host) -> tuple[Step, ...]:
    """The steps that build the root all sandboxes of a tenant start from."""
    if policy.root.image and is_shared(policy, host):
        return _image_template(policy, host)
    pieces = _pieces(policy, host)
    why = policy.origin("root.source")
    steps: list[Step] = [
        plan.OpenTree(
            source=piece.source, slot=slot, optional=piece.optional, recursive=piece.recursive,
            why=piece.why,
        )
        for slot, piece in enumerate(pieces)
    ]  # fmt: skip
    steps += _open_store(host, len(pieces))
    steps.append(plan.Tmpfs(target=NEW, size=4 << 20, why=why))
    steps += [plan.MakeDir(path=f"{NEW}/{name}", why=why) for name in DIRS]
    if of_host(policy):
        steps += _host_links(NEW, host, why)
    else:
        steps.append(plan.MakeDir(path=NEW + LOWER, why=why))
    steps += _etc_files(NEW, policy)
    steps += [plan.Symlink(path=f"{NEW}/dev/{name}", to=to, why=why) for name, to in LINKS]
    for slot, piece in enumerate(pieces):
        target = NEW + _template_place(piece, slot)
        steps += _mount_point(target, piece.directory, piece.why)
        steps.append(_attach(slot, piece, target))
    for mount in _tmpfs_mounts(policy):
        if not _is_private(mount.target):
            steps += _mount_point(NEW + mount.target, True, policy.origin("mounts"))
    if host.inputs is not None:
        steps += [plan.MakeDir(path=NEW + STORE, why=FILES), _attach_store(host, len(pieces), NEW)]
    steps += [
        plan.Proc(target=f"{NEW}/proc", why="needed to mount /proc in sandboxes"),
        plan.Pivot(root=NEW, why=why),
        plan.Restrict(path="/", why="a writable template would join the jobs"),
    ]
    return tuple(steps)


def _image_template(policy: Policy, host: Host) -> tuple[Step, ...]:
    """The same with the root put together of an image's layers, once for all sandboxes.

    One overlay, and all of it read-only: on top what must be ours, whatever the image has there;
    at the bottom the places that a root is expected to have. No link of the image's is followed:
    what is mounted on are directories of the top.
    """
    pieces = _pieces(policy, host)
    why = policy.origin("root.image")
    top, bottom, root = f"{NEW}/top", f"{NEW}/bottom", f"{NEW}/root"
    steps: list[Step] = [
        plan.OpenTree(source=piece.source, slot=slot, optional=piece.optional,
                      recursive=piece.recursive, why=piece.why)
        for slot, piece in enumerate(pieces)
    ]  # fmt: skip
    steps += _open_store(host, len(pieces))
    steps.append(plan.Tmpfs(target=NEW, size=4 << 20, why=why))
    steps += [plan.MakeDir(path=path, why=why) for path in (top, bottom, root, NEW + LOWER)]
    ours = ["etc", "dev", "dev/shm", "proc", "tmp", "box", SHELF[1:], NOTHING[1:]]
    ours += [STORE[1:]] if host.inputs is not None else []
    steps += [plan.MakeDir(path=f"{top}/{name}", why=why) for name in ours]
    steps += [plan.MakeDir(path=f"{bottom}/{name}", why=why) for name in DIRS if name not in ours]
    steps += _etc_files(top, policy)
    steps += [plan.Symlink(path=f"{top}/dev/{name}", to=to, why=why) for name, to in LINKS]
    above = [(slot, piece) for slot, piece in enumerate(pieces) if not piece.layered]
    for slot, piece in enumerate(pieces):
        if piece.layered:
            steps.append(plan.MakeDir(path=NEW + piece.target, why=why))
            steps.append(_attach(slot, piece, NEW + piece.target))
    for slot, piece in above:
        steps += _mount_point(top + _template_place(piece, slot), piece.directory, piece.why)
    layers = tuple(NEW + place for place in _lower_places(policy, host))
    steps.append(plan.Overlay(target=root, lowers=(top, *layers, bottom), why=why))
    for slot, piece in above:
        steps.append(_attach(slot, piece, root + _template_place(piece, slot)))
    if host.inputs is not None:
        steps.append(_attach_store(host, len(pieces), root))
    steps += [
        plan.Proc(target=f"{root}/proc", why="needed to mount /proc in sandboxes"),
        plan.Pivot(root=root, why=why),
        plan.Restrict(path="/", why="a writable template would join the jobs"),
    ]
    return tuple(steps)


def _attach(slot: int, piece: _Piece, target: str) -> Step:
    return plan.Attach(
        slot=slot, source=piece.source, target=target, why=piece.why,
        attributes=piece.attributes, optional=piece.optional, recursive=piece.recursive,
    )  # fmt: skip


def _open_store(host: Host, slot: int) -> list[Step]:
    if host.inputs is None:
        return []
    return [plan.OpenTree(source=host.inputs.store, slot=slot, recursive=False, why=FILES)]


def _attach_store(host: Host, slot: int, root: str) -> Step:
    assert host.inputs is not None
    return plan.Attach(slot=slot, source=host.inputs.store, target=root + STORE, why=FILES,
                       recursive=False)  # fmt: skip


def _is_private(target: str) -> bool:
    return target.startswith(tuple(f"{place}/" for place in PRIVATE)) or target in PRIVATE


def _template_place(piece: _Piece, slot: int) -> str:
    return f"{SHELF}/{slot}" if _is_private(piece.target) else piece.target


def _pieces(policy: Policy, host: Host) -> list[_Piece]:
    why = policy.origin("root.source")
    pieces: list[_Piece] = []
    if of_host(policy):
        roots = ["usr", *(name for name in MERGED if name in host.root_dirs)]
        pieces += [
            _Piece(f"/{name}", f"/{name}", READ_ONLY, True, why, layered=name == "usr")
            for name in roots
        ]
        pieces += [
            _Piece(f"/etc/{name}", f"/etc/{name}", READ_ONLY, host.etc_entries[name] == "dir",
                   policy.origin("root.etc"))
            for name in policy.root.etc
            if name in host.etc_entries
        ]  # fmt: skip
    else:
        whole = not policy.root.image  # a layer is one directory, a root may be several mounts
        pieces += [
            _Piece(source, place, READ_ONLY, True, why, recursive=whole, layered=True)
            for source, place in zip(lowers(policy, host), _lower_places(policy, host), strict=True)
        ]
    # Read-only: a device can be written through all the same, but its times are the host's.
    device = Attributes.RDONLY | Attributes.NOSUID | Attributes.NOEXEC
    pieces += [
        _Piece(f"/dev/{name}", f"/dev/{name}", device, False, policy.origin("devices.allow"),
               recursive=False)
        for name in policy.devices.allow
    ]  # fmt: skip
    for number, mount in enumerate(policy.mounts):
        if mount.type == "bind" and mount.source is not None:
            attributes = SAFE if mount.writable else READ_ONLY
            attributes |= Attributes.NONE if mount.exec else Attributes.NOEXEC
            pieces.append(
                _Piece(mount.source, mount.target, attributes, mount.source not in host.files,
                       policy.origin(f"mounts[{number}]"), mount.optional)
            )  # fmt: skip
    return pieces


def _host_links(root: str, host: Host, why: str) -> list[Step]:
    links = [(name, host.root_links[name]) for name in MERGED if name in host.root_links]
    return [plan.Symlink(path=f"{root}/{name}", to=to.lstrip("/"), why=why) for name, to in links]


def _mount_point(path: str, directory: bool, why: str) -> list[Step]:
    """Whatever is missing of a path to mount on; what is there already stays as it is."""
    parents = path.split("/")
    above = ["/".join(parents[:count]) for count in range(3, len(parents))]
    steps: list[Step] = [plan.MakeDir(path=parent, why=why) for parent in above]
    last = plan.MakeDir(path=path, why=why) if directory else plan.MakeFile(path=path, why=why)
    return [*steps, last]


def _etc_files(root: str, policy: Policy) -> list[Step]:
    """The few files of /etc that programs need and that must not be the host's."""
    identity = policy.identity
    uid = 1000 if identity.uid is None else identity.uid
    gid = uid if identity.gid is None else identity.gid
    user = f"{identity.name}:x:{uid}:{gid}::{identity.home}:/bin/sh\n"
    others = "" if uid == 0 else "root:x:0:0::/root:/bin/sh\n"
    files = {
        "hosts": f"127.0.0.1 localhost {identity.hostname}\n::1 localhost {identity.hostname}\n",
        "hostname": f"{identity.hostname}\n",
        "resolv.conf": "",
    }
    if of_host(policy):
        files["passwd"] = f"{others}{user}nobody:x:65534:65534::/:/bin/false\n"
        root_group = "" if gid == 0 else "root:x:0:\n"
        files["group"] = f"{root_group}{identity.name}:x:{gid}:\nnogroup:x:65534:\n"
        files["nsswitch.conf"] = "passwd: files\ngroup: files\nhosts: files dns\n"
        files["shells"] = "/bin/sh\n/bin/bash\n"
    why = policy.origin("identity")
    return [
        plan.MakeFile(path=f"{root}/etc/{name}", content=text.encode(), why=why)
        for name, text in files.items()
    ]


# -- a sandbox -------------------------------------------------------------------------------


def sandbox(policy: Policy, host: Host, fuse_descriptors: int | None) -> tuple[Step, ...]:
    """The steps each sandbox adds: its own writable places, its /proc, its layered root."""
    layered = not is_shared(policy, host)
    root = f"{NEW}/root" if layered else ""
    steps = _private_area(policy, layered)
    if layered:
        steps += _layers(policy, host, root, fuse_descriptors)
    steps += _inputs(host)
    shared = policy.origin("limits.disk")
    steps += [
        plan.Bind(source=f"{NEW}/box", target=f"{root}{WORK}", attributes=SAFE, why=shared,
                  recursive=host.inputs is not None),
        plan.Bind(source=f"{NEW}/shm", target=f"{root}/dev/shm", why=shared,
                  attributes=SAFE | Attributes.NOEXEC),
    ]  # fmt: skip
    for number, mount in enumerate(_tmpfs_mounts(policy)):
        if not _is_private(mount.target):
            steps += _tmpfs_mount(root, number, mount, policy)
    steps += _proc(policy, host, root)
    steps.append(plan.Bind(source=f"{NEW}/tmp", target=f"{root}/tmp", attributes=SAFE, why=shared))
    steps += _mounts_in_private(policy, host, root)
    if layered:
        if not policy.root.writable:
            steps.append(plan.Restrict(path=root, why=policy.origin("root.writable")))
        steps.append(plan.Pivot(root=root, why=policy.origin("root")))
    return tuple(steps)


def _inputs(host: Host) -> list[Step]:
    """What is given by reference, in the working directory that is about to take its place.

    It hides the store then. The directories on the way are the job's own, as those of files that
    are copied in.
    """
    steps: list[Step] = []
    made: set[str] = set()
    for one in host.inputs.attachments if host.inputs is not None else ():
        parts = one.target.split("/")
        above = ["/".join(parts[:count]) for count in range(1, len(parts))]
        folders = [folder for folder in above if folder not in made]
        made |= {*folders}
        steps += [plan.MakeDir(path=f"{NEW}{WORK}/{folder}", for_job=True, why=FILES)
                  for folder in folders]  # fmt: skip
        place = f"{NEW}{WORK}/{one.target}"
        steps += [
            plan.MakeDir(path=place, why=FILES) if one.directory
            else plan.MakeFile(path=place, why=FILES),
            plan.Bind(source=f"{STORE}/{one.source}", target=place, why=FILES),
        ]  # fmt: skip
    return steps


def _mounts_in_private(policy: Policy, host: Host, root: str) -> list[Step]:
    """Mounts of the policy below a private place: last, or it would hide them."""
    steps: list[Step] = []
    for mount in _tmpfs_mounts(policy):
        if _is_private(mount.target):
            target, why = root + mount.target, policy.origin("mounts")
            attributes = SAFE if mount.exec else SAFE | Attributes.NOEXEC
            *above, _ = _mount_point(target, True, why)
            steps += [*above, plan.MakeDir(path=target, mode=0o1777, why=why)]
            if mount.size is None:  # the private place is a tmpfs already
                step = plan.Bind(source=target, target=target, attributes=attributes, why=why)
                steps.append(step)
            else:
                steps.append(
                    plan.Tmpfs(target=target, size=mount.size, mode=0o1777, inodes=mount.inodes,
                               attributes=attributes, why=why)
                )  # fmt: skip
    for slot, piece in enumerate(_pieces(policy, host)):
        if _is_private(piece.target):
            steps += _mount_point(root + piece.target, piece.directory, piece.why)
            steps.append(
                plan.Bind(source=f"{SHELF}/{slot}", target=root + piece.target, recursive=True,
                          attributes=Attributes.NONE, why=piece.why)
            )  # fmt: skip
    return steps


def _private_area(policy: Policy, layered: bool) -> list[Step]:
    limits, why = policy.limits, policy.origin("limits.disk")
    steps: list[Step] = [
        plan.Tmpfs(target=NEW, size=limits.disk, inodes=limits.inodes, why=why),
        plan.MakeDir(path=f"{NEW}/box", for_job=True, why=why),
        plan.MakeDir(path=f"{NEW}/tmp", mode=0o1777, why=why),
        plan.MakeDir(path=f"{NEW}/shm", mode=0o1777, why=why),
    ]
    if layered:
        steps.append(plan.MakeDir(path=f"{NEW}/root", for_job=policy.root.writable, why=why))
        names = ("upper", "work", "upper/usr", "work/usr")
        steps += [plan.MakeDir(path=f"{NEW}/{name}", why=why) for name in names]
    return steps


def _layers(policy: Policy, host: Host, root: str, fuse_first: int | None) -> list[Step]:
    """Put the layered root together below `root`, which becomes a mount of its own."""
    why = policy.origin("root")
    how = driver(policy, host)
    steps: list[Step] = []
    lower = _lower_places(policy, host)
    if of_host(policy):
        steps.append(plan.Bind(source=root, target=root, attributes=SAFE, why=why))
        for name in DIRS:
            own = policy.root.writable and name not in ("usr", "dev", "dev/shm", "proc")
            steps.append(plan.MakeDir(path=f"{root}/{name}", for_job=own, why=why))
        # First: the sidecar's descriptor is closed with the strays of the next file written.
        steps += _layer(how, lower, f"{root}/usr", "usr", fuse_first, why)
        steps += _host_links(root, host, why)
        steps += _etc_files(root, policy)
    else:
        steps += _layer(how, lower, root, "", fuse_first, why)
        if how != "tmpfs":
            steps += [plan.MakeDir(path=f"{root}/{name}", why=why) for name in DIRS]
            steps += _etc_files(root, policy)
    steps.append(plan.Bind(source="/dev", target=f"{root}/dev", recursive=True, why=why,
                           attributes=Attributes.NONE))  # fmt: skip
    for piece in _pieces(policy, host):
        if piece.layered or piece.target.startswith("/dev/") or _is_private(piece.target):
            continue
        steps += _mount_point(root + piece.target, piece.directory, piece.why)
        steps.append(
            plan.Bind(source=piece.target, target=root + piece.target, recursive=True,
                      attributes=Attributes.NONE, why=piece.why)
        )  # fmt: skip
    return steps


def _layer(
    how: str, lower: tuple[str, ...], target: str, name: str, fuse_first: int | None, why: str
) -> list[Step]:
    suffix = f"/{name}" if name else ""
    if how == "kernel":
        return [
            plan.Overlay(target=target, lowers=lower, upper=f"{NEW}/upper{suffix}",
                         work=f"{NEW}/work{suffix}", why=why)
        ]  # fmt: skip
    if how == "fuse" and fuse_first is not None:
        return [plan.AttachReceived(descriptor=fuse_first, target=target, source=":".join(lower),
                                    why=why)]  # fmt: skip
    return [plan.Bind(source=lower[0], target=target, recursive=True, why=why)]


def _tmpfs_mounts(policy: Policy) -> list[Mount]:
    return [mount for mount in policy.mounts if mount.type == "tmpfs"]


def _tmpfs_mount(root: str, number: int, mount: Mount, policy: Policy) -> list[Step]:
    why = policy.origin("mounts")
    attributes = SAFE if mount.exec else SAFE | Attributes.NOEXEC
    steps: list[Step] = _mount_point(root + mount.target, True, why) if root else []
    if mount.size is not None:
        steps.append(plan.Tmpfs(target=root + mount.target, size=mount.size, mode=0o1777,
                                inodes=mount.inodes, attributes=attributes, why=why))  # fmt: skip
        return steps
    area = f"{NEW}/mount{number}"
    steps.append(plan.MakeDir(path=area, mode=0o1777, why=why))
    steps.append(plan.Bind(source=area, target=root + mount.target, attributes=attributes, why=why))
    return steps


def _proc(policy: Policy, host: Host, root: str) -> list[Step]:
    why = policy.origin("root.proc")
    steps: list[Step] = [plan.Proc(target=f"{root}/proc", subset=policy.root.proc != "masked",
                                   why=why)]  # fmt: skip
    if policy.root.proc != "masked":
        return steps
    for name in MASKED:
        if name in host.proc_entries:
            empty = NOTHING if policy.root.image and is_shared(policy, host) else EMPTY
            source = empty if name in DIRECTORIES_OF_PROC else "/dev/null"
            steps.append(plan.Bind(source=source, target=f"{root}/proc/{name}", why=why,
                                   attributes=Attributes.NONE))  # fmt: skip
    steps.append(plan.Bind(source=f"{root}/proc/sys", target=f"{root}/proc/sys", why=why))
    return steps
