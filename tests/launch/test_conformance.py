"""One suite for everything that carries out launch scripts: each behaves as record.py says."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import struct
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

import sandboxd
from sandboxd.script import elf, machine
from sandboxd.script.command import command
from sandboxd.script.numbers import numbers
from sandboxd.script.record import (
    BASE,
    CODE,
    NO_CALL,
    RECORD_SIZE,
    Assembler,
    Condition,
    Image,
    Label,
    Operand,
    Record,
)

ROOT = str(Path(sandboxd.__file__).parents[1])
HOST = os.uname().machine
MEMFD_NOEXEC = Path("/proc/sys/vm/memfd_noexec")

# Calls that no script of sandboxd makes, but these do.
MORE_NUMBERS = {
    "x86_64": {"chroot": 161, "lseek": 8, "mmap": 9, "vfork": 58},
    "aarch64": {"chroot": 51, "lseek": 62, "mmap": 222},
}

CLONE_VM, CLONE_VFORK, CLONE_NEWUSER = 0x100, 0x4000, 0x10000000
AT_FDCWD = -100
FAILED = 99


@dataclass(frozen=True)
class Executor:
    """One way to carry out scripts: the machine of an architecture, or Python."""

    name: str

    @property
    def arch(self) -> str:
        return HOST if self.name == "python" else self.name

    def missing(self) -> str | None:
        if self.arch not in machine.ARCHITECTURES:
            return f"these tests know no system calls of {self.arch}"
        if self.arch != HOST and not shutil.which(f"qemu-{self.arch}"):
            return f"qemu-{self.arch} is not installed"
        if self.name != "python" and MEMFD_NOEXEC.exists() and MEMFD_NOEXEC.read_text() != "0\n":
            return f"{MEMFD_NOEXEC} forbids it"
        return None

    @property
    def hosted(self) -> bool:
        """Whether an interpreter or emulator is in the process, too."""
        return self.name != HOST

    @contextmanager
    def start(
        self, image: Image, pass_fds: Sequence[int] = ()
    ) -> Iterator[subprocess.Popen[bytes]]:
        """A process carrying the image out, with pipes; killed and reaped if it is still there."""
        with open(os.memfd_create("script", 0), "wb", buffering=0) as file:
            if self.name == "python":
                file.write(image.content)
                argv = command(ROOT, file.fileno(), image.memory)
            else:
                file.write(elf.program(self.arch, image.content, image.memory))
                emulator = [] if self.arch == HOST else [f"qemu-{self.arch}"]
                argv = [*emulator, f"/proc/self/fd/{file.fileno()}"]
            pipe, fds = subprocess.PIPE, (file.fileno(), *pass_fds)
            with subprocess.Popen(argv, stdin=pipe, stdout=pipe, pass_fds=fds, env={}) as process:
                try:
                    yield process
                finally:
                    process.kill()


class Script(Assembler):
    """An assembler that knows its executor's calls, and a handler that reports and exits."""

    def __init__(self, executor: Executor) -> None:
        super().__init__()
        self.executor = executor
        self.nr = {**numbers(executor.arch), **MORE_NUMBERS[executor.arch]}
        self.handler = self.label()

    def call(self, name: str, *args: Operand) -> Label:
        return self.emit(self.nr[name], *args)

    def write(self, content: bytes) -> Label:
        return self.call("write", 1, self.data(content), len(content))

    def exit(self, code: Operand = 0) -> Label:
        return self.call("exit_group", code)

    def exit_at(self, there: Label) -> None:
        """The end: 2 if it is reached by going on at the label, 1 if by just going on."""
        self.exit(1)
        self.place(there)
        self.exit(2)

    def image(self) -> Image:
        """Close the script with its handler, which writes the failed record to stdout."""
        self.place(self.handler)
        report = self.call("write", 1, 0, RECORD_SIZE)
        self.exit(FAILED)
        return self.finish([self.handler, report.field("a1"), BASE + 64])

    def run(
        self, given: bytes = b"", *, image: Image | None = None, pass_fds: Sequence[int] = ()
    ) -> tuple[int, bytes]:
        """Carry it out to its end: the exit code, and what was written."""
        with self.executor.start(image or self.image(), pass_fds) as process:
            output, _ = process.communicate(given, timeout=30)
            return process.returncode, output


@pytest.fixture(params=[*machine.ARCHITECTURES, "python"])
def executor(request: pytest.FixtureRequest) -> Executor:
    executor = Executor(request.param)
    if reason := executor.missing():
        pytest.skip(reason)
    return executor


@pytest.fixture
def script(executor: Executor) -> Script:
    return Script(executor)


# -- calls and values


def test_the_exit_code_is_the_scripts(script: Script) -> None:
    script.exit(42)
    assert script.run() == (42, b"")


