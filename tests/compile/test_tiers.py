"""The kernel's word: programs loaded into real processes, victims and well-behaved ones alike."""

from __future__ import annotations

import os
import platform
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from sandboxd.compile import numbers, seccomp
from sandboxd.policy import Argument, Rule, Syscalls
from tests.compile.tiers import TIERS

ARCH = platform.machine()
if ARCH not in numbers.ARCHITECTURES:
    pytest.skip(f"needs x86_64 or aarch64, not {ARCH}", allow_module_level=True)

# Loads the programs of a file (hexadecimal, one a line), then becomes another command.
LOADER = """
import ctypes, os, sys
libc = ctypes.CDLL(None, use_errno=True)
class Program(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("code", ctypes.c_char_p)]
PR_SET_NO_NEW_PRIVS, SECCOMP_SET_MODE_FILTER = 38, 1
def load(path, number):
    with open(path) as file:
        programs = [bytes.fromhex(line) for line in file]
    libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    for code in programs:
        program = ctypes.byref(Program(len(code) // 8, code))
        if libc.syscall(number, SECCOMP_SET_MODE_FILTER, 0, program):
            sys.exit(f"seccomp: {os.strerror(ctypes.get_errno())}")
load(sys.argv[1], int(sys.argv[2]))
"""
EXECUTE = LOADER + "os.execvp(sys.argv[3], sys.argv[3:])\n"
# Makes system calls and says what came of each: 0, or the errno.
CALL = (
    LOADER
    + """
for text in sys.argv[3:]:
    number, *args = map(int, text.split(","))
    ctypes.set_errno(0)
    libc.syscall(ctypes.c_long(number), *(ctypes.c_ulong(one) for one in args))
    print(ctypes.get_errno(), end=" ", flush=True)
"""
)

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def under(tmp_path: Path) -> Run:
    """Runs a command, or with `code` another end of the loader, under a policy's programs."""

    def run(policy: Syscalls, *argv: str, code: str = EXECUTE) -> subprocess.CompletedProcess[str]:
        programs = tmp_path / "programs"
        programs.write_text("\n".join(program.hex() for program in seccomp.programs(policy, ARCH)))
        number = str(numbers.table(ARCH)["seccomp"])
        return subprocess.run(
            (sys.executable, "-I", "-c", code, str(programs), number, *argv),
            cwd=tmp_path,
            env={"PATH": os.environ["PATH"], "HOME": str(tmp_path), "TMPDIR": str(tmp_path)},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    return run


def call(name: str, *args: int) -> str:
    return ",".join(map(str, (numbers.table(ARCH)[name], *args)))


# -- victims


def test_a_call_on_the_kill_list_is_the_last(under: Run) -> None:
    policy = Syscalls(kill=("getpgid",))
    done = under(policy, call("getppid"), call("getpgid"), call("getppid"), code=CALL)
    assert (done.returncode, done.stdout) == (-signal.SIGSYS, "0 ")


@pytest.mark.skipif(ARCH != "x86_64", reason="x32 is a 32-bit ABI of x86-64")
@pytest.mark.parametrize("name", TIERS)
def test_an_x32_call_is_the_last(under: Run, name: str) -> None:
    done = under(TIERS[name], f"{1 << 30 | 39}", code=CALL)
    assert (done.returncode, done.stdout) == (-signal.SIGSYS, "")


@pytest.mark.parametrize("name", TIERS)
def test_attacks_get_an_errno(under: Run, name: str) -> None:
    attacks = {
        call("clone", 1 << 28 | 17): 1,  # NEWUSER
        call("unshare", 1 << 28): 1,
        call("clone3", 0, 0): 38,
        call("io_uring_setup", 1, 0): 38,
        call("mount", 0, 0, 0, 0, 0): 1,
        call("bpf", 0, 0, 0): 1,
        call("keyctl", 0, 0): 1,
        call("socket", 38, 5, 0): 97,
        call("socket", 2, 3, 1): 97,
        call("socket", 16, 3, 12): 97,
        call("ioctl", 0, 0x5412, 0): 1,
        call("ioctl", 0, 1 << 32 | 0x5412, 0): 1,
        call("fcntl", 0, 1024, 0): 1,
        call("personality", 8): 1,
        "600": 38,
        "-1": 38,
    }
    done = under(TIERS[name], *attacks, code=CALL)
    assert done.returncode == 0, done.stderr
    assert dict(zip(attacks, map(int, done.stdout.split()), strict=True)) == attacks


def test_all_comparisons_in_the_kernel(under: Run) -> None:
    """What the simulator says about 64-bit comparisons, the kernel says, too."""
    big = 5 << 32 | 7
    cases: list[tuple[str, int, int, bool]] = [
        ("eq", big, big, True), ("eq", big, 7, False), ("ne", big, 7, True),
        ("gt", big, 6 << 32, True), ("gt", big, big, False), ("ge", big, big, True),
        ("ge", big, 5 << 32 | 6, False), ("lt", big, 5 << 32 | 6, True), ("lt", big, big, False),
        ("le", big, 4 << 32 | 9, True), ("le", big, 5 << 32 | 8, False),
        ("any_bits", 1 << 40 | 1, 1 << 40, True), ("any_bits", 1 << 40, 1, False),
        ("no_bits", 1 << 40 | 1, 1 << 41, True), ("no_bits", 1 << 40, 1 << 40, False),
    ]  # fmt: skip
    for op, value, seen, wanted in cases:
        argument = Argument(index=4, op=op, value=value, width=64)  # type: ignore[arg-type]
        rules = (Rule(calls=("getppid",), args=(argument,), action="eafnosupport"),)
        done = under(Syscalls(rules=rules), call("getppid", 0, 0, 0, 0, seen), code=CALL)
        assert done.stdout == ("97 " if wanted else "0 "), (op, value, seen, done.stderr)


def test_several_programs_add_up(under: Run) -> None:
    rules = tuple(
        Rule(calls=(one,), args=(Argument(index=5, op="eq", value=at << 33, width=64),))
        for one, order in (("getppid", 1), ("getpgid", -1))  # calls with the same rules share them
        for at in range(600)[::order]
    )
    policy = Syscalls(rules=rules, enosys=("getppid", "getpgid"))
    assert len(seccomp.programs(policy, ARCH)) > 1
    asked = [call(one, 0, 0, 0, 0, 0, value) for one in ("getppid", "getpgid") for value in (0, 1)]
    done = under(policy, *asked, code=CALL)
    assert done.stdout == "0 38 0 38 ", done.stderr


RAW_CALLS = r"""
#include <stdio.h>
static long old(long number, long a, long b, long c) {
    long result;
    __asm__ volatile("int $0x80" : "=a"(result) : "a"(number), "b"(a), "c"(b), "d"(c) : "memory");
    return result;
}
int main(void) {
    printf("%d ", old(20, 0, 0, 0) > 0);
    printf("%ld %ld %ld\n", old(102, 1, 0, 0), old(120, 1 << 28, 0, 0), old(359, 38, 5, 0));
}
"""


@pytest.mark.skipif(ARCH != "x86_64", reason="int 0x80 is x86's")
@pytest.mark.needs("gcc")
def test_i386_calls_are_killed_or_held_by_the_same_rules(under: Run, tmp_path: Path) -> None:
    """getpid, socketcall, clone(CLONE_NEWUSER) and socket(AF_ALG) by the 32-bit entrance."""
    (tmp_path / "old.c").write_text(RAW_CALLS)
    subprocess.run(("gcc", "-o", "old", "old.c"), cwd=tmp_path, check=True)
    program = str(tmp_path / "old")
    if subprocess.run((program,), capture_output=True, check=False).returncode < 0:
        pytest.skip("needs a kernel with CONFIG_IA32_EMULATION")
    for name in ("base", "judge", "ci"):
        assert under(TIERS[name], program).returncode == -signal.SIGSYS
    assert under(TIERS["shell"], program).stdout == "1 -38 -1 -97\n"


# -- programs

PYTHON = """
import asyncio, fcntl, multiprocessing, os, resource, shutil, socket, sqlite3, tempfile, threading
def square(n): return n * n
if __name__ == "__main__":
    with multiprocessing.get_context("fork").Pool(2) as pool: print(pool.map(square, range(4)))
    thread = threading.Thread(target=print, args=("thread",)); thread.start(); thread.join()
    async def main():
        process = await asyncio.create_subprocess_exec("echo", "process"); await process.wait()
        server = await asyncio.start_server(lambda reader, writer: writer.close(), "127.0.0.1", 0)
        reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
        await reader.read(); writer.close(); server.close()
    asyncio.run(main())
    with open("a", "wb") as file: file.write(bytes(1 << 20))
    shutil.copy("a", "b"); print(os.path.getsize("b"))
    with open("a") as file: fcntl.flock(file, fcntl.LOCK_EX)
    base = sqlite3.connect("base.db")
    base.execute("create table t(n)"); base.executemany("insert into t values(?)", [(1,), (2,)])
    base.commit(); print(*base.execute("select sum(n) from t").fetchone()); base.close()
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
"""

THREADS = r"""
#include <cstdio>
#include <thread>
int main() { std::thread one([] { puts("thread"); }); one.join(); }
"""

JAVA = """
public class Threads {
    public static void main(String[] args) throws Exception {
        Thread thread = new Thread(() -> System.out.println("thread"));
        thread.start();
        thread.join();
    }
}
"""

GIT = (
    "git init -q . && echo x > file && git add file"
    " && git -c user.name=n -c user.email=n@example.org commit -q -m message && git log --format=%s"
)

PROGRAMS = {
    "perl": (("perl", "-e", 'print fork() ? (wait, "parent\\n")[1] : exit'), "parent\n"),
    "git": (("sh", "-c", GIT), "message\n"),
    "sqlite3": (("sqlite3", "base.db", "create table t(n); insert into t values(7);"
                 " select n from t;"), "7\n"),
    "node": (("node", "-e", "console.log('node')"), "node\n"),
    "sort": (("sh", "-c", "seq 100000 | sort -n | tail -n 1; cat /proc/self/comm | tr a-z A-Z"),
             "100000\nCAT\n"),
}  # fmt: skip


def well(done: subprocess.CompletedProcess[str], output: str) -> None:
    assert (done.returncode, done.stdout) == (0, output), done.stderr


@pytest.mark.parametrize("name", TIERS)
@pytest.mark.parametrize("program", PROGRAMS)
def test_programs_run(under: Run, name: str, program: str) -> None:
    if shutil.which(program) is None:
        pytest.skip(f"needs {program}")
    argv, output = PROGRAMS[program]
    well(under(TIERS[name], *argv), output)


@pytest.mark.parametrize("name", TIERS)
def test_python_runs(under: Run, tmp_path: Path, name: str) -> None:
    (tmp_path / "program.py").write_text(PYTHON)
    done = under(TIERS[name], sys.executable, "-Iu", "program.py")
    well(done, "[0, 1, 4, 9]\nthread\nprocess\n1048576\n3\n")


@pytest.mark.needs("g++")
@pytest.mark.parametrize("name", TIERS)
@pytest.mark.parametrize("sanitizer", ["", "address", "undefined", "thread"])
def test_compiling_and_running_runs(under: Run, tmp_path: Path, name: str, sanitizer: str) -> None:
    """Sanitizers die if they cannot set RLIMIT_CORE to 0; LeakSanitizer needs ptrace."""
    (tmp_path / "threads.cpp").write_text(THREADS)
    flags = [f"-fsanitize={sanitizer}"] if sanitizer else []
    built = under(TIERS[name], "g++", *flags, "-o", "threads", "threads.cpp", "-pthread")
    if sanitizer and "cannot find" in built.stderr:
        pytest.skip(f"needs the {sanitizer} sanitizer")
    well(built, "")
    well(under(TIERS[name], "env", "ASAN_OPTIONS=detect_leaks=0", "./threads"), "thread\n")


@pytest.fixture(scope="module")
def java_class(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if shutil.which("javac") is None:
        pytest.skip("needs javac")
    top = tmp_path_factory.mktemp("java")
    (top / "Threads.java").write_text(JAVA)
    subprocess.run(("javac", "Threads.java"), cwd=top, check=True)
    return top


@pytest.mark.needs("java")
@pytest.mark.parametrize("name", TIERS)
def test_java_runs_and_prints_nothing_else(under: Run, java_class: Path, name: str) -> None:
    """A flock that fails makes the JVM warn on stdout, where a judge looks for the answer."""
    well(under(TIERS[name], "java", "-cp", str(java_class), "Threads"), "thread\n")


@pytest.mark.parametrize("name", ["ci", "shell"])
@pytest.mark.parametrize("argv", [
    ("strace", "-f", "-o", "log", "sh", "-c", "echo out"),
    ("gdb", "-nx", "-q", "-batch", "-ex", "run", "--args", "echo", "out"),
])  # fmt: skip
def test_debuggers_run_where_they_may(under: Run, name: str, argv: tuple[str, ...]) -> None:
    if shutil.which(argv[0]) is None:
        pytest.skip(f"needs {argv[0]}")
    done = under(TIERS[name], *argv)
    assert done.returncode == 0, done.stderr
    assert "out\n" in done.stdout
    assert "randomization" not in done.stderr


@pytest.mark.parametrize("name", ["base", "judge"])
def test_debuggers_do_not_where_they_may_not(under: Run, name: str) -> None:
    ptrace_traceme = call("ptrace", 0, 0, 0, 0)
    assert under(TIERS[name], ptrace_traceme, code=CALL).stdout == "1 "
