"""The tenant's standing script: builds the template once, then clones a sandbox per request.

Theory of operation. The image is an ELF program's data (see elf.py) and starts in a process with
a doorbell, two descriptors of /dev/null and one socket. It carries out the tenant's plan; the step
`Namespaces` leaves the first process waiting and goes on as PID 1 of the tenant. Then it serves:

    close everything but 0-3          so that what arrives gets known numbers (unix(7), SCM_RIGHTS)
    read, recvmsg                     flags and cgroup land in clone_args, the script at SETUP
    ppoll, read                       or, if nothing is there, until the doorbell rings, and then
    recvmsg ...                       for a moment again and again (supervise/tenants.py says why)
    clone3                            the child goes on at the script it has a copy of
    sendmsg                           the pidfd, which clone3 wrote straight into the control data
    again

EOF on the socket is the supervisor's death: the zygote exits, and the kernel kills every process
of its PID namespace, which is every process of every job (pid_namespaces(7)).

A sandbox is born as a copy of the zygote and keeps this copy for as long as it lives, so the copy
is small: what the machine does not use is not copied at all (MADV_DONTFORK, machine.py), and what
every sandbox touches lies within the two megabytes, aligned, that one page table covers.

While the template is built a failure ends the process after telling which record it was. A clone
that fails is only answered: one job's failure must not end the tenant.
"""

from __future__ import annotations

from functools import lru_cache

from sandboxd import plan
from sandboxd.messages import READY
from sandboxd.script.lower import MSG_NOSIGNAL, POLLIN, POLLRDHUP, SIGCHLD, lower
from sandboxd.script.record import (
    BASE,
    CODE,
    HEADER_SIZE,
    NO_CALL,
    Assembler,
    Condition,
    Image,
    Label,
)
from sandboxd.script.writer import SOCKET, Writer

DOORBELL = 0
"""The zygote's stdin, an eventfd(2) that is read without waiting."""
SETUP = CODE + (1 << 20)
"""Where a sandbox's setup script is received and runs."""
MAX_SETUP = 3 << 18
EXEC = SETUP + MAX_SETUP
"""Where a job's exec script is received and runs."""
MAX_EXEC = 12 << 20
"""execve(2) itself takes no more than 6 MiB of arguments and environment."""
MEMORY = EXEC + MAX_EXEC - BASE

CLONE_PIDFD = 0x1000
CLONE_INTO_CGROUP = 1 << 33
MSG_CMSG_CLOEXEC = 0x40000000
MSG_DONTWAIT = 0x40
TURNS, TRIES = 24, 8
"""As many looks for a request as take about a tenth of a millisecond."""
SOL_SOCKET, SCM_RIGHTS = 1, 1
PR_SET_NAME = 15
SIG_IGN = 1
LAST_SIGNAL = 64


def failure_handler(w: Writer, exit_code: int) -> tuple[Label, Label]:
    """The records a failing record goes to, and the cell its address is written to.

    They send messages.Failure: the cell itself (the address), then what it points at.
    """
    parts = w.asm.words((0, 8, 0, 96))
    cell = parts + 16
    message = w.asm.words((0, 0, parts, 2, 0, 0, 0))
    handler = w.asm.emit(NO_CALL, cell, store=parts)
    w.call("sendmsg", SOCKET, message, MSG_NOSIGNAL, ignore=True)
    w.call("exit_group", exit_code)
    return handler, cell


@lru_cache(maxsize=256)
def tenant_image(arch: str, tenant: plan.TenantPlan) -> Image:
    """The whole program of a tenant; `socket.*` is where its socket's descriptor is put in."""
    asm = Assembler(BASE)
    w = Writer(arch, asm)
    start = asm.place(asm.label())
    own = w.call("dup3", 0, SOCKET, 0, ignore=True)
    w.mark("socket", own.field("a0"))
    w.call("close_range", SOCKET + 1, 0xFFFFFFFF, 0)
    w.call("umask", 0)
    w.call("prctl", PR_SET_NAME, asm.data(b"sandboxd\0"), 0, 0, 0)
    _default_signals(w)
    lower(w, tenant.steps)
    _serve(w)
    handler, cell = failure_handler(w, 1)
    image = asm.finish((handler, cell, start))
    if len(image.content) > SETUP - BASE:
        raise ValueError("the tenant's script is too large")
    return image