def test_records_run_in_order(script: Script) -> None:
    for word in (b"one ", b"two ", b"three"):
        script.write(word)
    script.exit()
    assert script.run() == (0, b"one two three")


def test_all_six_arguments_arrive(script: Script, tmp_path: Path) -> None:
    """mmap(2) has six, and none of them can be wrong without being noticed."""
    page = os.sysconf("SC_PAGE_SIZE")
    path = tmp_path / "pages"
    path.write_bytes(bytes(page) + b"the second page".ljust(page, b"."))
    wanted = BASE + 0x1000000
    with path.open("rb") as file:
        show = script.label()
        private_fixed, read = 0x12, 1
        script.emit(
            script.nr["mmap"], wanted, page, read, private_fixed, file.fileno(), page,
            store=show.field("a1"),
        )  # fmt: skip
        script.place(show)
        script.call("write", 1, 0, 15)
        script.exit()
        assert script.run(pass_fds=[file.fileno()]) == (0, b"the second page")


@pytest.mark.parametrize("nr", [NO_CALL, -(2**63)])
def test_a_negative_number_is_no_call_and_no_failure(script: Script, nr: int) -> None:
    cell = script.cell()
    script.emit(nr, -1, store=cell)
    script.call("write", 1, cell, 8)
    script.exit()
    assert script.run() == (0, b"\xff" * 8)


def test_the_result_stays_in_the_record(script: Script) -> None:
    constant = script.emit(NO_CALL, 0x1122334455667788)
    written = script.call("write", 1, constant.field("result"), 8)
    script.call("write", 1, written.field("result"), 8)
    script.exit()
    assert script.run() == (0, struct.pack("<QQ", 0x1122334455667788, 8))


def test_a_result_is_stored_into_a_later_record(script: Script) -> None:
    """A count that read returned is the count that write is given."""
    buffer, show = script.space(100), script.label()
    script.emit(script.nr["read"], 0, buffer, 100, store=show.field("a2"))
    script.place(show)
    script.call("write", 1, buffer, 0)
    script.exit()
    assert script.run(b"eleven byte") == (0, b"eleven byte")


def test_a_record_may_rewrite_itself(script: Script) -> None:
    """Fields are read when their turn comes: this one's flags after its value was stored there."""
    own, there = script.label(), script.label()
    script.place(own)
    always = Condition.ALWAYS << 8
    script.emit(NO_CALL, always, store=own.field("flags"), when=Condition.ZERO, target=there)
    script.exit_at(there)
    assert script.run() == (2, b"")


def test_a_negative_result_below_the_errnos_is_no_failure(script: Script) -> None:
    """Any offset is a valid one in /proc/self/mem (proc(5)), -8192 included."""
    move, negative = script.label(), script.label()
    path = script.string(b"/proc/self/mem")
    script.emit(script.nr["openat"], AT_FDCWD, path, 0, store=move.field("a0"))
    script.place(move)
    seek = script.nr["lseek"]
    script.emit(seek, 0, -8192, os.SEEK_SET, when=Condition.NEGATIVE, target=negative)
    script.exit(1)
    script.place(negative)
    script.call("write", 1, move.field("result"), 8)
    script.exit()
    assert script.run() == (0, struct.pack("<q", -8192))


# -- conditions


# Condition, values for which it holds, values for which it does not.
CONDITIONS: list[tuple[int, list[int], list[int]]] = [
    (Condition.NEVER, [], [0, -1]),
    (Condition.ZERO, [0], [1, 2**32, -1]),
    (Condition.NONZERO, [1, 2**32, -1], [0]),
    (Condition.EQUAL, [0x500000007], [0, 7, 0x500000000]),
    (Condition.ALWAYS, [0, 1, -5], []),
    (Condition.NEGATIVE, [-1, -(2**63)], [0, 1, 2**31]),
    (6, [], [0, -1]),
    (255, [], [0, -1]),
]


@pytest.mark.parametrize(
    ("condition", "value", "holds"),
    [(which, value, True) for which, values, _ in CONDITIONS for value in values]
    + [(which, value, False) for which, _, values in CONDITIONS for value in values],
)
def test_a_condition_decides_where_to_go_on(
    script: Script, condition: int, value: int, holds: bool
) -> None:
    """The flags are stored by a record before, so that undefined conditions can be tried too."""
    decide, there = script.label(), script.label()
    script.emit(NO_CALL, condition << 8, store=decide.field("flags"))
    script.place(decide)
    compare = script.cell(0x500000007)
    script.emit(NO_CALL, value, when=Condition.EQUAL, compare=compare, target=there)
    script.exit_at(there)
    assert script.run() == (2 if holds else 1, b"")


