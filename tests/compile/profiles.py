"""Seccomp profiles of the OCI's, and what engines, crun and libseccomp make of them.

An engine leaves out what does not apply to the machine and the job; crun turns the rest into a
program by libseccomp, and leaves that in its state directory, where it can be read.
"""

from __future__ import annotations

import errno
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sandboxd.cgroup import subtree
from sandboxd.compile import seccomp, syscalls
from sandboxd.policy import Argument, Rule

Json = dict[str, Any]
ALLOW, ERRNO = "SCMP_ACT_ALLOW", "SCMP_ACT_ERRNO"


def compare(index: int, op: str, value: int, second: int | None = None) -> Json:
    found = {"index": index, "op": f"SCMP_CMP_{op}", "value": value}
    return found if second is None else found | {"valueTwo": second}


def rule(names: str, action: str = ALLOW, *args: Json, **more: object) -> Json:
    found: Json = {"names": names.split(), "action": action, **more}
    return found | {"args": list(args)} if args else found


INIT = rule(" ".join(syscalls.members("@init")))
BASE = rule(" ".join(syscalls.members("@base")))

DIALECT: Json = {
    "defaultAction": ERRNO,
    "defaultErrno": "EPERM",
    "archMap": [
        {
            "architecture": "SCMP_ARCH_X86_64",
            "subArchitectures": ["SCMP_ARCH_X86", "SCMP_ARCH_X32"],
        },
        {"architecture": "SCMP_ARCH_AARCH64", "subArchitectures": ["SCMP_ARCH_ARM"]},
        {"architecture": "SCMP_ARCH_RISCV64", "subArchitectures": None},
    ],
    "syscalls": [
        BASE | {"comment": "what programs need"},
        INIT,
        {"name": "flock", "action": ALLOW, "args": None},
        rule("socketcall send recv no_such_call riscv_flush_icache breakpoint"),
        rule("ptrace kcmp", includes={"minKernel": "4.8"}),
        rule("splice", includes={"minKernel": "99.1"}),
        rule("tee", excludes={"minKernel": "4.8"}),
        rule("vmsplice", excludes={"minKernel": "99.1"}),
        rule("socket", ALLOW, compare(0, "NE", 40)),
        *(rule("personality", ALLOW, compare(0, "EQ", one)) for one in (0, 8, 0x20008, 0xFFFFFFFF)),
        rule("modify_ldt", includes={"arches": ["amd64", "x86"]}),
        rule("mbind", includes={"arches": ["s390", "s390x"]}),
        rule("migrate_pages", excludes={"arches": ["amd64"]}),
        rule("clone setns mount", includes={"caps": ["CAP_SYS_ADMIN"]}),
        rule("chroot", includes={"arches": ["amd64"], "caps": ["CAP_SYS_CHROOT"]}),
        rule(
            "clone", ALLOW, compare(0, "MASKED_EQ", 0x7E020000),
            excludes={"caps": ["CAP_SYS_ADMIN"], "arches": ["s390"]},
        ),
        rule("clone3", ERRNO, errnoRet=38, excludes={"caps": ["CAP_SYS_ADMIN"]}),
        rule("keyctl", ERRNO, errno="ENOSYS"),
    ],
}  # fmt: skip
"""As engines are configured with; not one of theirs."""

DENYING: Json = {
    "defaultAction": ALLOW,
    "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86"],
    "flags": ["SECCOMP_FILTER_FLAG_SPEC_ALLOW"],
    "syscalls": [
        rule("mount umount umount2 reboot", ERRNO),
        rule("unshare", ERRNO, compare(0, "NE", 0), errnoRet=22),
        rule("ioctl", ERRNO, compare(1, "EQ", 0x5412)),
        rule("ioctl", "SCMP_ACT_KILL_PROCESS", compare(1, "EQ", 0x541C)),
        rule("socketcall", ERRNO, errnoRet=38),  # or the next two would be at odds in it
        rule("socket", ERRNO, compare(0, "EQ", 16), compare(2, "EQ", 9), errnoRet=22),
        rule("socket", "SCMP_ACT_TRAP", compare(0, "EQ", 38)),
        rule("keyctl", "SCMP_ACT_KILL"),
        rule("add_key", "SCMP_ACT_KILL_THREAD"),
        rule("ptrace", "SCMP_ACT_LOG"),
        rule("bpf", "SCMP_ACT_TRACE", errnoRet=7),
        rule("request_key", "SCMP_ACT_TRACE"),
        rule("msgget", "SCMP_ACT_TRAP", compare(1, "EQ", 0x200)),
        rule("getpid", ALLOW),
    ],
}

