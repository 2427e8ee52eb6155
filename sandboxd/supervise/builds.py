"""Run once, use many times: a job whose files are kept under a digest of all that went into it.

The key is made of the program's words, its environment as it will be, its input files to the last
byte, what is collected, the policy, the CPU and what the root is made of (roots.py).
Whoever asks for a key that is there gets it at once; who asks for one that is being built, here or
in another process, waits for that. A build that did not end well is not kept, and who waited tries
for himself.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import msgspec
import trio

import sandboxd
from sandboxd.compile.build import DEFAULT_PATH, encoded, environment
from sandboxd.compile.load import digest
from sandboxd.errors import HostError, JobError
from sandboxd.host import Host
from sandboxd.job import File, Job, Pattern, Tar
from sandboxd.linux.descriptors import Descriptors
from sandboxd.policy import Policy
from sandboxd.reference import Reference
from sandboxd.result import ArtifactError, Result
from sandboxd.stores import builds
from sandboxd.stores.builds import BuildRecord, Store
from sandboxd.supervise import roots
from sandboxd.supervise.archives import Room
from sandboxd.supervise.pipes import open_input
from sandboxd.supervise.sources import items

FIRST_WAIT, LONGEST_WAIT = 0.002, 0.25
"""Seconds between two looks at a key that another process builds."""
HELD = 64
"""Builds that a runner keeps from being removed, those asked for last; a descriptor each."""
_CHUNK = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Build:
    """What came of a build."""

    key: str
    result: Result
    """Of the run that made it, perhaps long ago; the content of its artifacts is in the store."""
    reference: Reference | None
    """What it left, to be used in `Job.files`; None if it did not end well."""
    cached: bool
    """It was there already, so nothing was run."""

    @property
    def ok(self) -> bool:
        return self.reference is not None

    def paths(self) -> dict[str, File]:
        """The same files to be copied in. They are not to be written to."""
        tree = Store(builds.own_place()).objects / self.key / "tree"
        return {
            one.path: File(data=tree / one.path, mode=one.mode) for one in self.result.artifacts
        }


class Builder(Protocol):
    """Who can run a job, and knows what it would be run with."""

    host: Host

    def seen(self, job: Job) -> tuple[Policy, Host]: ...

    async def run(self, job: Job) -> Result: ...


class Building:
    """The keys that a runner is building, and those it built, which nobody removes meanwhile."""

    def __init__(self) -> None:
        self.locks: dict[str, tuple[trio.Lock, int]] = {}
        self._held: dict[str, int] = {}
        self._closed = False

    def hold(self, store: Store, key: str) -> None:
        """Keep this one; of too many the one asked for longest ago is let go."""
        held = self._held.pop(key, None)
        if held is None and not self._closed:
            held = store.hold(key)
        if held is not None:
            self._held[key] = held
        while len(self._held) > HELD:
            os.close(self._held.pop(next(iter(self._held))))

    def close(self) -> None:
        self._closed = True
        while self._held:
            os.close(self._held.popitem()[1])

    @asynccontextmanager
    async def alone(self, key: str) -> AsyncIterator[None]:
        lock, users = self.locks.get(key, (trio.Lock(), 0))
        self.locks[key] = (lock, users + 1)
        try:
            async with lock:
                yield
        finally:
            _, users = self.locks.pop(key)
            if users > 1:
                self.locks[key] = (lock, users - 1)


async def build(runner: Builder, job: Job, building: Building, salt: bytes) -> Build:
    """Run the job unless its key is there."""
    check(job)
    wanted = _Wanted(Store(builds.own_place()), job, *runner.seen(job), salt)
    key = await wanted.key()
    found = await wanted.find(key)
    if found is None:
        async with building.alone(key), _alone(wanted.store, key):
            found = await wanted.find(key)
            if found is None:
                return await _run(runner, building, wanted, key)
    building.hold(wanted.store, key)
    return _build(found, cached=True)


@dataclass(frozen=True, slots=True)
class _Wanted:
    store: Store
    job: Job
    policy: Policy
    host: Host
    salt: bytes

    async def key(self) -> str:
        return await trio.to_thread.run_sync(key_of, self.job, self.policy, self.host, self.salt)

    async def find(self, key: str) -> BuildRecord | None:
        return await trio.to_thread.run_sync(self.store.find, key)


async def _run(runner: Builder, building: Building, wanted: _Wanted, key: str) -> Build:
    job = wanted.job
    result = await runner.run(job)
    if result.ok and not result.artifacts:
        result = _left_nothing(job, result)
    if not result.ok or result.artifact_errors:
        return Build(key=key, result=result, reference=None, cached=False)
    if _changeable(job) and key != await wanted.key():
        raise JobError("the build's inputs changed while it ran",
                       hint="build again when nobody writes to them")  # fmt: skip
    record = await trio.to_thread.run_sync(keep, wanted.store, key, job, result)
    building.hold(wanted.store, key)
    return _build(record, cached=False)


def _build(record: BuildRecord, *, cached: bool) -> Build:
    return Build(
        key=record.key, result=record.whole_result(), reference=record.reference(), cached=cached
    )


def check(job: Job) -> None:
    """JobError for a job that leaves nothing, or whose outcome depends on more than its inputs."""
    if not job.collect:
        raise JobError("a build that collects nothing", hint="name its files: collect=['a.out']")
    if job.stdin is None or job.terminal is not None:
        raise JobError("a build has nobody to talk to", hint="give stdin as bytes or a Path")
    if any(isinstance(one, Tar) and isinstance(one.source, int) for one in job.files.values()):
        raise JobError("a build reads an archive twice", hint="give its bytes, or its path")
    if job.collect_to != "memory" or job.keep_root:
        raise JobError("a build keeps what it collects in its store, and no more",
                       hint="leave out collect_to and keep_root")  # fmt: skip


def _left_nothing(job: Job, result: Result) -> Result:
    why = "nothing that was left matches"
    return msgspec.structs.replace(
        result, status="artifact_error", causes=("artifact_error",), fault="job", message=why,
        artifact_errors=tuple(ArtifactError(path=_name(one), reason=why) for one in job.collect),
    )  # fmt: skip


def _name(pattern: str | bytes | Pattern) -> str:
    return os.fsdecode(pattern.name if isinstance(pattern, Pattern) else pattern)


@asynccontextmanager
async def _alone(store: Store, key: str) -> AsyncIterator[None]:
    """While no other process builds this."""
    wait = FIRST_WAIT
    while (descriptor := await trio.to_thread.run_sync(store.try_key, key)) is None:
        await trio.sleep(wait)
        wait = min(2 * wait, LONGEST_WAIT)
    try:
        yield
    finally:
        os.close(descriptor)


def keep(store: Store, key: str, job: Job, result: Result) -> BuildRecord:
    """In the store, where others make room if there is none."""
    argv = [os.fsencode(word).decode("utf-8", "backslashreplace") for word in job.argv]
    most = builds.largest()
    try:
        with store.adding():
            try:
                record = store.keep(key, argv, result)
            except OSError:
                half = sum(one.record.size for one in store.every()) // 2
                if not store.collect(half, None)[0]:
                    raise
                record = store.keep(key, argv, result)
    except OSError as error:
        raise HostError(
            builds.KIND,
            f"{store.place}: the build cannot be kept: {error.strerror}",
            hint="`sandboxd cache gc --size 1G` makes room, SANDBOXD_BUILDS=DIR is another place",
        ) from error
    used = store.hold(key)
    try:
        store.collect(most, builds.OLDEST)
    finally:
        if used is not None:
            os.close(used)
    return record


# -- the key -----------------------------------------------------------------------------------


def _changeable(job: Job) -> bool:
    """Whether its inputs may be others by now."""
    values: list[object] = [
        one.data if isinstance(one, File) else one.source if isinstance(one, Tar) else one
        for one in job.files.values()
    ]
    return isinstance(job.stdin, Path) or any(isinstance(one, Path) for one in values)


def key_of(job: Job, policy: Policy, host: Host, salt: bytes = b"") -> str:
    """A digest of all that the outcome depends on."""
    meant = host.image.config.env if host.image and "env" in policy.root.config else ()
    env = environment(job, policy, os.environb, meant)
    argv = [os.fsencode(word) for word in job.argv]
    words = [
        builds.SCHEMA, sandboxd.__version__, host.arch, salt, argv, sorted(env.items()),
        None if job.cwd is None else encoded(job.cwd), list(job.collect), job.artifacts, job.keep,
        _stdin(job), list(_inputs(job)), digest(policy),
        roots.identity(policy, host, argv[0], env.get(b"PATH", DEFAULT_PATH)),
        list(roots.mounted(policy)), roots.processor(),
    ]  # fmt: skip
    return hashlib.sha256(msgspec.msgpack.encode(words)).hexdigest()


def _stdin(job: Job) -> bytes:
    if isinstance(job.stdin, Path):
        with Descriptors() as fds, open(open_input(job.stdin, fds), "rb", closefd=False) as file:
            return hashlib.file_digest(file, "sha256").digest()
    return hashlib.sha256(job.stdin or b"").digest()


def _inputs(job: Job) -> Iterator[tuple[object, ...]]:
    """Every entry that would be copied in, with a digest of its content; and the references."""
    plain = {}
    for name, value in job.files.items():
        if isinstance(value, Reference):
            yield encoded(name), value.key, os.fsencode(value.path)
        else:
            plain[name] = value
    with closing(items(plain, Room())) as entries:
        for entry, descriptor in entries:
            content = entry.content
            if descriptor is not None:
                try:
                    content = _digest(descriptor)
                finally:
                    os.close(descriptor)
            yield entry.kind, entry.name, entry.mode, hashlib.sha256(content).digest()


def _digest(descriptor: int) -> bytes:
    digest, done = hashlib.sha256(), 0
    while data := os.pread(descriptor, _CHUNK, done):
        digest.update(data)
        done += len(data)
    return digest.digest()
