"""What goes over the wire of batches: one request for many jobs, and their results. Pure."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from sandboxd.policy import Artifacts, Limits, Policy
from sandboxd.serve.wire import (
    MOST_KEPT,
    Content,
    Message,
    Refusal,
    State,
    Submission,
    Text,
    Wanted,
    encode,
    submission,
)

BATCH = "^[A-Za-z0-9][A-Za-z0-9_.-]{0,99}$"
MOST_CASES = 1000
MOST_MERGED = 64 << 20
"""Bytes of the submissions of all cases of a batch, what they have in common in each of them."""


class Case(Message, frozen=True):
    """What is different in one job of a batch; `env`, `files` and `limits` are added key by key."""

    argv: Annotated[tuple[Text, ...], Meta(min_length=1)] | msgspec.UnsetType = msgspec.UNSET
    policy: str | Policy | msgspec.UnsetType = msgspec.UNSET
    env: dict[str, Text] | msgspec.UnsetType = msgspec.UNSET
    cwd: Text | msgspec.UnsetType | None = msgspec.UNSET
    stdin: str | Content | msgspec.UnsetType | None = msgspec.UNSET
    files: dict[str, Content] | msgspec.UnsetType = msgspec.UNSET
    collect: tuple[str | Wanted, ...] | msgspec.UnsetType = msgspec.UNSET
    artifacts: Artifacts | msgspec.UnsetType | None = msgspec.UNSET
    limits: Limits | msgspec.UnsetType | None = msgspec.UNSET
    keep: Annotated[int, Meta(ge=0, le=MOST_KEPT)] | msgspec.UnsetType = msgspec.UNSET
    ignored: tuple[tuple[str, str], ...] | msgspec.UnsetType = msgspec.UNSET


class BatchSubmission(Message, frozen=True):
    """Many jobs at once: what they have in common, and what each has of its own."""

    job: Submission
    cases: Annotated[tuple[Case, ...], Meta(min_length=1, max_length=MOST_CASES)]
    id: Annotated[str, Meta(pattern=BATCH)] | None = None
    stop: Literal["never", "failure"] = "never"
    """failure: what comes after a case that does not end as `ok` is cancelled."""


class CaseView(msgspec.Struct, frozen=True, kw_only=True):
    id: str
    """Of its job."""
    state: State | Literal["gone"]
    status: str | None


class BatchView(msgspec.Struct, frozen=True, kw_only=True):
    id: str
    state: Literal["running", "done"]
    stop: str
    created_at: str
    cases: tuple[CaseView, ...]


def cases_of(batch: BatchSubmission) -> list[bytes]:
    """A whole submission for each case, as JSON; Refusal says which is wrong."""
    job = batch.job
    if job.id is not None or job.interactive or job.keep_root:
        raise Refusal(
            422,
            "job",
            "job: id, interactive and keep_root are not for a batch",
            hint="the batch has an id, and its jobs that with .0, .1 ...",
        )
    bodies, size = [], 0
    for number, case in enumerate(batch.cases):
        body = encode(_merged(job, case))
        try:
            submission(body)
        except Refusal as refusal:
            refusal.args = (f"cases[{number}]: {refusal}",)
            raise
        bodies.append(body)
        size += len(body)
        if size > MOST_MERGED:
            raise Refusal(
                413,
                "request",
                f"cases[{number}]: the cases so far are more than {MOST_MERGED} bytes, each whole",
                hint="store what they have in common: PUT /v1/files/{sha256}",
            )
    return bodies


def _merged(job: Submission, case: Case) -> Submission:
    names = [one for one in case.__struct_fields__ if getattr(case, one) is not msgspec.UNSET]
    changes: dict[str, Any] = {name: getattr(case, name) for name in names}
    for name in ("env", "files"):
        if name in changes:
            changes[name] = {**getattr(job, name), **changes[name]}
    if (limits := changes.get("limits")) is not None and job.limits is not None:
        own = {one: value for one in limits.__struct_fields__
               if (value := getattr(limits, one)) is not None}  # fmt: skip
        changes["limits"] = msgspec.structs.replace(job.limits, **own)
    return msgspec.structs.replace(job, **changes)


def case_line(number: int, job: str, status: str, record: bytes) -> bytes:
    """A case of a batch that is over."""
    head = b'{"v":1,"seq":%d,"type":"case","job":"%s","status":"%s","result":%s}'
    return head % (number, job.encode(), status.encode(), record)


def end_line(number: int) -> bytes:
    """There are no more cases."""
    return b'{"v":1,"seq":%d,"type":"end"}' % number
