"""PID 1 of a sandbox: its setup script, and the exec script that starts and watches a job.

Theory of operation. A sandbox begins as a copy of the zygote, at the first record of a setup
script made from (policy, host). When that is through, everything is in force that a job is to be
held by, and init waits for its job: a header whose length lands in the next record's argument,
then the exec script. A sandbox prepared ahead (a spare) is one that waits there.

The exec script starts the program and becomes the reaper:

    clone(VM | VFORK)   the child runs the same records until execve; init is stopped meanwhile
      child:            own session, descriptors 0-2, Landlock domain, signals unblocked, execve
    rt_sigtimedwait     all signals are blocked in init, so that even PID 1 gets SIGNAL_STOP
    wait4(WNOHANG)      until there is nothing to reap; the program itself: go to the end
    kill(-1, SIGKILL)   the program ended, or we are told to stop: the rest, if any, goes too
    wait4               until there are no children: getrusage(RUSAGE_CHILDREN) has them all
    sendto              messages.Ended, the only thing a supervisor believes

The workload cannot touch init's socket, and init reads nothing that the workload wrote.
"""

from __future__ import annotations

import struct
from functools import lru_cache
from itertools import accumulate

import msgspec

from sandboxd import plan
from sandboxd.errors import JobError
from sandboxd.messages import ENDED, FILES, SIGNAL_STOP, Ended
from sandboxd.script.lower import (
    MSG_NOSIGNAL,
    MSG_WAITALL,
    POLLRDHUP,
    PR_SET_PDEATHSIG,
    SIG_BLOCK_ALL,
    SIG_SETMASK,
    SIGCHLD,
    SIGKILL,
    lower,
)
from sandboxd.script.record import (
    BASE,
    HEADER_SIZE,
    NO_CALL,
    RECORD_SIZE,
    Assembler,
    Condition,
    Image,
    Label,
)
from sandboxd.script.writer import (
    AT_FDCWD,
    FIRST_DESCRIPTOR,
    O_CLOEXEC,
    O_DIRECTORY,
    RULESET,
    SOCKET,
    Writer,
)
from sandboxd.script.zygote import (
    EXEC,
    MAX_EXEC,
    MAX_SETUP,
    MSG_CMSG_CLOEXEC,
    SCM_RIGHTS,
    SETUP,
    SOL_SOCKET,
    failure_handler,
)

CLONE_VM, CLONE_VFORK = 0x100, 0x4000
CLOSE_RANGE_CLOEXEC = 4
CLOCK_MONOTONIC = 1
CLOCK_PROCESS_CPUTIME_ID = 2
WNOHANG, WEXITED, WNOWAIT, WALL = 1, 4, 0x1000000, 0x40000000
P_ALL = 0
RUSAGE_CHILDREN = -1
TIOCSCTTY = 0x540E
ENOENT = -2
NO_PROGRAM = 127
MADV_DONTNEED = 4
RECORDS = 1 << 16
FEW = RECORDS // (4 * RECORD_SIZE)
"""The records that try so many programs, and all others, lie in the first RECORDS bytes at EXEC."""


def first_job_descriptor(landlock: bool) -> int:
    """The number of the first descriptor that comes with a job (its stdin)."""
    return RULESET + 1 if landlock else FIRST_DESCRIPTOR


@lru_cache(maxsize=256)  # each set of references that jobs are given has one of its own
def setup_image(arch: str, setup: plan.SetupPlan) -> Image:
    """The script of one kind of sandbox; marks `uid.*` and `digits.*` take the job's uid."""
    w, start = _begin(arch)
    w.call("prctl", PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0)
    w.call("rt_sigaction", SIGCHLD, w.asm.data(bytes(32)), 0, 8)
    w.call("rt_sigprocmask", SIG_SETMASK, w.asm.cell(SIG_BLOCK_ALL), 0, 8)
    lower(w, setup.steps)
    w.close_strays(first_job_descriptor(setup.landlock))
    w.call("umask", 0o022)
    _wait_for_job(w)
    return w.asm.finish((start,))