def test_equal_compares_with_what_stands_there_now(script: Script) -> None:
    """The cell is 0 in the image, and only at run time the parent's id."""
    getppid = script.nr["getppid"]
    cell, there = script.cell(), script.label()
    script.emit(getppid, store=cell)
    script.emit(getppid, when=Condition.EQUAL, compare=cell, target=there)
    script.exit_at(there)
    assert script.run() == (2, b"")


def test_a_loop_runs_until_its_condition_ends_it(script: Script) -> None:
    """cat, a byte at a time: more rounds than a machine that leaves anything behind survives."""
    again, end, byte = script.label(), script.label(), script.cell()
    script.place(again)
    read = script.nr["read"]
    script.emit(read, 0, byte, 1, when=Condition.ZERO, target=end)
    script.call("write", 1, byte, 1)
    script.jump(again)
    script.place(end)
    script.exit(3)
    given = bytes(range(256)) * 8
    assert script.run(given) == (3, given)


# -- failures


def test_a_failure_goes_to_the_handler_with_the_record(script: Script) -> None:
    path = script.string(b"/no/such/file")
    script.write(b"before ")
    script.emit(script.nr["openat"], AT_FDCWD, path, 0, tag=7)
    script.write(b"never")
    image = script.image()
    code, output = script.run(image=image)
    assert (code, output[:7]) == (FAILED, b"before ")
    assert Record.unpack(output[7:]) == image.record(1)._replace(result=-2)


def test_the_error_cell_tells_which_record_failed(script: Script) -> None:
    """A handler that writes the address; index and tag come from the image outside."""
    cell, handler = script.cell(), script.label()
    script.tag = 1
    script.write(b"")
    script.call("write", -1, 0, 0)
    script.tag = 2
    script.exit()
    script.place(handler)
    script.call("write", 1, cell, 8)
    script.exit(FAILED)
    image = script.finish([handler, cell, BASE + 64])
    code, output = script.run(image=image)
    (address,) = struct.unpack("<Q", output)
    assert (code, address) == (FAILED, image.address(1))
    assert (image.number(address), image.tag(address)) == (1, 1)


def test_a_failure_takes_precedence_over_the_condition(script: Script) -> None:
    there = script.label()
    write = script.nr["write"]
    script.emit(write, -1, 0, 0, when=Condition.ALWAYS, target=there)
    script.place(there)
    script.exit(1)
    assert script.run()[0] == FAILED


def test_the_value_of_a_failed_call_is_stored_too(script: Script) -> None:
    """Into the exit code of the handler, which is carried out next."""
    handler, leave = script.label(), script.label()
    script.emit(script.nr["write"], -1, 0, 0, store=leave.field("a0"))
    script.exit(1)
    script.place(handler)
    script.place(leave)
    script.exit(2)
    image = script.finish([handler, script.cell(), BASE + 64])
    assert script.run(image=image) == (-9 & 0xFF, b"")


def test_an_ignored_failure_is_a_value_like_any_other(script: Script) -> None:
    write, cell, there = script.nr["write"], script.cell(), script.label()
    script.emit(write, -1, 0, 0, ignore=True, store=cell)
    script.emit(write, 1, cell, 8)
    script.emit(write, -1, 0, 0, ignore=True, when=Condition.NEGATIVE, target=there)
    script.exit_at(there)
    assert script.run() == (2, struct.pack("<q", -9))


# -- processes


def forking(executor: Executor) -> Iterator[Script]:
    """A script for each form of fork and vfork there is; what is emitted next is the child's.

    The parent waits for its child by the id it was given, writes the status and exits.
    """
    nr = Script(executor).nr
    forks = [(nr["clone"], signal.SIGCHLD), (nr["clone"], CLONE_VM | CLONE_VFORK | signal.SIGCHLD)]
    if "vfork" in nr:
        forks.append((nr["vfork"], 0))
    for number, flags in forks:
        script = Script(executor)
        child, wait, status = script.label(), script.label(), script.cell()
        script.emit(number, flags, store=wait.field("a0"), when=Condition.ZERO, target=child)
        script.place(wait)
        script.call("wait4", 0, status, 0, 0)
        script.call("write", 1, status, 4)
        script.exit()
        script.place(child)
        yield script


def test_a_child_goes_on_in_the_same_script(executor: Executor) -> None:
    """It runs the loop for a while, which in the parent's memory must not disturb the parent."""
    for script in forking(executor):
        for _ in range(20):
            script.write(b"child ")
        script.exit(7)
        assert script.run() == (0, b"child " * 20 + struct.pack("<i", 7 << 8))


