"""One trust domain and root: a user namespace with a template root, and the zygote that serves it.

A tenant is started once and then asked for sandboxes. Its processes end when our end of its
socket closes, for whatever reason; everything below is in its PID namespace and ends with it.

Who sends over a socket wakes the receiver on its own CPU, as if it were about to sleep (WF_SYNC in
kernel/sched/fair.c), and there the zygote would wait until we do. So it does not listen to the
socket while it is idle, but to a doorbell: an eventfd(2) wakes it where it last was. A CPU that
sleeps takes its time to wake, so who knows that it will ask rings before it has written what.
"""

from __future__ import annotations

import errno
import os
import resource
import select
import signal
import socket
import subprocess
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from errno import EMFILE
from pathlib import Path

import trio

from sandboxd import plan
from sandboxd.cgroup.leaves import Cgroups
from sandboxd.compile.build import Compiled
from sandboxd.errors import HostError, LaunchError
from sandboxd.host import Host
from sandboxd.linux import memfd
from sandboxd.linux.descriptors import SCARCE, Descriptors, no_room
from sandboxd.messages import FILES, GO, MAPS, READY, CloneReply, CloneRequest, Failure
from sandboxd.plan import IdMap, OpenTree, SetLimit, SetupPlan, Step, Tmpfs
from sandboxd.script import elf
from sandboxd.script.command import command
from sandboxd.script.init import network_image
from sandboxd.script.record import Image
from sandboxd.script.writer import FIRST_DESCRIPTOR, FIRST_SLOT
from sandboxd.script.zygote import CLONE_INTO_CGROUP, CLONE_PIDFD, MEMORY, tenant_image
from sandboxd.supervise.processes import reap, starting

START_TIMEOUT = 30.0
"""Seconds; a tenant takes milliseconds, the executor on a loaded machine a second."""
PACKAGE_PARENT = str(Path(__file__).resolve().parent.parent.parent)
MESSAGE = 4096


