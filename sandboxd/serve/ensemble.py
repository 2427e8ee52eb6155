"""What goes over the wire of jobs that run together: groups, pipelines, and their events. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from sandboxd.group import Group, Member
from sandboxd.job import Job, Pipe
from sandboxd.serve.wire import (
    FASTEST,
    SEQ,
    JobView,
    Message,
    Refusal,
    State,
    Submission,
    encode,
    submission,
)

ID = "^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$"
"""Of a group or a pipeline: with a member's name behind it, it is the id of a job."""
MOST_MEMBERS = 64
MOST_JOBS = 16
OF_ALL = {"priority": 5, "on_lost": "report", "usage_every": None}
"""Fields of a job that a member has no say in."""


class MemberSubmission(Message, frozen=True):
    """A member of a group; group.Member says what its fields mean."""

    job: Submission
    address: str | None = None
    after: tuple[str, ...] = ()
    ready: str = "started"


class GroupSubmission(Message, frozen=True):
    """Jobs that reach each other; group.Group says what its fields mean."""

    members: Annotated[dict[str, MemberSubmission], Meta(min_length=1, max_length=MOST_MEMBERS)]
    name: str = "group"
    share: Literal["bridge", "network"] = "bridge"
    subnet: str = "192.168.100.0/24"
    main: str | None = None
    stop: Literal["failure", "exit", "never"] = "failure"
    id: Annotated[str, Meta(pattern=ID)] | None = None
    priority: Annotated[int, Meta(ge=0, le=9)] = 5
    usage_every: Annotated[float, Meta(ge=FASTEST, le=86400)] | None = None


class PipeSubmission(Message, frozen=True):
    """What `writer` writes to `stream` is the stdin of `reader`; job.Pipe says more."""

    writer: Annotated[int, Meta(ge=0, lt=MOST_JOBS)]
    reader: Annotated[int, Meta(ge=0, lt=MOST_JOBS)]
    stream: Literal["stdout", "stderr"] = "stdout"
    relay: bool = False
    limit: Annotated[int, Meta(ge=0)] | None = None


class PipelineSubmission(Message, frozen=True):
    """Jobs that are joined by pipes."""

    jobs: Annotated[tuple[Submission, ...], Meta(min_length=1, max_length=MOST_JOBS)]
    pipes: tuple[PipeSubmission, ...] = ()
    id: Annotated[str, Meta(pattern=ID)] | None = None
    priority: Annotated[int, Meta(ge=0, le=9)] = 5
    usage_every: Annotated[float, Meta(ge=FASTEST, le=86400)] | None = None


class GroupView(msgspec.Struct, frozen=True, kw_only=True):
    """A group as the daemon tells of it."""

    id: str
    state: State
    created_at: str
    ended_by: str | None
    """The member whose end stopped the others."""
    decisive: str | None
    """The member whose status counts; null before the end, and if all ended well."""
    members: dict[str, JobView]


class PipelineView(msgspec.Struct, frozen=True, kw_only=True):
    """A pipeline as the daemon tells of it."""

    id: str
    state: State
    created_at: str
    jobs: tuple[JobView, ...]


Parts = Mapping[str, Submission]
"""The jobs by name; those of a pipeline are called 0, 1 ..."""


def parts(wanted: GroupSubmission | PipelineSubmission) -> Parts:
    if isinstance(wanted, GroupSubmission):
        return {name: one.job for name, one in wanted.members.items()}
    return {str(number): one for number, one in enumerate(wanted.jobs)}


def place_of(wanted: GroupSubmission | PipelineSubmission, name: str) -> str:
    """Where a job is in the request, for what is said of it."""
    return f"members.{name}" if isinstance(wanted, GroupSubmission) else f"jobs[{name}]"


def bodies(wanted: GroupSubmission | PipelineSubmission) -> dict[str, bytes]:
    """A submission for each job, as JSON; Refusal says which is wrong."""
    found = {}
    for name, one in parts(wanted).items():
        where = place_of(wanted, name)
        for field, common in OF_ALL.items():
            if getattr(one, field) != common:
                raise Refusal(422, "job", f"{where}: {field} is not for one of them alone",
                              hint="leave it out")  # fmt: skip
        of_all = {"priority": wanted.priority, "usage_every": wanted.usage_every}
        found[name] = encode(msgspec.structs.replace(one, **of_all))
        try:
            submission(found[name])
        except Refusal as refusal:
            raise named(refusal, where) from None
    return found


def named(refusal: Refusal, where: str) -> Refusal:
    """The same, saying of which job it is."""
    refusal.args = (f"{where}: {refusal}",)
    return refusal


def group_of(wanted: GroupSubmission, jobs: Mapping[str, Job]) -> Group:
    """JobError if it cannot be."""
    members = {
        name: Member(job=jobs[name], address=one.address, after=one.after, ready=one.ready)
        for name, one in wanted.members.items()
    }
    return Group(
        members=members,
        name=wanted.name,
        share=wanted.share,
        subnet=wanted.subnet,
        main=wanted.main,
        stop=wanted.stop,
    )


def pipes_of(wanted: PipelineSubmission) -> Sequence[Pipe]:
    return [
        Pipe(
            writer=one.writer,
            reader=one.reader,
            stream=one.stream,
            relay=one.relay,
            limit=one.limit,
        )
        for one in wanted.pipes
    ]


# -- events ----------------------------------------------------------------------------------


def member_line(line: bytes, name: str) -> bytes:
    """An event of a job as one of its group's: the same, and whose it is."""
    found = SEQ.match(line)
    if found is None:
        raise ValueError("no event of ours")
    return b'%s,"member":"%s"%s' % (found[0], name.encode(), line[found.end() :])


def end_line(view: GroupView | PipelineView) -> bytes:
    """There is nothing more."""
    if isinstance(view, PipelineView):
        return b'{"v":1,"seq":%d,"type":"end"}' % len(view.jobs)
    told = encode({"ended_by": view.ended_by, "decisive": view.decisive})
    return b'{"v":1,"seq":%d,"type":"end",%s' % (len(view.members), told[1:])
