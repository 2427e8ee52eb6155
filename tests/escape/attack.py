"""What every attack needs: a hostile program to send, a sandbox to break, a sandbox to weaken.

An attack is Python (the prelude below and its own lines) or C. It prints what it achieved as one
JSON object, mostly {"what was tried": "ok" or the name of the errno}, and the test says what that
must be. A test that cannot fail proves nothing. So, wherever it can be shown, the same program
runs once more in a sandbox built without the layer in question (`without`), and gets through.

Each docstring names the class of attack, the incident or manual page behind it, and the layers
that stand in the way. This is the only file of the suite that knows where things are in sandboxd.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest

from sandboxd import plan
from sandboxd.compile import build
from sandboxd.compile.build import Compiled
from sandboxd.compile.numbers import table
from sandboxd.errors import JobError, SandboxError
from sandboxd.host import Host
from sandboxd.job import File, Job, Terminal
from sandboxd.plan import Attributes
from sandboxd.policy import Argument, Environment, Identity, Limits, Mount, Policy, Rule
from sandboxd.probe.host import probe
from sandboxd.result import Result
from sandboxd.supervise import policies
from sandboxd.supervise.run import Run
from sandboxd.supervise.runner import Runner, open_runner

__all__ = [
    "Argument", "Attributes", "Compiled", "Environment", "File", "Host", "Identity", "Job",
    "JobError", "Limits", "Mount", "Policy", "Result", "Rule", "Run", "Runner", "SandboxError",
    "Terminal", "open_runner", "plan", "probe",
]  # fmt: skip

POLICIES = ("base", "judge-native", "shell", "agent")
"""Root read-only and writable, uid of its own and mapped to 1000, isolated and the caller's."""
with_inet = pytest.mark.parametrize("policy", ["base", "shell", "agent"])
"""The policies that have sockets of the Internet families: the judge's has unix ones alone."""
every_policy = pytest.mark.parametrize("policy", POLICIES)
any_uid = pytest.mark.parametrize("policy", ["base", "shell"])
"""Two jobs with a uid each, and two with the caller's."""

Change = Callable[[Compiled], Compiled]

PYTHON = "/usr/bin/python3"
PRELUDE = """
import array, ctypes, errno, fcntl, json, mmap, os, select, signal, socket, struct, sys, time
libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long
found = {}

def call(name, *args):
    "A raw system call: its result, OSError if it fails."
    words = [ctypes.c_long(arg) if isinstance(arg, int) else arg for arg in args]
    result = libc.syscall(ctypes.c_long(NR[name]), *words)
    if result == -1:
        raise OSError(ctypes.get_errno(), name)
    return result

def tried(what, *args, **named):
    "ok, or the name of what went wrong."
    try:
        what(*args, **named)
    except OSError as error:
        return errno.errorcode.get(error.errno, str(error.errno))
    return "ok"

def reads(path, limit=65536):
    "What is in it, or the name of what went wrong."
    try:
        with open(path, "rb") as file:
            return file.read(limit).decode("latin-1")
    except OSError as error:
        return errno.errorcode[error.errno]

def writes(path, data=b"x", flags=os.O_WRONLY):
    def write():
        fd = os.open(path, flags, 0o666)
        try:
            os.write(fd, data)
        finally:
            os.close(fd)
    return tried(write)

def forked(what):
    "Let a child do it; its wait status."
    pid = os.fork()
    if pid == 0:
        try:
            what()
        finally:
            os._exit(0)
    return os.waitpid(pid, 0)[1]

def ready():
    "Let the test go on; return when it says so."
    print("ready", flush=True)
    sys.stdin.read()

def tell():
    print(json.dumps(found), flush=True)
"""


@functools.cache
def numbers() -> str:
    return f"NR = {dict(table(os.uname().machine))!r}\n"


def python(body: str) -> tuple[str, ...]:
    """The argv of a Python attack; it puts what it achieved into `found`."""
    return (PYTHON, "-I", "-S", "-c", f"{numbers()}{PRELUDE}\n{body}\ntell()\n")


@functools.cache
def program(source: str, *flags: str) -> bytes:
    """A C attack, compiled once; mark the test with needs("gcc")."""
    with tempfile.TemporaryDirectory() as top:
        (Path(top) / "attack.c").write_text(source)
        command = ["gcc", "-O1", "-w", "-o", f"{top}/attack", f"{top}/attack.c", *flags]
        subprocess.run(command, check=True, stdin=subprocess.DEVNULL)
        return (Path(top) / "attack").read_bytes()


def find(name: str | Policy, **sections: Any) -> Policy:
    """A policy with some of its sections replaced."""
    policy = policies.find(name) if isinstance(name, str) else name
    return msgspec.structs.replace(policy, **sections)


def limited(name: str | Policy, **limits: Any) -> Policy:
    """A policy with some of its limits replaced."""
    policy = find(name)
    return find(policy, limits=msgspec.structs.replace(policy.limits, **limits))


CALLER = Identity(user="caller", uid=1000, gid=1000)
"""The caller's own id outside: the job owns what the tenant owns, and no mode bit protects it."""