class Tenant:
    """A running tenant. `clone` makes a sandbox; `take_network` lends a network namespace."""

    def __init__(
        self,
        compiled: Compiled,
        host: Host,
        control: socket.socket,
        doorbell: int,
        pid: int,
        beside: Tenant | None = None,
    ) -> None:
        self.compiled = compiled
        self.host = host
        self.pid = pid
        self.dead = False
        self.control = control
        self._doorbell = doorbell
        self._asked: deque[Clone] = deque()
        self._hearing = trio.Lock()
        self._sending = trio.Lock()
        self._listening: trio.CancelScope | None = None
        self._networks: list[int] = []
        self._lent: set[int] = set()
        self._closed = False
        first = compiled.first_job_uid
        last = min(plan.FIRST_JOB_UID + compiled.tenant.ids.job_uids, 60000)
        # In one user namespace two sandboxes must not have one uid: what the kernel counts is per
        # user in it.
        self._uids: deque[int] = beside._uids if beside else deque(range(first, last))

    def user_namespace(self) -> str:
        """The path of the tenant's user namespace; LaunchError when the tenant was left, for the
        pid may be another's then."""
        if self._closed:
            raise self._died(0)
        return f"/proc/{self.pid}/ns/user"

    # -- what sandboxes borrow

    def take_uid(self) -> int:
        """A uid of the tenant that no live sandbox has; the one unused for longest."""
        if not self._uids:
            raise HostError("subuid", "all subordinate ids are in use", hint="fewer jobs at once")
        return self._uids.popleft()

    def return_uid(self, uid: int) -> None:
        self._uids.append(uid)

    async def take_network(self) -> int:
        """A descriptor of a network namespace that tells nothing; return it when it is left."""
        fd = self._networks.pop() if self._networks else await self._make_network()
        self._lent.add(fd)
        return fd

    def return_network(self, fd: int, *, again: bool) -> None:
        """Its user is dead; whether it serves again is compile/network.py's to say.

        Nothing happens when the tenant was ended before: it is closed, and the number another's.
        """
        if fd not in self._lent:
            return
        self._lent.remove(fd)
        if again:
            self._networks.append(fd)
        else:
            os.close(fd)

    @property
    def networks_ahead(self) -> int:
        return len(self._networks)

    async def refill_networks(self, wanted: int) -> None:
        """Make namespaces ahead, while nobody waits for one."""
        while self.networks_ahead < wanted and not self.dead:
            self._networks.append(await self._make_network())

    def close_networks(self) -> None:
        """For good: one that is being made meanwhile is closed by who makes it."""
        self._closed = True
        for fd in (*self._networks, *self._lent):
            os.close(fd)
        self._networks.clear()
        self._lent.clear()

    async def _make_network(self) -> int:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        image = network_image(self.host.arch, self.compiled.network)
        with ours:
            ours.setblocking(False)
            with theirs:
                asked = await self.clone(self.compiled.network, image.content, [theirs.fileno()])
            try:
                return await self._receive_network(asked, ours, image)
            finally:
                asked.let_go()

    async def _receive_network(self, asked: Clone, ours: socket.socket, image: Image) -> int:
        pidfd = await asked.wait()
        await trio.lowlevel.wait_readable(ours)
        with Descriptors() as fds:
            data, received, _, _ = socket.recv_fds(ours, MESSAGE, 1, socket.MSG_CMSG_CLOEXEC)
            for fd in received:
                fds.own(fd)
            if data == FILES and not received:
                raise no_room("a network namespace")
            if data != FILES or len(received) != 1:
                raise failure(data, image, self.compiled.network.steps)
            await trio.lowlevel.wait_readable(pidfd)
            if self._closed:
                raise self._died(0)
            return os.dup(received[0])

    # -- sandboxes

    async def clone(self, setup: SetupPlan, script: bytes, fds: list[int]) -> Clone:
        """Ask for a process in new namespaces that carries out `script`.

        The descriptors arrive in the order of `setup.descriptors`. The answer is not waited for:
        a short job is over before anybody has to know its pidfd.
        """
        if self._closed:
            raise self._died(0)
        flags = setup.namespaces | CLONE_PIDFD
        cgroup = 0
        if setup.cgroup:
            flags |= CLONE_INTO_CGROUP
            cgroup = plan_descriptor(setup, "cgroup")
        parts = CloneRequest(flags, cgroup, script).pack()
        asked = Clone(self, flags)
        try:
            try:
                socket.send_fds(self.control, parts, fds)
            except BlockingIOError:
                await self._send_later(parts, fds)
        except (OSError, trio.ClosedResourceError) as error:
            asked.make_room()
            raise self._refused(error) from None
        except BaseException:
            asked.make_room()
            raise
        self.ring()
        self._asked.append(asked)
        return asked

    def _refused(self, error: OSError | trio.ClosedResourceError) -> Exception:
        """Why it was not asked: it is gone; or it is there, and there is no room for a message."""
        errno = (error.errno or 0) if isinstance(error, OSError) else 0
        gone = (BrokenPipeError, ConnectionResetError, trio.ClosedResourceError)
        if self._closed or isinstance(error, gone):
            return self._died(errno)
        if errno in SCARCE:
            return error
        return LaunchError("clone", 0, errno, "ask the zygote for a process")

    def ring(self) -> None:
        """Wake the zygote, which looks out for a request for a moment."""
        os.eventfd_write(self._doorbell, 1)

    async def _send_later(self, parts: list[bytes], fds: list[int]) -> None:
        """The zygote is behind; only one task may wait for a descriptor."""
        async with self._sending:
            while True:
                if self._closed:  # while we waited for our turn
                    raise self._died(0)
                await trio.lowlevel.wait_writable(self.control)
                with suppress(BlockingIOError):
                    socket.send_fds(self.control, parts, fds)
                    return

    def hear(self) -> None:
        """Take the answers that are there; they come in the order of the questions."""
        while self._asked:
            try:
                data = self.control.recv(1, socket.MSG_PEEK)
            except BlockingIOError:
                return
            except OSError:
                data = b""
            if not data:
                self._answer_no_more()
                return
            asked = self._asked.popleft()
            asked.make_room()
            try:
                data, received, _, _ = socket.recv_fds(
                    self.control, MESSAGE, 1, socket.MSG_CMSG_CLOEXEC
                )
            except ConnectionResetError:  # it was killed since we looked
                asked.error = self._died(0)
                self._answer_no_more()
                return
            asked.answered(CloneReply.unpack(data).result, received)
            if self._listening is not None:  # whoever waits for what has been taken here
                self._listening.cancel()

    async def wait_heard(self, asked: Clone) -> None:
        """Until this one is answered."""
        while not asked.known:
            async with self._hearing:  # only one task may wait for a descriptor
                self.hear()
                if asked.known:
                    return
                with trio.CancelScope() as self._listening:
                    await trio.lowlevel.wait_readable(self.control)
                self._listening = None

    def _answer_no_more(self) -> None:
        error = self._died(0)
        while self._asked:
            asked = self._asked.popleft()
            asked.make_room()
            asked.error = error
        if self._listening is not None:
            self._listening.cancel()

    def abandon(self) -> None:
        """Nobody will be answered any more: say so to who waits, before the socket closes."""
        self._closed = True
        self._answer_no_more()
        trio.lowlevel.notify_closing(self.control)

    def look(self) -> None:
        """Whether the zygote is still there, for who cannot try and see."""
        if self._closed:
            self.dead = True
            return
        poll = select.poll()
        poll.register(self.control, select.POLLRDHUP)
        self.dead = self.dead or bool(poll.poll(0))

    def _died(self, errno: int) -> LaunchError:
        self.dead = True
        return LaunchError("tenant", 0, errno, "the zygote is gone", hint="it is started anew")


