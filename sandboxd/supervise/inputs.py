"""The references among a job's files: what is attached for them, and who keeps it from going.

A sandbox that waits for its job can mount nothing any more: it has no capabilities, and its filter
says no. So what is attached belongs to how a sandbox is made, and sandboxes made for the same
references serve each other's jobs: to the runner they are of one policy, with spares of their own.
"""

from __future__ import annotations

import os
import posixpath
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from itertools import pairwise

from sandboxd.errors import JobError
from sandboxd.job import Job
from sandboxd.reference import Attachment, Inputs, Reference
from sandboxd.stores.builds import Store, own_place

MOST = 256
"""References of one job, a name of a directory's that is spread out being one."""


@dataclass(frozen=True, slots=True)
class Split:
    """A job without its references, and those."""

    job: Job
    attached: dict[str, Reference] = field(default_factory=dict)
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
            raise JobError(f"files[{key!r}]: {value.path} is a file, and . a directory",
                           hint="name the file")  # fmt: skip
    if len(attached) > MOST:
        raise JobError(f"files: {len(attached)} names to attach, more than {MOST}",
                       hint="attach a directory with all of them")  # fmt: skip
    names = [*attached, *(posixpath.normpath(os.fsdecode(key)) for key in plain)]
    _check(sorted(names))
    return Split(replace(job, files=plain), attached)


def _check(names: list[str]) -> None:
    """Names in order of their parts: who is in the way of another comes right before it."""
    ordered = sorted(name.split("/") for name in names)
    for above, below in pairwise(ordered):
        if below[: len(above)] == above:
            raise JobError(f"files[{'/'.join(below)!r}]: {'/'.join(above)!r} is in its way",
                           hint="nothing can be put into what is attached")  # fmt: skip


@contextmanager
def held(attached: dict[str, Reference]) -> Iterator[Inputs | None]:
    """The references as inputs of a sandbox, which meanwhile nobody removes."""
    if not attached:
        yield None
        return
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


def gone(store: Store, key: str) -> JobError:
    return JobError(f"build {key[:12]} is not in {store.place} any more",
                    hint="build it again; `sandboxd cache ls` lists what is there")  # fmt: skip
