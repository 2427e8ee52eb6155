"""A Job on its way to a daemon: what it names here is read here, and large files go first."""

from __future__ import annotations

import hashlib
import os
import re
import tarfile
import tempfile
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from pathlib import Path
from typing import IO, Any

import msgspec
import trio

from sandboxd.errors import JobError
from sandboxd.job import File, Input, Job, Pattern, Tar
from sandboxd.policy import Policy
from sandboxd.reference import Reference
from sandboxd.serve.wire import NAME, content_json, text_json
from sandboxd.supervise import inputs, policies

SMALL = 256 << 10
"""Bytes of a file that goes along with its job; a larger one is stored first."""
PIECE = 256 << 10

Store = Callable[[str, AsyncGenerator[bytes, None]], Awaitable[None]]
"""Hands over a file by its digest."""


async def submission_of(job: Job, store: Store) -> dict[str, Any]:
    """The submission; JobError for what cannot be read here or said there."""
    if job.id is not None and not re.match(NAME, job.id):
        raise JobError(f"id={job.id!r}", hint="over the wire: letters, digits, and _.- after them")
    found: dict[str, Any] = {"argv": [text_json(word) for word in job.argv], "keep": job.keep}
    policy = job.policy
    if isinstance(policy, str) and policies.is_path(policy):
        policy = await trio.to_thread.run_sync(policies.find, policy)
    found["policy"] = msgspec.to_builtins(policy) if isinstance(policy, Policy) else policy
    found["env"] = {_name(key): text_json(value) for key, value in job.env.items()}
    found["collect"] = [_pattern(one) for one in job.collect]
    if job.cwd is not None:
        found["cwd"] = text_json(job.cwd)
    for name, section in (("limits", job.limits), ("artifacts", job.artifacts)):
        if section is not None:
            found[name] = msgspec.to_builtins(section)
    if job.keep_root:
        found["keep_root"] = job.keep_root
    if job.terminal is not None:
        found["terminal"] = {"rows": job.terminal.rows, "columns": job.terminal.columns}
    if job.id is not None:
        found["id"] = job.id
    if job.ignored:
        found["ignored"] = job.ignored
    found |= await _stdin(job.stdin, store)
    found["files"] = {
        _name(key): await _file(value, f"files[{key!r}]", store) for key, value in job.files.items()
    }
    return found


async def _stdin(stdin: bytes | Path | None, store: Store) -> dict[str, Any]:
    if stdin is None:
        return {"interactive": True}
    return {"stdin": await _content(stdin, "stdin", store)} if stdin else {}


def _pattern(pattern: str | bytes | Pattern) -> Any:
    if not isinstance(pattern, Pattern):
        pattern = Pattern(pattern)
    name = text_json(pattern.name)
    if pattern.required is None and not pattern.literal and isinstance(name, str):
        return name
    return {"name": name, "required": pattern.required, "literal": pattern.literal}


def _name(key: str | bytes) -> str:
    try:
        return os.fsencode(key).decode()
    except UnicodeDecodeError:
        raise JobError(f"{key!r} is no UTF-8", hint="over the wire names must be") from None


async def _file(value: Input, where: str, store: Store) -> dict[str, Any]:
    """The content of a file, or an archive of a directory's."""
    if isinstance(value, Reference):
        with inputs.files_of(value) as path:
            return await _file(path, where, store)
    if isinstance(value, Tar):
        return {**await _archive(value.source, where, store), "unpack": True}
    data = value.data if isinstance(value, File) else value
    mode = value.mode if isinstance(value, File) else None
    if isinstance(data, Path) and await trio.Path(data).is_dir():
        with tempfile.TemporaryFile() as file:
            await trio.to_thread.run_sync(_pack, data, file, where)
            return {**await _spooled(file, store), "unpack": True}
    found = await _content(data, where, store)
    if mode is None:
        mode = os.stat(data).st_mode if isinstance(data, Path) else 0o644
    return {**found, "mode": mode & 0o777}


async def _archive(source: bytes | Path | int, where: str, store: Store) -> dict[str, Any]:
    if not isinstance(source, int):
        return await _content(source, where, store)
    with tempfile.TemporaryFile() as file:
        await trio.to_thread.run_sync(_copy, source, file)
        return await _spooled(file, store)


def _copy(source: int, file: IO[bytes]) -> None:
    while data := os.read(source, PIECE):
        file.write(data)


def _pack(folder: Path, file: IO[bytes], where: str) -> None:
    """All of a directory as an archive; JobError for what is neither file, directory nor link."""

    def checked(member: tarfile.TarInfo) -> tarfile.TarInfo:
        if not (member.isreg() or member.isdir() or member.issym()):
            raise JobError(
                f"{where}: {folder / member.name} is no file, directory or link",
                hint="leave it out",
            )
        return member

    try:
        with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as archive:
            for path in sorted(folder.rglob("*")):
                archive.inodes.clear()  # type: ignore[attr-defined]  # each name is a file
                name = os.fspath(path.relative_to(folder))
                archive.add(path, name, recursive=False, filter=checked)
    except OSError as error:
        raise JobError(f"{where}: {error.filename or folder}: {error.strerror}") from None


def _digest(file: IO[bytes]) -> str:
    return hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]


async def _spooled(file: IO[bytes], store: Store) -> dict[str, Any]:
    """What was written to a file of our own."""
    size = file.tell()
    file.seek(0)
    if size <= SMALL:
        return content_json(file.read())
    digest = await trio.to_thread.run_sync(_digest, file)
    file.seek(0)
    await store(digest, _read_on(file))
    return {"sha256": digest}


async def _content(data: bytes | Path, where: str, store: Store) -> dict[str, Any]:
    try:
        if isinstance(data, Path):
            digest, small = await trio.to_thread.run_sync(_read, data)
            if small is None:
                await store(digest, _pieces(data))
                return {"sha256": digest}
            data = small
    except OSError as error:
        raise JobError(f"{where}: {data!s}: {error.strerror}") from None
    if len(data) <= SMALL:
        return content_json(data)
    digest = hashlib.sha256(data).hexdigest()
    await store(digest, _whole(data))
    return {"sha256": digest}


def _read(path: Path) -> tuple[str, bytes | None]:
    """The digest of a large file, the content of a small one."""
    with path.open("rb") as file:
        if os.fstat(file.fileno()).st_size <= SMALL:
            return "", file.read()
        return _digest(file), None


async def _pieces(path: Path) -> AsyncGenerator[bytes, None]:
    with await trio.to_thread.run_sync(path.open, "rb") as file:
        async with aclosing(_read_on(file)) as pieces:
            async for data in pieces:
                yield data


async def _read_on(file: IO[bytes]) -> AsyncGenerator[bytes, None]:
    while data := await trio.to_thread.run_sync(file.read, PIECE):
        yield data


async def _whole(data: bytes) -> AsyncGenerator[bytes, None]:
    for start in range(0, len(data), PIECE):
        yield data[start : start + PIECE]
