"""After a run: what it changed in its root becomes a layer and a list (images/kept.py)."""

from __future__ import annotations

import errno
import time

from sandboxd.compile import changes
from sandboxd.compile.build import with_user
from sandboxd.errors import JobError, LaunchError
from sandboxd.images import kept
from sandboxd.images.importing import Imported
from sandboxd.images.kept import Change, KeptRecord, KeptRoot, find_kept, kept_roots
from sandboxd.images.unpacking import Limits
from sandboxd.job import Job
from sandboxd.policy import Policy
from sandboxd.probe.host import probe
from sandboxd.result import Kept, Result
from sandboxd.supervise.porter import Porter
from sandboxd.supervise.prepared import Prepared
from sandboxd.supervise.sandboxes import Sandbox

__all__ = ["Change", "KeptRoot", "check", "commit", "find_kept", "keep", "kept_roots"]

CAPS = Limits()
"""As much as an import takes."""


def check(job: Job, policy: Policy) -> None:
    """JobError if there will be nothing to keep, or no name for it; HostError without a place."""
    if not policy.root.writable:
        raise JobError("keep_root: the root is read-only, so nothing in it will change",
                       hint=f"root.writable in {policy.name}, or --writable-root")  # fmt: skip
    kept.check_place()
    if isinstance(job.keep_root, str):
        kept.check_free(job.keep_root)
    elif job.id is not None:
        kept.check_free(job.id)


async def keep(job: Job, result: Result, box: Sandbox, prepared: Prepared, porter: Porter) -> Kept:
    """Read the upper of a sandbox that is dead."""
    assert box.area is not None
    name = job.keep_root if isinstance(job.keep_root, str) else result.job
    compiled, policy, image = prepared.compiled, prepared.compiled.policy, prepared.compiled.image
    identity = with_user(policy, image).identity
    ids: list[int] = []
    if box.uid is not None:  # nobody has it afterwards
        uid = box.uid if identity.uid is None else identity.uid
        ids = [box.uid, uid, uid if identity.gid is None else identity.gid]
    request = {
        "do": "pack",
        "trees": changes.trees(policy, prepared.host),
        "ours": changes.ours(compiled.setup),
        "marks": compiled.root_driver == "fuse",
        "ids": ids,
        "bytes": CAPS.bytes,
        "entries": CAPS.entries,
    }
    with kept.new(name) as made:
        wanted = [box.area.mounts["area"], made.layer, made.changes]
        try:
            found = await porter.ask(request, wanted)
        except LaunchError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise kept.no_room() from error
            raise
        record = KeptRecord(
            name=name, job=result.job, status=result.status, policy=policy.name,
            source="" if policy.root.image else policy.root.source,
            image=image.name if image else "", image_id=image.id if image else "",
            kept=time.time(), counts=found["counts"], complete=found["complete"],
        )  # fmt: skip
        made.keep(record)
    return Kept(name=name, counts=found["counts"], complete=found["complete"])


def commit(kept_root: KeptRoot, name: str, limits: Limits | None = None) -> Imported:
    """Make an image of a kept root and the image that it was made in. It takes a moment.

    ImageError if its root was no image, or is not there any more.
    """
    from sandboxd.compile.idmap import tenant_ids

    return kept.commit(kept_root, name, tenant_ids(probe()), limits or CAPS)