def _default_signals(w: Writer) -> None:
    """Ignored signals stay ignored through execve(2), so none may be here (nohup, SIGPIPE)."""
    nothing = w.asm.data(bytes(32))
    for signal in range(1, LAST_SIGNAL + 1):
        w.call("rt_sigaction", signal, nothing, 0, 8, ignore=True)
    # Children of the zygote are reaped by the kernel; the supervisor has their pidfds.
    ignore = w.asm.data(SIG_IGN.to_bytes(8, "little") + bytes(24))
    w.call("rt_sigaction", SIGCHLD, ignore, 0, 8)


def _try(w: Writer, request: Label, there: Label, gone: Label) -> None:
    """Receive a request if there is one, and go on at `there`."""
    nothing, length = w.asm.label(), w.asm.label()
    w.call(
        "recvmsg", SOCKET, request, MSG_CMSG_CLOEXEC | MSG_DONTWAIT, ignore=True,
        store=length.field("a0"), when=Condition.NEGATIVE, target=nothing,
    )  # fmt: skip
    w.asm.place(length)
    w.asm.emit(NO_CALL, 0, when=Condition.ZERO, target=gone)
    w.asm.jump(there)
    w.asm.place(nothing)


def _look_out(w: Writer, request: Label, there: Label, gone: Label) -> None:
    """Try that TURNS times TRIES times: who rang may still be writing what it wants.

    There is nothing to count with, so each turn is a record, which says where the next one is.
    """
    turn, end = w.asm.label(), w.asm.label()
    on = w.asm.label()
    for _ in range(TURNS):
        following = w.asm.label()
        w.asm.emit(NO_CALL, following, store=on.field("target"), when=Condition.ALWAYS, target=turn)
        w.asm.place(following)
    w.asm.jump(end)
    w.asm.place(turn)
    for _ in range(TRIES):
        _try(w, request, there, gone)
    w.asm.place(on)
    w.asm.jump(end)
    w.asm.place(end)


def _serve(w: Writer) -> None:
    asm = w.asm
    # struct clone_args (clone3(2)): flags, pidfd, child_tid, parent_tid, exit_signal, stack,
    # stack_size, tls, set_tid, set_tid_size, cgroup.
    rights = asm.words((16 + 4, SOL_SOCKET | SCM_RIGHTS << 32, 0))
    clone_args = asm.words((0, rights + 16, 0, 0, SIGCHLD, 0, 0, 0, 0, 0, 0))
    answer, rings = asm.cell(), asm.cell()
    answer_part = asm.words((answer, 8))
    reply = asm.words((0, 0, answer_part, 1, rights, 24, 0))
    parts = asm.words((clone_args, 8, clone_args + 80, 8, SETUP, MAX_SETUP))
    control = asm.space(512)
    request = asm.words((0, 0, parts, 3, control, 512, 0))
    ears = asm.words((SOCKET | POLLRDHUP << 32, DOORBELL | POLLIN << 32))

    w.call("sendto", SOCKET, asm.data(READY), len(READY), MSG_NOSIGNAL, 0, 0)
    again, gone, made = asm.label(), asm.label(), asm.label()
    asm.place(again)
    w.call("close_range", SOCKET + 1, 0xFFFFFFFF, 0)
    # recvmsg(2) leaves the length it used in msg_controllen, so it is put back each time.
    w.assign(512, request + 40)
    w.call("read", DOORBELL, rings, 8, ignore=True)
    _try(w, request, made, gone)
    w.call("ppoll", ears, 2, 0, 0, 0, ignore=True)
    w.call("read", DOORBELL, rings, 8, ignore=True)
    _look_out(w, request, made, gone)
    asm.jump(again)
    asm.place(made)
    look, failed = asm.label(), asm.label()
    w.call(
        "clone3", clone_args, 88, store=look.field("a0"), ignore=True,
        when=Condition.ZERO, target=SETUP + HEADER_SIZE,
    )  # fmt: skip
    asm.place(look)
    asm.emit(NO_CALL, 0, store=answer, when=Condition.NEGATIVE, target=failed)
    w.call("sendmsg", SOCKET, reply, MSG_NOSIGNAL, ignore=True)
    asm.jump(again)
    asm.place(failed)
    w.call("sendto", SOCKET, answer, 8, MSG_NOSIGNAL, 0, 0)
    asm.jump(again)
    asm.place(gone)
    w.call("exit_group", 0)