def plan_descriptor(setup: SetupPlan, name: str) -> int:
    """The number a descriptor gets on arrival in the zygote."""
    return FIRST_DESCRIPTOR + setup.descriptors.index(name)


def clone_hint(errno: int) -> str:
    if errno == 28:  # ENOSPC: a limit of /proc/sys/user
        return "raise /proc/sys/user/max_*_namespaces"
    if errno == 11:  # EAGAIN
        return "raise the user's process limit (ulimit -u)"
    return ""


class Clone:
    """A process that was asked for: its pidfd, or why there is none, once that is known.

    A place is kept for the pidfd meanwhile: where a process has no descriptor left to give, the
    kernel drops what a message brings (unix(7)), and nobody could kill or wait for the sandbox.
    """

    def __init__(self, tenant: Tenant, flags: int) -> None:
        self.tenant = tenant
        self.pidfd = -1
        self.error: LaunchError | None = None
        self._flags = flags
        self._place = os.dup(tenant.control.fileno())
        self._wanted = True

    def make_room(self) -> None:
        os.close(self._place)

    def let_go(self) -> None:
        """Nobody wants it any more; one that comes later is killed."""
        self._wanted = False
        if self.pidfd >= 0:
            os.close(self.pidfd)

    @property
    def known(self) -> bool:
        return self.pidfd >= 0 or self.error is not None

    def answered(self, result: int, received: list[int]) -> None:
        if result < 0:
            self.error = LaunchError("clone", 0, -result, plan.describe_namespaces(self._flags),
                                     hint=clone_hint(-result))  # fmt: skip
        elif not received:  # a thread of ours took the place: nobody can end it but the tenant
            self.tenant.dead = True
            self.error = LaunchError("clone", 0, EMFILE, "receive the pidfd of a process")
        else:
            self.pidfd = received[0]
            if not self._wanted:
                with suppress(ProcessLookupError):
                    signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)
                os.close(self.pidfd)

    async def wait(self) -> int:
        """The pidfd, or LaunchError."""
        if self.pidfd < 0:
            await self.tenant.wait_heard(self)
            if self.error is not None:
                raise self.error
        return self.pidfd


def failure(data: bytes, image: Image, steps: tuple[Step, ...]) -> LaunchError:
    """The error a messages.Failure means, in the words of the plan."""
    if len(data) < Failure.FORM.size:
        return LaunchError("sandbox", 0, 0, "it ended while it was set up")
    failed = Failure.unpack(data[: Failure.FORM.size])
    tag = image.tag(failed.address)
    if tag < 0:
        return LaunchError("init", 0, failed.errno, f"system call {failed.nr}")
    step = steps[tag]
    hint = _too_low(failed.errno, steps) or step.why
    return LaunchError(step.stage, tag, failed.errno, step.describe(), hint=hint)


def _too_low(number: int, steps: tuple[Step, ...]) -> str:
    """The limit of the policy's that a sandbox itself does not fit into."""
    for step in steps:
        if number == errno.EMFILE and isinstance(step, SetLimit) and step.resource == "NOFILE":
            return f"{step.why} is too low for a sandbox itself"
        if number == errno.ENOSPC and isinstance(step, Tmpfs):
            return f"{step.why}, or limits.inodes, is too low for a sandbox itself"
    return ""


# -- starting one ----------------------------------------------------------------------------