@lru_cache(maxsize=256)
def network_image(arch: str, setup: plan.SetupPlan) -> Image:
    """The script that makes a network namespace and hands it over instead of running a job."""
    w, start = _begin(arch)
    lower(w, setup.steps)
    _hand_over(w, "/proc/self/ns/net", O_CLOEXEC)
    w.call("exit_group", 0)
    return w.asm.finish((start,))


def _begin(arch: str) -> tuple[Writer, Label]:
    """The start of every script a zygote's copy runs."""
    asm = Assembler(SETUP)
    w = Writer(arch, asm)
    start = asm.place(asm.label())
    _own_failures(w, 1)
    # The job's own socket replaces the zygote's at once: nothing of ours must be reachable.
    w.call("dup3", FIRST_DESCRIPTOR, SOCKET, O_CLOEXEC)
    return w, start


def _own_failures(w: Writer, exit_code: int) -> None:
    """From here on a record that fails is told over the job's socket."""
    on = w.asm.label()
    w.asm.jump(on)
    handler, cell = failure_handler(w, exit_code)
    w.asm.place(on)
    w.assign(handler, BASE)
    w.assign(cell, BASE + 8)


def _wait_for_job(w: Writer) -> None:
    """Receive messages.StartHeader and its script, and go on there."""
    asm = w.asm
    receive = asm.label()
    parts = asm.words((receive.field("a2"), 8))
    control = asm.space(256)
    header = asm.words((0, 0, parts, 1, control, 256, 0))
    gone = asm.label()
    w.call(
        "recvmsg", SOCKET, header, MSG_CMSG_CLOEXEC | MSG_WAITALL,
        when=Condition.ZERO, target=gone,
    )  # fmt: skip
    asm.place(receive)
    w.call("recvfrom", SOCKET, EXEC, 0, MSG_WAITALL, 0, 0)
    asm.jump(EXEC + HEADER_SIZE)
    asm.place(gone)
    w.call("exit_group", 0)


class Shape(msgspec.Struct, frozen=True):
    """What the records of an exec script depend on; its text is all that differs between jobs."""

    share: plan.ShareFiles | None
    programs: int
    landlock: bool
    terminal: bool
    time_namespace: bool

    @classmethod
    def of(cls, steps: tuple[plan.Step, ...]) -> Shape:
        share = steps[0] if isinstance(steps[0], plan.ShareFiles) else None
        last = steps[-1]
        assert isinstance(last, plan.Exec)
        return cls(share, len(last.programs), last.landlock, last.terminal, last.time_namespace)


