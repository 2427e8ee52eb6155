"""The programs that are run: compiled when the benchmark starts, without libc where that matters.

A libc's start asks the processor who it is, and every such question (cpuid) leaves a virtual
machine: 10 us each, 0.6 ms a program on the machine of docs/explanation/performance.md. That would
be measured again and again, and is no sandbox's doing. /bin/true is measured beside it.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

SOURCE = """
#if defined(__x86_64__)
enum { READ = 0, WRITE = 1, CLONE = 56, EXIT = 60 };
static long call(long number, long a, long b, long c) {
    long value;
    __asm__ volatile("syscall" : "=a"(value) : "0"(number), "D"(a), "S"(b), "d"(c)
                     : "rcx", "r11", "memory");
    return value;
}
#elif defined(__aarch64__)
enum { READ = 63, WRITE = 64, EXIT = 93, CLONE = 220 };
static long call(long number, long a, long b, long c) {
    register long x8 __asm__("x8") = number, x0 __asm__("x0") = a;
    register long x1 __asm__("x1") = b, x2 __asm__("x2") = c;
    __asm__ volatile("svc 0" : "+r"(x0) : "r"(x8), "r"(x1), "r"(x2) : "memory");
    return x0;
}
#endif
void _start(void) {
    char byte = 'x';
#ifdef BURN
    call(CLONE, 17, 0, 0);
    call(CLONE, 17, 0, 0);
    for (;;)
        __asm__ volatile("");
#endif
    call(WRITE, 1, (long)&byte, 1);
#ifdef HOLD
    call(READ, 0, (long)&byte, 1);
#endif
    call(EXIT, 0, 0, 0);
    __builtin_unreachable();
}
"""

PLACE = "/bench"
"""Where the programs lie in every sandbox."""
STATIC = "static"
"""Writes one byte and exits."""
HOLD = "hold"
"""Writes one byte and waits for one on stdin, or its end."""
BURN = "burn"
"""Becomes four processes (SIGCHLD, 17, tells their parent) that never rest."""
DYNAMIC = "/bin/true"


def compile_all(folder: Path) -> str:
    """Puts STATIC, HOLD and BURN there; why not, or ""."""
    folder.chmod(0o755)  # jobs have uids of their own
    compiler = shutil.which("gcc")
    if compiler is None:
        return "no gcc: only /bin/true is measured"
    for name, options in ((STATIC, []), (HOLD, ["-DHOLD"]), (BURN, ["-DBURN"])):
        words = [compiler, "-O2", "-static", "-nostdlib", *options, "-x", "c", "-", "-o", name]
        done = subprocess.run(
            words, cwd=folder, input=SOURCE, text=True, capture_output=True, check=False
        )
        if done.returncode:
            return f"gcc failed: {done.stderr.strip()}"
    return ""