@asynccontextmanager
async def open_tenant(
    compiled: Compiled, host: Host, cgroups: Cgroups | None, beside: Tenant | None = None
) -> AsyncIterator[Tenant]:
    """A tenant; leaving ends it with everything in it and waits for that.

    `beside`: whose user namespace it shares, as its compile/build.py:joined() plan has it.
    """
    _check_descriptors(compiled)
    image = tenant_image(host.arch, compiled.tenant)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, Descriptors() as fds:
        ours.setblocking(False)
        flags = os.EFD_NONBLOCK | os.EFD_CLOEXEC
        doorbell = fds.own(os.eventfd(0, flags))
        with theirs, starting("tenant", "start its zygote"):
            process = start(image, theirs.fileno(), doorbell, host, beside)
        tenant = Tenant(compiled, host, ours, doorbell, process.pid, beside)
        try:
            with trio.fail_after(START_TIMEOUT), starting("tenant", "set it up"):
                await _boot(tenant, image, cgroups)
            yield tenant
        except trio.TooSlowError:
            raise LaunchError("tenant", 0, 110, f"not ready after {START_TIMEOUT} s") from None
        finally:
            tenant.abandon()
            ours.close()
            with trio.CancelScope(shield=True):
                await reap(process)
            tenant.close_networks()


def _check_descriptors(compiled: Compiled) -> None:
    """HostError if a tenant, which inherits our limit, has no room for the mounts it keeps."""
    slots = [step.slot for step in compiled.tenant.steps if isinstance(step, OpenTree)]
    need = FIRST_SLOT + max(slots, default=0) + 1
    here, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if here < need:
        raise HostError("open files", f"the limit of open files is {here}, and {need} are needed",
                        hint=f"raise it: ulimit -n {max(need, 1024)}")  # fmt: skip


def start(
    image: Image, control: int, doorbell: int, host: Host, beside: Tenant | None = None
) -> subprocess.Popen[bytes]:
    """Execute a tenant's image: by the machine, or by the executor where it cannot run."""
    content = image.patched(dict.fromkeys(image.marks, control))
    with Descriptors() as fds:
        stdout = subprocess.DEVNULL
        if beside is not None:
            stdout = fds.own(os.open(beside.user_namespace(), os.O_RDONLY | os.O_CLOEXEC))
        if host.memfd_exec and host.arch in ("x86_64", "aarch64"):
            fd = fds.own(memfd.program(elf.program(host.arch, content, MEMORY)))
            argv, executable = ["sandboxd-tenant"], f"/proc/self/fd/{fd}"
        else:
            fd = fds.own(memfd.program(content))
            # Its command line is init's, which every job may read: no path of ours in it.
            executable, *rest = command(".", fd, MEMORY)
            argv = [os.path.basename(executable), *rest]
        return subprocess.Popen(
            argv, executable=executable, pass_fds=(fd, control), cwd=PACKAGE_PARENT,
            env={"PATH": os.path.dirname(executable)},
            stdin=doorbell, stdout=stdout, stderr=subprocess.DEVNULL,
        )  # fmt: skip


async def _boot(tenant: Tenant, image: Image, cgroups: Cgroups | None) -> None:
    control, ids = tenant.control, tenant.compiled.tenant.ids
    first = tenant.compiled.tenant.steps[0]
    is_joined = isinstance(first, plan.UserNamespace) and first.joined
    while True:
        await trio.lowlevel.wait_readable(control)
        try:
            data = control.recv(MESSAGE)
        except ConnectionResetError:
            data = b""
        if data == READY:
            return
        if data != MAPS:
            raise failure(data, image, tenant.compiled.tenant.steps)
        if not is_joined:
            await write_maps(ids, tenant.pid)
        if cgroups is not None:
            await cgroups.admit(tenant.pid, ids.uids[0][1] if ids.writer == "direct" else None)
        control.send(GO)


async def write_maps(ids: IdMap, pid: int) -> None:
    """Give a process that waits in its new user namespace its ranges of ids."""
    if ids.writer == "self":  # it has written its single id
        return
    for name, rows in (("uid", ids.uids), ("gid", ids.gids)):
        if ids.writer == "direct":
            text = "".join(f"{inside} {outside} {count}\n" for inside, outside, count in rows)
            Path(f"/proc/{pid}/{name}_map").write_text(text)  # noqa: ASYNC240
            continue
        words = [str(number) for row in rows for number in row]
        done = await trio.run_process(
            [f"new{name}map", str(pid), *words], check=False, capture_stderr=True
        )
        if done.returncode:
            reason = done.stderr.decode(errors="replace").strip()
            raise HostError(f"new{name}map", f"new{name}map refused the map: {reason}",
                            hint=f"check the caller's line in /etc/sub{name}")  # fmt: skip
