"""Who is measured: sandboxd in several ways, bwrap and crun at the same isolation, and nobody.

Same isolation: user, pid, mount, ipc, uts, net and cgroup namespaces, /usr read-only, private
/tmp, /proc and /box, a minimal /dev, no capabilities, no_new_privs, a hostname, a session of its
own. What only sandboxd does on top (resource limits, a uid per run, Landlock, an init that reaps
and reports, a cgroup leaf, most of /etc) favours the others. `bwrap seccomp` gets our own filter.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from pathlib import Path
from typing import Protocol

import msgspec
import trio

from sandboxd import Job, Policy, Runner, find_policy, open_runner
from sandboxd.compile import seccomp
from sandboxd.host import Host
from sandboxd.linux import memfd
from sandboxd.policy import Mount
from tests.bench.programs import PLACE

POLICY = "judge-native"


class Contestant(Protocol):
    """Somebody who runs programs."""

    name: str

    async def result(self, program: str) -> None:
        """Run it to its end, output read, everything reaped."""

    async def first_byte(self, program: str) -> float:
        """The moment (trio's clock) its output began, or ended without any; then as `result`."""

    async def settle(self) -> None:
        """Whatever is done between runs and is not measured."""

    def live(self, program: str, count: int) -> AbstractAsyncContextManager[None]:
        """That many runs at once, each of which has written its byte and waits for stdin."""


# -- sandboxd ----------------------------------------------------------------------------------


class Sandboxd:
    """Through the library, as a program that embeds it would."""

    def __init__(self, name: str, runner: Runner, policy: Policy, spares: int) -> None:
        self.name = name
        self._runner = runner
        self._policy = policy
        self._spares = spares

    def _job(self, program: str, stdin: bytes | None = b"") -> Job:
        return Job(argv=(program,), policy=self._policy, stdin=stdin)

    async def result(self, program: str) -> None:
        result = await self._runner.run(self._job(program))
        if not result.ok:
            raise RuntimeError(f"{self.name}: {result.status} {result.message}")

    async def first_byte(self, program: str) -> float:
        async with self._runner.start(self._job(program)) as run:
            async for event in run.events:
                if event.type in ("stdout", "exit"):
                    first = trio.current_time()
                    break
            else:
                raise RuntimeError(f"{self.name}: no events")
            async for _ in run.events:
                pass
        return first

    async def settle(self) -> None:
        with trio.move_on_after(1):
            while self._runner.statistics().spares < self._spares:  # noqa: ASYNC110  nobody tells
                await trio.sleep(0.0005)
        if self._spares:  # the youngest has only been asked for
            await trio.sleep(0.003)

    @asynccontextmanager
    async def live(self, program: str, count: int) -> AsyncIterator[None]:
        async with trio.open_nursery() as nursery:
            ends = [await nursery.start(self._hold, program) for _ in range(count)]
            yield
            for end in ends:
                end.set()

    async def _hold(self, program: str, task_status: trio.TaskStatus[trio.Event]) -> None:
        end = trio.Event()
        async with self._runner.start(self._job(program, None)) as run:
            async for event in run.events:
                if event.type == "stdout":
                    task_status.started(end)
                    break
            await end.wait()
            assert run.stdin is not None
            await run.stdin.aclose()
            async for _ in run.events:
                pass


def policy_for(folder: Path) -> Policy:
    """A real policy, with the programs in sight and no haste."""
    policy = find_policy(POLICY)
    mount = Mount(target=PLACE, source=str(folder))
    return msgspec.structs.replace(
        policy,
        mounts=(*policy.mounts, mount),
        limits=msgspec.structs.replace(policy.limits, wall_time=60.0),
    )


@asynccontextmanager
async def open_ours(host: Host, folder: Path, live: int) -> AsyncIterator[list[Contestant]]:
    """The ways in which sandboxd is measured."""
    policy = policy_for(folder)
    bare = msgspec.structs.replace(host, cgroup=None, cgroup_why_not="left out on purpose")
    ways = [("sandboxd", host, 0), ("sandboxd spare", host, 2)]
    if host.cgroup is not None:
        ways += [("sandboxd, no cgroup", bare, 0), ("sandboxd spare, no cgroup", bare, 2)]
    async with trio.open_nursery() as nursery:
        ours: list[Contestant] = [
            Sandboxd(name, await nursery.start(_serve, where, spares, live), policy, spares)
            for name, where, spares in ways
        ]
        yield ours
        nursery.cancel_scope.cancel()


async def _serve(host: Host, spares: int, slots: int, task_status: trio.TaskStatus[Runner]) -> None:
    async with open_runner(host=host, spares=spares, slots=slots) as runner:
        task_status.started(runner)
        await trio.sleep_forever()


# -- commands ----------------------------------------------------------------------------------

Argv = Callable[[str], list[str]]


class Command:
    """A program that runs a program, through trio as sandboxd is."""

    def __init__(self, name: str, argv: Argv, filters: Sequence[bytes] = ()) -> None:
        self.name = name
        self.argv = argv
        self._filters = filters

    async def result(self, program: str) -> None:
        with self._command(program) as (argv, fds):
            await trio.run_process(argv, capture_stdout=True, capture_stderr=True, pass_fds=fds)

    async def first_byte(self, program: str) -> float:
        async with self._open(program) as process:
            assert process.stdout is not None
            data = await process.stdout.receive_some()
            first = trio.current_time()
            if data:
                await process.stdout.receive_some()
            if await process.wait():
                raise RuntimeError(f"{self.name}: exit code {process.returncode}")
        return first

    async def settle(self) -> None:
        await trio.lowlevel.checkpoint()

    @asynccontextmanager
    async def live(self, program: str, count: int) -> AsyncIterator[None]:
        async with trio.open_nursery() as nursery:
            ends = [await nursery.start(self._hold, program) for _ in range(count)]
            yield
            for end in ends:
                end.set()

    async def _hold(self, program: str, task_status: trio.TaskStatus[trio.Event]) -> None:
        end = trio.Event()
        async with self._open(program) as process:
            assert process.stdout is not None
            assert process.stdin is not None
            await process.stdout.receive_some()
            task_status.started(end)
            await end.wait()
            await process.stdin.aclose()
            await process.wait()

    @asynccontextmanager
    async def _open(self, program: str) -> AsyncIterator[trio.Process]:
        with self._command(program) as (argv, fds):
            process = await trio.lowlevel.open_process(
                argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, pass_fds=fds
            )
        try:
            yield process
        except BaseException:
            process.kill()
            raise
        finally:
            with trio.CancelScope(shield=True):
                for stream in (process.stdin, process.stdout):
                    if stream is not None:
                        await stream.aclose()
                await process.wait()

    @contextmanager
    def _command(self, program: str) -> Iterator[tuple[list[str], list[int]]]:
        """The words, with bwrap's option for each filter; it reads a descriptor to its end."""
        fds: list[int] = []
        try:
            for content in self._filters:
                fds.append(memfd.program(content))
                os.lseek(fds[-1], 0, os.SEEK_SET)
            options = [word for fd in fds for word in ("--add-seccomp-fd", str(fd))]
            first, *rest = self.argv(program)
            yield [first, *options, *rest], fds
        finally:
            for fd in fds:
                os.close(fd)


class Popen(Command):
    """The least that Python can do: blocking, without trio."""

    async def result(self, program: str) -> None:
        self._run(program)
        await trio.lowlevel.checkpoint()

    async def first_byte(self, program: str) -> float:
        await trio.lowlevel.checkpoint()
        return self._run(program)

    def _run(self, program: str) -> float:
        with subprocess.Popen(self.argv(program), stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            process.stdout.read(1)
            first = trio.current_time()
            process.stdout.read()
        return first


def nobody(folder: Path) -> list[Contestant]:
    """The same programs without a sandbox."""

    def argv(program: str) -> list[str]:
        return [program.replace(PLACE, str(folder), 1)]

    return [Command("none (trio)", argv), Popen("none (Popen)", argv)]


BWRAP = [
    "--unshare-all", "--die-with-parent", "--new-session", "--cap-drop", "ALL",
    "--clearenv", "--hostname", "sandbox", "--ro-bind", "/usr", "/usr",
    "--symlink", "usr/bin", "/bin", "--symlink", "usr/lib", "/lib",
    "--symlink", "usr/lib64", "/lib64", "--proc", "/proc", "--dev", "/dev",
    "--tmpfs", "/tmp", "--tmpfs", "/box", "--chdir", "/box",
]  # fmt: skip


def bwrap(folder: Path, arch: str) -> list[Contestant]:
    path = shutil.which("bwrap")
    if path is None:
        return []
    words = [path, *BWRAP, "--ro-bind", str(folder), PLACE]
    filters = seccomp.programs(find_policy(POLICY).syscalls, arch)

    def argv(program: str) -> list[str]:
        return [*words, "--", program]

    return [Command("bwrap", argv), Command("bwrap seccomp", argv, filters)]