def exec_script(arch: str, exec_plan: plan.ExecPlan) -> tuple[Image, bytes]:
    """The script of one job, and the image of its shape, whose records it has.

    The image is assembled once per shape; a job's own text follows it, and the few arguments that
    point there are patched in.
    """
    *_, change_dir, last = exec_plan.steps
    assert isinstance(change_dir, plan.ChangeDir)
    assert isinstance(last, plan.Exec)
    image = exec_image(arch, Shape.of(exec_plan.steps))
    start = EXEC + -(-len(image.content) // 8) * 8
    strings = (change_dir.path, *last.programs, *last.argv, *last.env)
    text = b"\0".join((*strings, b""))
    ends = accumulate(len(string) + 1 for string in strings)
    addresses = [start, *(start + end for end in ends)][: len(strings)]
    argv_at = 1 + len(last.programs)
    env_at = argv_at + len(last.argv)
    pointers = (*addresses[argv_at:env_at], 0, *addresses[env_at:], 0)
    table = start + -(-len(text) // 8) * 8
    values = {"cwd": addresses[0], "argv": table, "env": table + 8 * (len(last.argv) + 1)}
    values |= {f"program{n}": address for n, address in enumerate(addresses[1:argv_at])}
    content = b"".join(
        (
            image.patched({name: values[name.partition(".")[0]] for name in image.marks}).ljust(
                start - EXEC, b"\0"
            ),
            text.ljust(table - start, b"\0"),
            struct.pack(f"<{len(pointers)}Q", *pointers),
        )
    )
    if len(content) > MAX_EXEC:
        raise JobError("argv and environment are too large",
                       hint=f"no more than {MAX_EXEC >> 20} MiB together")  # fmt: skip
    return image, content


@lru_cache(maxsize=256)
def exec_image(arch: str, shape: Shape) -> Image:
    """The records every job of this shape has; marks `cwd argv env program0 ...` take its text."""
    asm = Assembler(EXEC)
    w = Writer(arch, asm)
    start = asm.place(asm.label())
    _own_failures(w, NO_PROGRAM)
    asm.tag = 0
    if shape.share is not None:
        _share_files(w, shape.share)
        asm.tag = 1
    w.mark("cwd", w.call("chdir", 0).field("a0"))
    asm.tag += 1
    _execute(w, shape)
    return asm.finish((start,))


def _hand_over(w: Writer, path: str, flags: int) -> None:
    """Open a path and send its descriptor to the supervisor."""
    part = w.asm.words((w.asm.data(FILES), 8))
    rights = w.asm.words((16 + 4, SOL_SOCKET | SCM_RIGHTS << 32, 0))
    message = w.asm.words((0, 0, part, 1, rights, 24, 0))
    w.call("openat", AT_FDCWD, w.path(path), flags, 0, store=rights + 16)
    w.call("sendmsg", SOCKET, message, MSG_NOSIGNAL)


def _share_files(w: Writer, step: plan.ShareFiles) -> None:
    asm = w.asm
    _hand_over(w, step.directory, O_DIRECTORY[w.arch] | O_CLOEXEC)
    if step.wait:
        gone, on = asm.label(), asm.label()
        w.call(
            "recvfrom", SOCKET, asm.data(bytes(8)), 8, MSG_WAITALL, 0, 0,
            when=Condition.ZERO, target=gone,
        )  # fmt: skip
        asm.jump(on)
        asm.place(gone)
        w.call("exit_group", 0)
        asm.place(on)


def _execute(w: Writer, shape: Shape) -> None:
    asm = w.asm
    first = first_job_descriptor(shape.landlock)
    # struct of messages.Ended: magic, status, start, end, rusage, statfs, our own CPU time
    report = asm.data(
        ENDED + struct.pack("<q", Ended.NO_STATUS) + bytes(Ended.FORM.size - 16), align=16
    )
    main = asm.cell()
    child = asm.label()
    w.call("clock_gettime", CLOCK_MONOTONIC, report + 16)
    # A time namespace may not be entered by a child that shares memory (kernel/fork.c).
    flags = SIGCHLD | (0 if shape.time_namespace else CLONE_VM | CLONE_VFORK)
    w.call("clone", flags, 0, 0, 0, 0, store=main, when=Condition.ZERO, target=child)
    w.call("close_range", FIRST_DESCRIPTOR, 0xFFFFFFFF, 0)
    # The job runs by now; what only its start needed is no longer charged to it.
    w.call("madvise", SETUP, MAX_SETUP, MADV_DONTNEED, ignore=True)
    if shape.programs < FEW:
        w.call("madvise", EXEC + RECORDS, MAX_EXEC - RECORDS, MADV_DONTNEED, ignore=True)
    _reap(w, main, report)
    asm.place(child)
    _become_program(w, shape, first)


def _reap(w: Writer, main: Label, report: Label) -> None:
    asm = w.asm
    waited = asm.cell(SIG_BLOCK_ALL & (1 << SIGCHLD - 1 | 1 << SIGNAL_STOP - 1))
    stop = asm.cell(SIGNAL_STOP)
    sleep, reap, found, finish, last, done = (asm.label() for _ in range(6))
    asm.place(sleep)
    w.call(
        "rt_sigtimedwait", waited, 0, 0, 8, ignore=True,
        when=Condition.EQUAL, compare=stop, target=finish,
    )  # fmt: skip
    asm.place(reap)
    # The status lands in `found`, a constant that copies it if it was the program's.
    none, no_child = asm.label(), asm.label()
    w.call(
        "wait4", -1, found.field("a0"), WNOHANG | WALL, 0, ignore=True, store=none.field("a0"),
        when=Condition.EQUAL, compare=main, target=found,
    )  # fmt: skip
    asm.place(none)
    asm.emit(NO_CALL, 0, store=no_child.field("a0"), when=Condition.ZERO, target=sleep)
    asm.place(no_child)
    asm.emit(NO_CALL, 0, when=Condition.NEGATIVE, target=finish)
    asm.jump(reap)
    asm.place(found)
    # It may be a stop and no end: the program can make init its tracer (PTRACE_TRACEME). Then it is
    # still there, is killed like all others, and what is told is how it ended, below. After an end
    # no other process gets its number: pids that small are given once (alloc_pid in kernel/pid.c).
    asm.emit(NO_CALL, 0, store=report + 8)
    asm.place(finish)
    w.call("clock_gettime", CLOCK_MONOTONIC, report + 32)
    # Orphans become init's children, so who has none is alone. Only who is not looks at every
    # process of the machine for those to kill (kernel/signal.c).
    w.call(
        "waitid", P_ALL, 0, 0, WEXITED | WNOHANG | WNOWAIT | WALL, 0, ignore=True,
        when=Condition.NEGATIVE, target=done,
    )  # fmt: skip
    w.call("kill", -1, SIGKILL, ignore=True)
    copy, over = asm.label(), asm.label()
    asm.place(last)
    w.call(
        "wait4", -1, copy.field("a0"), WALL, 0, ignore=True, store=over.field("a0"),
        when=Condition.EQUAL, compare=main, target=copy,
    )  # fmt: skip
    asm.place(over)
    asm.emit(NO_CALL, 0, when=Condition.NEGATIVE, target=done)
    asm.jump(last)
    asm.place(copy)
    asm.emit(NO_CALL, 0, store=report + 8, when=Condition.ALWAYS, target=last)
    asm.place(done)
    w.call("getrusage", RUSAGE_CHILDREN, report + 48)
    w.call("statfs", w.path("/tmp"), report + 192, ignore=True)
    w.call("clock_gettime", CLOCK_PROCESS_CPUTIME_ID, report + Ended.OWN_CPU)
    w.call("sendto", SOCKET, report, Ended.FORM.size, MSG_NOSIGNAL, 0, 0, ignore=True)
    # Whoever woke the supervisor on its own CPU must leave that to it, and exit when it is done.
    w.call("ppoll", asm.words((SOCKET | POLLRDHUP << 32,)), 1, 0, 0, 0, ignore=True)
    w.call("exit_group", 0)


def _become_program(w: Writer, shape: Shape, first: int) -> None:
    asm = w.asm
    w.call("setsid")
    for target in range(3):
        w.call("dup3", first + target, target, 0)
    if shape.terminal:
        w.call("ioctl", 0, TIOCSCTTY, 0)
    if shape.landlock:
        w.call("landlock_restrict_self", RULESET, 0)
    w.call("rt_sigprocmask", SIG_SETMASK, asm.cell(0), 0, 8)
    # The socket stays until execve closes it, so that a failure can still be told.
    w.call("close_range", SOCKET, 0xFFFFFFFF, CLOSE_RANGE_CLOEXEC)
    not_there = asm.cell(ENOENT)
    for number in range(shape.programs - 1):
        # Tried once to see whether it is there; any other failure is the one to tell.
        following = asm.label()
        _execve(w, number, w.call(
            "execve", 0, 0, 0, ignore=True,
            when=Condition.EQUAL, compare=not_there, target=following,
        ))  # fmt: skip
        _execve(w, number, w.call("execve", 0, 0, 0))
        asm.place(following)
    _execve(w, shape.programs - 1, w.call("execve", 0, 0, 0))


def _execve(w: Writer, number: int, record: Label) -> None:
    for argument, name in (("a0", f"program{number}"), ("a1", "argv"), ("a2", "env")):
        w.mark(name, record.field(argument))