ORDER: Json = {
    "defaultAction": ERRNO,
    "defaultErrnoRet": 38,
    "syscalls": [
        INIT,
        rule("clone3", ALLOW, compare(1, "EQ", 88)),
        rule("clone3", ERRNO, errnoRet=1),  # whatever else says
        rule("clone3", ALLOW),  # the first without comparisons counts
        rule("getppid", ERRNO, errnoRet=38),  # as the default: no rule at all
        rule("getppid", ALLOW),
        rule("getpgid", ALLOW),
        rule("getpgid", ERRNO),
        rule("alarm", ERRNO, compare(0, "EQ", 5), errnoRet=38),
        rule("alarm", ALLOW, compare(0, "GE", 5)),
        rule("umask", ALLOW, compare(0, "EQ", 1), compare(0, "EQ", 2)),  # either
        rule("dup2", ALLOW, compare(0, "GT", 1 << 40), compare(0, "LT", 5), compare(1, "EQ", 9)),
        rule("lseek", ALLOW, compare(1, "MASKED_EQ", 0)),  # whatever it is
        rule("flock", ERRNO, compare(1, "MASKED_EQ", 0xF, 0x12)),
        rule("flock", ALLOW, compare(1, "MASKED_EQ", 0xF, 0x3)),
        {"names": ["getuid"], "action": ALLOW, "args": []},
    ],
}

RANGES: Json = {
    "defaultAction": "SCMP_ACT_KILL_PROCESS",
    "syscalls": [
        INIT,
        rule("mmap", ALLOW, compare(1, "LT", 1 << 33), compare(2, "MASKED_EQ", 4, 0)),
        rule("mmap", ERRNO, compare(1, "GE", 1 << 33), errnoRet=12),
        rule("munmap", ALLOW, compare(1, "LE", (5 << 32) + 7)),
        rule("munmap", ERRNO, compare(1, "GT", (5 << 32) + 7)),
        rule("madvise", ALLOW, compare(2, "NE", 12)),
        rule("madvise", ERRNO, compare(2, "EQ", 12), compare(1, "GT", 4096)),
        rule("mremap", ALLOW, compare(0, "NE", 1 << 40), compare(3, "MASKED_EQ", 3 << 32, 1 << 32)),
        rule("brk", ALLOW, compare(0, "GE", 0)),
        rule("mincore", ALLOW, compare(0, "GT", (1 << 64) - 1)),
        rule("msync", ALLOW, compare(5, "EQ", (1 << 64) - 1)),
        rule("pread64 pwrite64", ALLOW, compare(3, "LT", 100)),
        rule("pread64", ALLOW, compare(3, "EQ", 7), compare(2, "EQ", 1)),
    ],
}

MULTIPLEXED: Json = {
    "defaultAction": ERRNO,
    "architectures": ["SCMP_ARCH_X86"],
    "syscalls": [
        INIT,
        rule("socket", ALLOW, compare(0, "EQ", 1)),
        rule("bind", "SCMP_ACT_LOG"),
        rule("accept4", ALLOW, compare(3, "EQ", 0x80000)),
        rule("semget", ALLOW),
        rule("shmat", ERRNO, compare(0, "NE", 3), errnoRet=22),
        rule("personality", ALLOW, compare(0, "EQ", (7 << 32) + 5)),  # of which i386 sees 5
        rule("umask", ALLOW, compare(0, "MASKED_EQ", 7 << 32, 1 << 32)),  # and here nothing
    ],
}

