"""config.json of an OCI bundle and a policy -> a Job under that policy, made tighter.

A bundle is somebody else's file. What it asks for is granted as far as the policy goes: it sets
what concerns the program alone (its words, variables, ids, its root below the bundle), lowers
limits, and opens nothing of the host. The rest is not done, and is told: place and reason, in
Job.ignored. What makes no sense is a PolicyError with file and place.

The format: config.md and config-linux.md of the OCI runtime specification.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from types import MappingProxyType

from sandboxd.compile import oci
from sandboxd.compile.bundle_linux import linux
from sandboxd.compile.bundle_mounts import mounts
from sandboxd.compile.decisions import problems_of_profiles
from sandboxd.compile.document import Node, read
from sandboxd.compile.granted import Around, Granted
from sandboxd.job import Job, Terminal
from sandboxd.policy import Attached, Environment, Policy, Syscalls

FILE = "config.json"
_HOSTNAME = re.compile("[A-Za-z0-9][A-Za-z0-9.-]{0,62}")
_LIMITS = MappingProxyType(
    {
        "RLIMIT_AS": "address_space", "RLIMIT_CPU": "cpu_time", "RLIMIT_FSIZE": "file_size",
        "RLIMIT_NOFILE": "open_files", "RLIMIT_NPROC": "processes", "RLIMIT_STACK": "stack",
    }
)  # fmt: skip
_INFINITE = 1 << 63
"""RLIM_INFINITY is 2**64 - 1; nobody means a number in between."""
_WHY = MappingProxyType(
    {
        "domainname": "there is no NIS domain",
        "hooks": "hooks are programs of the host, and are never run",
        **dict.fromkeys(("solaris", "windows", "vm", "zos", "freebsd"), "of another system"),
    }
)
_WHY_PROCESS = MappingProxyType(
    {
        "apparmorProfile": "not supported",
        "selinuxLabel": "not supported",
        "oomScoreAdj": "the caller's",
        "scheduler": "not supported",
        "ioPriority": "not supported",
        "execCPUAffinity": "not supported",
        "commandLine": "of another system",
    }
)
_WHY_USER = MappingProxyType(
    {
        "umask": "the caller's",
        "additionalGids": "a program is in no further groups",
        "username": "of another system",
    }
)


def bundle(text: str, policy: Policy, around: Around, argv: Sequence[bytes] = ()) -> Job:
    """The job of a config.json; `argv`, if there is one, takes the place of its words."""
    top = read(text, FILE)
    version = top.need("ociVersion")
    if not version.text.startswith("1."):
        raise version.wrong(f"{version.text!r} is not known", hint="there is 1.x")
    granted = Granted(policy, around)
    _root(top, granted)
    if hostname := top.get("hostname"):
        _hostname(hostname, granted)
    mounts(top, granted)
    process = top.need("process")
    _process(process, granted)
    linux(top, granted)
    known = ("ociVersion", "root", "process", "hostname", "mounts", "linux", "annotations")
    granted.ignore_all(top, dict(_WHY), *known)
    made = granted.result(syscalls=_syscalls(top, policy.syscalls), environment=Environment())
    return Job(
        argv=tuple(argv) or _argv(process),
        policy=made,
        env=_env(process, granted),
        cwd=_cwd(process),
        terminal=_terminal(process, granted),
        ignored=tuple(granted.ignored),
    )


def _root(top: Node, granted: Granted) -> None:
    node = top.need("root")
    path, read_only = node.need("path"), node.get("readonly")
    if granted.around.own_root:
        real = granted.around.resolve(path.text)
        if real is None:
            hint = "a root is in its bundle; --root DIR takes the place of one that is not"
            raise path.wrong(f"{path.text!r} leads out of the bundle", hint=hint)
        granted.set("root", "source", real, path)
        granted.set("root", "image", "", path)
    if read_only is not None and read_only.truth:
        granted.set("root", "writable", False, read_only)
    elif not granted.policy.root.writable:
        granted.ignore(node.below("readonly"), f"{granted.policy.name} has a read-only root")
    granted.ignore_all(node, {}, "path", "readonly")


def _hostname(node: Node, granted: Granted) -> None:
    if not node.text:
        return
    if not _HOSTNAME.fullmatch(node.text):
        hint = "up to 63 letters, digits, dots and hyphens"
        raise node.wrong(f"{node.text!r} is no host name", hint=hint)
    granted.set("identity", "hostname", node.text, node)


# -- process ---------------------------------------------------------------------------------


def _process(node: Node, granted: Granted) -> None:
    if user := node.get("user"):
        for key in ("uid", "gid"):
            number = user.get(key)
            if number is not None and number.number(0, (1 << 32) - 1) > 65535:
                granted.ignore(number, "ids inside are below 65536")
            elif number is not None:
                granted.set("identity", key, number.number(), number)
        granted.ignore_all(user, dict(_WHY_USER), "uid", "gid")
    capabilities = node.get("capabilities")
    if capabilities is not None and any(map(capabilities.texts, capabilities.present())):
        granted.ignore(capabilities, "a program has none")
    gains = node.get("noNewPrivileges")
    if gains is not None and not gains.truth:
        granted.ignore(gains, "it is always true")
    _rlimits(node, granted)
    granted.ignore_all(
        node, dict(_WHY_PROCESS), "args", "env", "cwd", "user", "capabilities", "rlimits",
        "noNewPrivileges", "terminal", "consoleSize",
    )  # fmt: skip


def _rlimits(process: Node, granted: Granted) -> None:
    seen = set()
    for node in process.entries("rlimits"):
        kind = node.need("type")
        soft, hard = node.need("soft").number(), node.need("hard").number()
        if kind.text in seen:
            raise kind.wrong(f"{kind.text} is there already", hint="leave one out")
        seen.add(kind.text)
        if soft > hard:
            raise node.below("soft").wrong(f"{soft} is above the hard limit, {hard}")
        name = _LIMITS.get(kind.text)
        if name is None:
            if (kind.text, soft) != ("RLIMIT_CORE", 0):  # there are no core dumps
                granted.ignore(node, f"{kind.text} is sandboxd's own")
            continue
        if soft < _INFINITE:
            granted.lower(name, soft, node)
            if soft < hard:
                granted.ignore(node.below("hard"), "it is as the soft one")


def _argv(node: Node) -> tuple[str, ...]:
    words = node.texts("args")
    if not words:
        raise node.below("args").wrong("no program to run", hint='"args": ["sh"]')
    return tuple(_without_nul(one) for one in node.entries("args"))


def _without_nul(node: Node) -> str:
    if "\0" in node.text:
        raise node.wrong("contains a NUL, which no program can get")
    return node.text


def _env(process: Node, granted: Granted) -> dict[str, str]:
    found = {}
    for node in process.entries("env"):
        name, equals, value = _without_nul(node).partition("=")
        if name and equals:
            found[name] = value
        else:
            granted.ignore(node, "a variable is NAME=VALUE")
    return found


def _cwd(process: Node) -> str:
    node = process.need("cwd")
    if not _without_nul(node).startswith("/"):
        raise node.wrong(f"{node.text!r} is not absolute", hint='e.g. "/"')
    return node.text


def _terminal(process: Node, granted: Granted) -> Terminal | None:
    wanted, size = process.get("terminal"), process.get("consoleSize")
    if wanted is None or not wanted.truth:
        return None
    if not granted.around.terminal:
        granted.ignore(wanted, "stdin is none, so there are pipes; -t makes one all the same")
        return None
    if size is None:
        return Terminal()
    rows, columns = (size.need(key).number(1, 65535) for key in ("height", "width"))
    return Terminal(rows=rows, columns=columns)


# -- system calls ----------------------------------------------------------------------------


def _syscalls(top: Node, syscalls: Syscalls) -> Syscalls:
    """The policy's own, and on top what the bundle refuses."""
    linux_part = top.get("linux")
    node = None if linux_part is None else linux_part.get("seccomp")
    if node is None:
        return syscalls
    oci.of(node)
    both = Attached(
        **{key: getattr(syscalls, key) for key in Syscalls.__struct_fields__},
        profile=syscalls.profile if isinstance(syscalls, Attached) else "",
        on_top=json.dumps(node.value),
        on_top_name=FILE,
    )
    for wrong in problems_of_profiles(both):
        raise wrong
    return both
