"""A Job on its way to a daemon: what it names here is read here, and large files go first."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import AsyncGenerator, Awaitable, Callable
from pathlib import Path
from typing import Any

import msgspec
import trio

from sandboxd.errors import JobError
from sandboxd.job import File, Input, Job, Pattern, Tar
from sandboxd.policy import Policy
from sandboxd.reference import Reference
from sandboxd.serve.wire import NAME, content_json, text_json
from sandboxd.supervise import policies

SMALL = 256 << 10
"""Bytes of a file that goes along with its job; a larger one is stored first."""
PIECE = 256 << 10

Store = Callable[[str, AsyncGenerator[bytes, None]], Awaitable[None]]
"""Hands over a file by its digest."""


async def submission_of(job: Job, store: Store) -> dict[str, Any]:
    """The submission; JobError for what cannot be read here or said there."""
    if job.id is not None and not re.match(NAME, job.id):
        raise JobError(f"id={job.id!r}", hint="over the wire: letters, digits, and _.- after them")
    _check_carried(job)
    found: dict[str, Any] = {"argv": [text_json(word) for word in job.argv], "keep": job.keep}
    policy = job.policy
    if isinstance(policy, str) and policies.is_path(policy):
        policy = await trio.to_thread.run_sync(policies.find, policy)
    found["policy"] = msgspec.to_builtins(policy) if isinstance(policy, Policy) else policy
    found["env"] = {_name(key): text_json(value) for key, value in job.env.items()}
    found["collect"] = list(job.collect)
    if job.cwd is not None:
        found["cwd"] = text_json(job.cwd)
    if job.limits is not None:
        found["limits"] = msgspec.to_builtins(job.limits)
    if job.terminal is not None:
        found["terminal"] = {"rows": job.terminal.rows, "columns": job.terminal.columns}
    if job.id is not None:
        found["id"] = job.id
    if job.stdin is None:
        found["interactive"] = True
    elif job.stdin:
        found["stdin"] = await _content(job.stdin, "stdin", store)
    found["files"] = files = dict[str, Any]()
    for key, value in job.files.items():
        await _add(files, (_name(key), value), f"files[{key!r}]", store)
    return found


def _check_carried(job: Job) -> None:
    """JobError for what there are no words for on the wire."""
    archives = [key for key, value in job.files.items() if isinstance(value, Tar)]
    built = [key for key, value in job.files.items() if isinstance(value, Reference)]
    refused = {
        **{f"files[{key!r}] is a Reference": "give the files of the build" for key in built},
        **{f"files[{key!r}] is a Tar": "give the directory, or its files" for key in archives},
        "collect has a Pattern": "give its name" * any(isinstance(p, Pattern) for p in job.collect),
        "collect_to": "what is collected comes with the result" * (job.collect_to != "memory"),
        "artifacts": "set [artifacts] in the policy" * (job.artifacts is not None),
        "keep_root": "use a Runner of this machine" * bool(job.keep_root),
    }
    for what, hint in refused.items():
        if hint:
            raise JobError(f"{what}: not over the wire", hint=hint)


def _name(key: str | bytes) -> str:
    try:
        return os.fsencode(key).decode()
    except UnicodeDecodeError:
        raise JobError(f"{key!r} is no UTF-8", hint="over the wire names must be") from None


async def _add(files: dict[str, Any], entry: tuple[str, Input], where: str, store: Store) -> None:
    name, value = entry
    assert not isinstance(value, Tar | Reference)
    data = value.data if isinstance(value, File) else value
    mode = value.mode if isinstance(value, File) else None
    if isinstance(data, Path) and await trio.Path(data).is_dir():
        for path in sorted(await trio.to_thread.run_sync(_below, data, where)):
            inner = f"{name.rstrip('/')}/{_name(os.fspath(path.relative_to(data)))}"
            await _add(files, (inner, path), f"{where}: {path}", store)
        return
    found = await _content(data, where, store)
    if mode is None:
        mode = os.stat(data).st_mode if isinstance(data, Path) else 0o644
    files[name] = {**found, "mode": mode & 0o777}


def _below(folder: Path, where: str) -> list[Path]:
    """The files in a directory; JobError for what has no place in a submission."""
    found = []
    for path in folder.rglob("*"):
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            raise JobError(
                f"{where}: {path} is neither file nor directory",
                hint="over the wire there are files only: make it one, or an archive",
            )
        if path.is_file():
            found.append(path)
    return found


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
        return hashlib.file_digest(file, "sha256").hexdigest(), None


async def _pieces(path: Path) -> AsyncGenerator[bytes, None]:
    with await trio.to_thread.run_sync(path.open, "rb") as file:
        while data := await trio.to_thread.run_sync(file.read, PIECE):
            yield data


async def _whole(data: bytes) -> AsyncGenerator[bytes, None]:
    for start in range(0, len(data), PIECE):
        yield data[start : start + PIECE]