PROFILES = {
    "dialect": DIALECT, "denying": DENYING, "order": ORDER, "ranges": RANGES,
    "multiplexed": MULTIPLEXED,
}  # fmt: skip


def as_given(profile: Json, kernel: tuple[int, int]) -> Json:
    """What an engine hands to crun for a job without capabilities on x86-64."""
    given = {key: value for key, value in profile.items() if key not in ("archMap", "syscalls")}
    for one in profile.get("archMap", ()):
        if one["architecture"] == "SCMP_ARCH_X86_64":
            given["architectures"] = [one["architecture"], *one["subArchitectures"]]
    _numbered(given, "defaultErrno")
    given["syscalls"] = []
    for one in profile["syscalls"]:
        if _applies(one.get("includes"), kernel, {True}) and _applies(
            one.get("excludes"), kernel, {False}
        ):
            plain = {key: one[key] for key in one if key not in ("includes", "excludes", "comment")}
            if "name" in plain:
                plain["names"] = [plain.pop("name")]
            given["syscalls"].append(_numbered(plain, "errno"))
    return given


def _numbered(one: Json, key: str) -> Json:
    if key in one:
        one[f"{key}Ret"] = getattr(errno, one.pop(key))
    return one


def _applies(when: Json | None, kernel: tuple[int, int], wanted: set[bool]) -> bool:
    """Whether all that is said is so; or, of what excludes, nothing is."""
    says = when or {}
    facts = set()
    if "arches" in says:
        facts.add("amd64" in says["arches"])
    if "caps" in says:
        facts.add(False)
    if "minKernel" in says:
        facts.add(kernel >= tuple(map(int, says["minKernel"].split("."))))
    return facts <= wanted


# -- crun


def program_of_crun(profile: Json, folder: Path) -> bytes:
    """The program that crun has for a sandbox that is made and not yet started."""
    bundle = folder / "bundle"
    for name in ("dev", "proc", "usr"):
        (bundle / "rootfs" / name).mkdir(parents=True)
    config = {
        "ociVersion": "1.0.0",
        "root": {"path": "rootfs"},
        "process": {
            "user": {"uid": 0, "gid": 0},
            "args": ["/usr/bin/true"],
            "cwd": "/",
            "noNewPrivileges": True,  # or crun loads the filter before it is done itself
        },
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc"},
            {"destination": "/usr", "type": "none", "source": "/usr", "options": ["bind", "ro"]},
        ],
        "linux": {"namespaces": [{"type": "pid"}, {"type": "mount"}], "seccomp": profile},
    }
    (bundle / "config.json").write_text(json.dumps(config))
    top, _ = subtree.mounted()
    crun = f"crun --cgroup-manager=disabled --root={folder}/state"
    steps = [
        f"mount --bind {top} /sys/fs/cgroup" if top not in (None, Path("/sys/fs/cgroup")) else ":",
        f"{crun} create --bundle={bundle} one",
        f"{{ cp {folder}/state/one/seccomp.bpf {folder}/program; {crun} delete --force one; }}",
    ]
    argv = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", " && ".join(steps)]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=30, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    return (folder / "program").read_bytes()


# -- libseccomp, fed as crun feeds it


def program_of_libseccomp(profile: Json) -> bytes:
    """OSError where libseccomp cannot have two rules together."""
    try:
        import seccomp as library
    except ImportError:
        import pyseccomp as library
    default = _action(library, profile["defaultAction"], profile.get("defaultErrnoRet", 1))
    new = library.SyscallFilter(default)
    for name in profile.get("architectures", ()):
        arch = {"SCMP_ARCH_X86": library.Arch.X86, "SCMP_ARCH_X86_64": library.Arch.X86_64}[name]
        if not new.exist_arch(arch):
            new.add_arch(arch)
    for one in profile["syscalls"]:
        action = _action(library, one["action"], one.get("errnoRet", 1))
        if action == default:
            continue
        for name in one["names"]:
            number = library.resolve_syscall(library.Arch.NATIVE, name)
            args = [_argument(library, each) for each in one.get("args", ())]
            indexes = [each["index"] for each in one.get("args", ())]
            apart = len(set(indexes)) < len(indexes)
            for some in ((each,) for each in args) if apart else (args,):
                new.add_rule(action, number, *some)
    return seccomp._exported(new)