def achieved(result: Result) -> dict[str, Any]:
    """What an attack that ran to its end says about itself."""
    assert result.status == "ok", (result.status, result.message, result.stderr.decode())
    text = result.stdout
    found = json.loads(text[text.index(b"{") : text.rindex(b"}") + 1])
    assert isinstance(found, dict)
    return found


async def attack(
    policy: str | Policy,
    body: str,
    *,
    host: Host | None = None,
    weaken: Change | None = None,
    **job: Any,
) -> dict[str, Any]:
    """Carry a Python attack out in a runner of its own; what it achieved."""
    with weakened(weaken):
        async with open_runner(host=host) as runner:
            return achieved(await runner.run(Job(argv=python(body), policy=policy, **job)))


async def attack_c(policy: str | Policy, source: str, *arguments: str, **weaken: Change) -> Result:
    """Carry a C attack out in a runner of its own."""
    files = {"attack": File(data=program(source), mode=0o755)}
    with weakened(weaken.get("weaken")):
        async with open_runner() as runner:
            argv = ("/box/attack", *arguments)
            return await runner.run(Job(argv=argv, policy=policy, files=files))


async def in_turn(
    policy: str | Policy, *bodies: str, host: Host | None = None, weaken: Change | None = None
) -> list[dict[str, Any]]:
    """Attacks of which each one comes after the other, in a runner that reuses all it can."""
    with weakened(weaken):
        async with open_runner(slots=1, host=host) as runner:
            return [
                achieved(await runner.run(Job(argv=python(body), policy=policy))) for body in bodies
            ]


@asynccontextmanager
async def live(runner: Runner, policy: str | Policy, body: str) -> AsyncIterator[Run]:
    """A Python attack up to its call of ready(), where it waits for `finished`."""
    async with runner.start(Job(argv=python(body), policy=policy, stdin=None)) as run:
        seen = b""
        while b"ready\n" not in seen:
            event = await run.events.receive()
            seen += event.data
            assert event.result is None, event.result
        yield run


async def finished(run: Run) -> dict[str, Any]:
    """Let a live attack go on to its end; what it achieved."""
    assert run.stdin is not None
    await run.stdin.aclose()
    async for event in run.events:
        if event.result is not None:
            return achieved(event.result)
    raise AssertionError("no result")


# -- without a countermeasure ----------------------------------------------------------------


@contextmanager
def weakened(change: Change | None) -> Iterator[None]:
    """What is compiled meanwhile is changed like this, and then carried out as ever."""
    if change is None:
        yield
        return
    honest = build.compile_policy
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            build,
            "compile_policy",
            lambda policy, host, *, keep: change(honest(policy, host, keep=keep)),
        )
        yield


def without(*kinds: type[plan.Step]) -> Change:
    """No step of these kinds, neither in the tenant nor in the sandbox."""

    def change(compiled: Compiled) -> Compiled:
        steps = (*compiled.tenant.steps, *compiled.setup.steps, *compiled.network.steps)
        for kind in kinds:
            assert any(isinstance(step, kind) for step in steps), f"there was no {kind.__name__}"
        return with_steps(compiled, lambda step: None if isinstance(step, kinds) else step)

    return change


def with_steps(compiled: Compiled, change: Callable[[plan.Step], plan.Step | None]) -> Compiled:
    """Every step changed; None leaves it out."""

    def changed(steps: tuple[plan.Step, ...]) -> tuple[plan.Step, ...]:
        return tuple(new for new in map(change, steps) if new is not None)

    setup = changed(compiled.setup.steps)
    landlock = any(isinstance(step, plan.Landlock) for step in setup)
    network = changed(compiled.network.steps)
    return msgspec.structs.replace(
        compiled,
        tenant=msgspec.structs.replace(compiled.tenant, steps=changed(compiled.tenant.steps)),
        setup=msgspec.structs.replace(compiled.setup, steps=setup, landlock=landlock),
        network=msgspec.structs.replace(compiled.network, steps=network),
    )


def without_namespace(name: str) -> Change:
    """The sandbox stays in its tenant's namespace of this kind."""

    def change(compiled: Compiled) -> Compiled:
        flags = compiled.setup.namespaces & ~plan.NAMESPACES[name]
        setup = msgspec.structs.replace(compiled.setup, namespaces=flags)
        return msgspec.structs.replace(compiled, setup=setup)

    return change


def without_attribute(attribute: Attributes, target: str) -> Change:
    """What is mounted at `target` lacks a mount attribute."""

    def step_without(step: plan.Step) -> plan.Step:
        if isinstance(step, plan.Attach) and step.target.endswith(target):
            return msgspec.structs.replace(step, attributes=step.attributes & ~attribute)
        return step

    return lambda compiled: with_steps(compiled, step_without)


def both(*changes: Change) -> Change:
    def change(compiled: Compiled) -> Compiled:
        for one in changes:
            compiled = one(compiled)
        return compiled

    return change


def needs_scopes() -> None:
    """Skips where Landlock cannot yet keep signals and abstract sockets in (ABI 6, Linux 6.12)."""
    if (abi := probe().landlock) < 6:
        pytest.skip(f"needs Landlock ABI 6, this kernel has {abi}")