def test_a_child_executes_a_program(executor: Executor) -> None:
    for script in forking(executor):
        words = [script.string(word) for word in (b"/bin/sh", b"-c", b"echo $GREETING; exit 3")]
        environment = script.pointers([script.string(b"GREETING=hello")])
        script.call("execve", words[0], script.pointers(words), environment)
        assert script.run() == (0, b"hello\n" + struct.pack("<i", 3 << 8))


def test_a_failure_in_a_child_is_the_childs(executor: Executor) -> None:
    for script in forking(executor):
        script.call("execve", script.string(b"/no/such/program"), 0, 0)
        code, output = script.run()
        assert (code, Record.unpack(output[:RECORD_SIZE]).errno) == (0, 2)
        assert output[RECORD_SIZE:] == struct.pack("<i", FAILED << 8)


def test_signals_act_as_after_exec(script: Script) -> None:
    """Nobody reads: SIGPIPE's default is to end the process, and Python's way is to ignore it."""
    reader, writer = os.pipe()
    os.close(reader)
    try:
        script.call("write", writer, script.data(b"x"), 1)
        code, _ = script.run(pass_fds=[writer])
    finally:
        os.close(writer)
    assert code == -signal.SIGPIPE


def test_no_descriptor_is_added(script: Script) -> None:
    """All there is while it runs: stdio, and what was passed; to Python not even the image."""
    script.write(b"!")
    script.call("read", 0, script.space(1), 1)
    script.exit()
    with script.executor.start(script.image()) as process:
        assert process.stdout is not None
        assert process.stdout.read(1) == b"!"
        held = os.listdir(f"/proc/{process.pid}/fd")
        targets = {os.readlink(f"/proc/{process.pid}/fd/{fd}") for fd in held if int(fd) > 2}
        process.communicate(b"x", timeout=30)
    assert {target for target in targets if "memfd:script" not in target} == set()
    assert script.executor.name != "python" or not targets


@pytest.mark.needs("userns")
def test_the_root_may_go_away(script: Script, tmp_path: Path) -> None:
    """Whatever an executor needs it has loaded: all kinds of records work in an empty root."""
    if script.executor.arch != HOST:
        pytest.skip("the emulator has a thread, so unshare(CLONE_NEWUSER) is EINVAL")
    child = script.label()
    script.call("unshare", CLONE_NEWUSER)
    script.call("chroot", script.string(bytes(tmp_path)))
    script.emit(script.nr["clone"], signal.SIGCHLD, when=Condition.ZERO, target=child)
    script.call("wait4", -1, 0, 0, 0)
    script.call("execve", script.string(b"/bin/sh"), 0, 0)
    script.place(child)
    script.write(b"child")
    script.exit()
    code, output = script.run()
    assert (code, output[:5], Record.unpack(output[5:]).errno) == (FAILED, b"child", 2)


# -- memory


def test_a_message_is_received_into_a_record(script: Script) -> None:
    """A length that comes over a socket lands in the next record's a2, the text elsewhere."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        text, show = script.space(64), script.label()
        vector = script.words([show.field("a2"), 8, text, 64])
        message = script.words([0, 0, vector, 2, 0, 0, 0])
        script.call("recvmsg", theirs.fileno(), message, 0)
        script.place(show)
        script.call("write", 1, text, 0)
        script.exit()
        ours.send(struct.pack("<Q", 5) + b"hello, world")
        assert script.run(pass_fds=[theirs.fileno()]) == (0, b"hello")


def test_a_script_that_arrives_later_is_carried_out(script: Script) -> None:
    """The zygote's way: a blob with an origin of its own is read into memory and jumped to."""
    origin = CODE + 0x100000
    script.space(0x1000, align=0x100000)
    script.call("read", 0, origin, 0x1000)
    script.jump(origin)
    script.exit(4)
    image = script.image()
    blob = Assembler(origin)
    text = blob.data(b"from the blob")
    blob.emit(script.nr["write"], 1, text, 13)
    blob.jump(image.address(2))
    assert image.memory == origin - BASE + 0x1000
    assert script.run(image=image, given=blob.finish().content) == (4, b"from the blob")


def test_space_is_zero_and_costs_nothing_untouched(script: Script) -> None:
    size = 256 << 20
    space = script.space(size)
    script.call("write", 1, space, 8)
    script.call("write", 1, space + (size - 8), 8)
    script.call("read", 0, space + size // 2, 1)
    script.exit()
    image = script.image()
    assert len(image.content) < 4096
    with script.executor.start(image) as process:
        assert process.stdout is not None
        assert process.stdout.read(16) == bytes(16)
        status = Path(f"/proc/{process.pid}/status").read_text()
        (resident,) = (line.split()[1] for line in status.splitlines() if "VmRSS" in line)
        assert int(resident) < (size // 1024 // 4 if script.executor.hosted else 128)
        process.communicate(b"x", timeout=30)
        assert process.returncode == 0