def _action(library: Any, name: str, number: int) -> int:
    known = {
        "ALLOW": library.ALLOW, "KILL": library.KILL, "KILL_THREAD": library.KILL,
        "KILL_PROCESS": library.KILL_PROCESS, "TRAP": library.TRAP, "LOG": library.LOG,
        "ERRNO": library.ERRNO(number), "TRACE": library.TRACE(number),
    }  # fmt: skip
    return int(known[name.removeprefix("SCMP_ACT_")])


def _argument(library: Any, one: Json) -> Any:
    op = getattr(library, one["op"].removeprefix("SCMP_CMP_"))
    return library.Arg(one["index"], op, one["value"], one.get("valueTwo", 0))


# -- what a profile says, read without any cleverness


def meant(profile: Json, name: str, args: tuple[int, ...], most: int) -> set[int]:
    """The answers of all rules that hold; `most` is the largest argument of the ABI."""
    default = ACTIONS[profile["defaultAction"]] | _errno(profile["defaultAction"], profile, "def")
    found: dict[bool, list[int]] = {True: [], False: []}
    for one in profile["syscalls"]:
        action = ACTIONS[one["action"]] | _errno(one["action"], one, "")
        if name not in one["names"] or action == default:
            continue
        every = one.get("args", ())
        either = len({each["index"] for each in every}) < len(every)
        for some in ((each,) for each in every) if either else (every,):
            plain = not [each for each in some if not _is_idle(each, most)]
            if plain or all(_holds(each, args, most) for each in some):
                found[plain].append(action)
    return set(found[True][:1] or found[False] or [default])


ACTIONS = {
    ALLOW: 0x7FFF0000, ERRNO: 0x50000, "SCMP_ACT_LOG": 0x7FFC0000, "SCMP_ACT_KILL": 0,
    "SCMP_ACT_KILL_PROCESS": 0x80000000,
}  # fmt: skip


def _errno(action: str, one: Json, key: str) -> int:
    return int(one.get("defaultErrnoRet" if key else "errnoRet", 1)) if action == ERRNO else 0


def _is_idle(one: Json, most: int) -> bool:
    return bool(one["op"] == "SCMP_CMP_MASKED_EQ" and not one["value"] & most)


def _holds(one: Json, args: tuple[int, ...], most: int) -> bool:
    seen, value, second = (
        each & most for each in (args[one["index"]], one["value"], one.get("valueTwo", 0))
    )
    return {
        "NE": seen != value, "LT": seen < value, "LE": seen <= value, "EQ": seen == value,
        "GE": seen >= value, "GT": seen > value, "MASKED_EQ": seen & value == second & value,
    }[one["op"].removeprefix("SCMP_CMP_")]  # fmt: skip


# -- what to ask


def questions(profile: Json, name: str) -> Iterator[tuple[int, ...]]:
    """Arguments next to the boundaries of all rules for a call, and of those that it stands for."""
    rules = []
    for one in profile["syscalls"]:
        if name in (*one.get("names", ()), one.get("name")) or name in ("socketcall", "ipc"):
            args = tuple(map(_boundary, one.get("args") or ()))
            rules.append(Rule(calls=(name,), args=args))
    if name in ("socketcall", "ipc"):
        every = tuple(Argument(index=0, op="eq", value=number, width=64) for number in range(1, 26))
        rules.append(Rule(calls=(name,), args=every))
    return seccomp.boundaries(tuple(rules))


def _boundary(one: Json) -> Argument:
    if one["op"] == "SCMP_CMP_MASKED_EQ":
        value, mask = one.get("valueTwo", 0), one["value"]
        return Argument(index=one["index"], op="eq", value=value, mask=mask, width=64)
    return Argument(index=one["index"], op="eq", value=one["value"], width=64)
