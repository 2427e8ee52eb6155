"""The references among a job's files: what is attached for them, and who keeps it from going.

A sandbox that waits for its job can mount nothing any more: it has no capabilities, and its filter
says no. So what is attached belongs to how a sandbox is made, and sandboxes made for the same
references serve each other's jobs: to the runner they are of one policy, with spares of their own.
"""

from __future__ import annotations

import os
import posixpath
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from sandboxd.errors import JobError
from sandboxd.job import Job
from sandboxd.reference import Attachment, Inputs, Reference

if TYPE_CHECKING:
    from sandboxd.stores.builds import Store

MOST = 256
"""References of one job, a name of a directory's that is spread out being one."""


class Split(msgspec.Struct, frozen=True):
    """A job without its references, and those."""

    job: Job
    attached: dict[str, Reference] = msgspec.field(default_factory=dict)
    """Place below the working directory -> what is to be there."""


def split(job: Job) -> Split:
    """JobError if two of a job's files are in each other's way."""
    if not any(isinstance(value, Reference) for value in job.files.values()):
        return Split(job)
    attached: dict[str, Reference] = {}
    plain = {}
    for key, value in job.files.items():
        if not isinstance(value, Reference):
            plain[key] = value
            continue
        name = posixpath.normpath(os.fsdecode(key))
        if name != ".":
            attached[name] = value
        elif value.is_directory:
            attached |= {one.path.rpartition("/")[2]: one for one in value.entries()}
        else:
            raise JobError(f"files['.']: {value.path} is a file, and . a directory",
                           hint="name the file")  # fmt: skip
    if len(attached) > MOST:
        raise JobError(f"files: {len(attached)} names to attach, more than {MOST}",
                       hint="attach a directory with all of them")  # fmt: skip
    _check(attached, {posixpath.normpath(os.fsdecode(key)) for key in plain})
    return Split(msgspec.structs.replace(job, files=plain), attached)


def _check(attached: Collection[str], copied: Collection[str]) -> None:
    """What is copied may lie in what is copied: a later name over an earlier one."""
    for name in copied:
        for place in (*_above(name), name):
            if place in attached:
                raise _in_the_way(name, place)
    for name in attached:
        for place in _above(name):
            if place in attached or place in copied:
                raise _in_the_way(name, place)


def _above(name: str) -> Iterator[str]:
    parts = name.split("/")
    return ("/".join(parts[:count]) for count in range(1, len(parts)))


def _in_the_way(name: str, place: str) -> JobError:
    return JobError(f"files[{name!r}]: {place!r} is in its way",
                    hint="nothing can be put into what is attached")  # fmt: skip


@contextmanager
def held(attached: dict[str, Reference]) -> Iterator[Inputs | None]:
    """The references as inputs of a sandbox, which meanwhile nobody removes."""
    if not attached:
        yield None
        return
    from sandboxd.stores.builds import Store, own_place

    store = Store(own_place())
    keys = sorted({one.key for one in attached.values()})
    with ExitStack() as stack:
        identity: list[int] = []
        for key in keys:
            descriptor = store.hold(key)
            if descriptor is None:
                raise gone(store, key)
            stack.callback(os.close, descriptor)
            identity += store.identity(key)
        yield Inputs(
            store=str(store.objects),
            attachments=tuple(
                Attachment(posixpath.join(one.key, "tree", one.path), name, one.is_directory)
                for name, one in sorted(attached.items())
            ),
            identity=tuple(identity),
        )


@contextmanager
def files_of(reference: Reference) -> Iterator[Path]:
    """Where they lie, for who copies them; meanwhile nobody removes them."""
    with held({"x": reference}) as attached:
        assert attached is not None
        yield Path(attached.store, attached.attachments[0].source)


def gone(store: Store, key: str) -> JobError:
    return JobError(f"build {key[:12]} is not in {store.place} any more",
                    hint="build it again; `sandboxd cache ls` lists what is there")  # fmt: skip
