"""What goes over the wire: submissions, views of jobs, events, problems. Pure: no socket, no file.

Both sides use it: the daemon reads submissions and writes the rest, a client the other way round.
"""

from __future__ import annotations

import base64
import os
import re
from collections.abc import Callable, Mapping
from http import HTTPStatus
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from sandboxd.errors import (
    Busy,
    HostError,
    ImageError,
    JobError,
    LaunchError,
    PolicyError,
    SandboxError,
)
from sandboxd.job import File, Input, Job, Pattern, Tar, Terminal
from sandboxd.policy import Artifacts, Limits, Policy
from sandboxd.result import Event, Result, event_json

NAME = "^[A-Za-z0-9][A-Za-z0-9_.-]{0,127}$"
DIGEST = "^[0-9a-f]{64}$"
MOST_KEPT = 16 << 20
"""Bytes of each stream that a record may keep: it is made in memory."""
FASTEST = 0.01
TRACE = re.compile(r"00-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}")
"""traceparent of W3C Trace Context, version 00."""
FIRST_OF_ATTEMPT = 1 << 32
"""Sequence numbers of a job's second attempt begin here, of its third at twice as much."""

State = Literal["queued", "running", "done"]


class Message(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True
):
    """A JSON object that a caller sends: every key known."""


class Encoded(Message, frozen=True):
    """Bytes that are no UTF-8."""

    b64: bytes


Text = str | Encoded


class Content(Message, frozen=True):
    """The content of a file: exactly one of `data`, `b64` and `sha256` (a file that was PUT)."""

    data: str | None = None
    b64: bytes | None = None
    sha256: Annotated[str, Meta(pattern=DIGEST)] | None = None
    mode: Annotated[int, Meta(ge=0, le=0o777)] = 0o644
    unpack: bool = False
    """It is an archive, and what is in it is put where it is named."""


class Wanted(Message, frozen=True):
    """A pattern of `collect` in full; job.Pattern says what its fields mean."""

    name: Text
    required: bool | None = None
    literal: bool = False


class Size(Message, frozen=True):
    """Of a terminal."""

    rows: Annotated[int, Meta(ge=1, le=65535)] = 24
    columns: Annotated[int, Meta(ge=1, le=65535)] = 80


class Submission(Message, frozen=True):
    """A job, and how the daemon is to treat it."""

    argv: Annotated[tuple[Text, ...], Meta(min_length=1)]
    policy: str | Policy = "base"
    env: dict[str, Text] = msgspec.field(default_factory=dict)
    cwd: Text | None = None
    stdin: str | Content | None = None
    interactive: bool = False
    """stdin comes live, by POST /v1/jobs/{id}/stdin."""
    files: dict[str, Content] = msgspec.field(default_factory=dict)
    collect: tuple[str | Wanted, ...] = ()
    artifacts: Artifacts | None = None
    keep_root: bool | Annotated[str, Meta(pattern=NAME)] = False
    limits: Limits | None = None
    keep: Annotated[int, Meta(ge=0, le=MOST_KEPT)] = 1 << 20
    terminal: Size | None = None
    id: Annotated[str, Meta(pattern=NAME)] | None = None
    priority: Annotated[int, Meta(ge=0, le=9)] = 5
    """9 is first, among the jobs of one caller."""
    on_lost: Literal["report", "retry"] = "report"
    """What happens to a job that ran when the daemon died."""
    overflow: Literal["drop", "stall"] = "drop"
    """What happens when there are more events than are kept and nobody reads them."""
    usage_every: Annotated[float, Meta(ge=FASTEST, le=86400)] | None = None
    ignored: tuple[tuple[str, str], ...] = ()
    """What was asked for where the job was read from, and is not done, and why."""


class SignalRequest(Message, frozen=True):
    """KILL ends the run, STOP freezes it, CONT lets it go on, WINCH resizes its terminal."""

    signal: Literal["KILL", "STOP", "CONT", "WINCH"]
    rows: Annotated[int, Meta(ge=1, le=65535)] | None = None
    columns: Annotated[int, Meta(ge=1, le=65535)] | None = None


class JobView(msgspec.Struct, frozen=True, kw_only=True):
    """A job as the daemon tells of it. Times are RFC 3339 in UTC."""

    id: str
    state: State
    argv: tuple[str, ...]
    policy: str
    priority: int
    attempts: int
    """How often it was started."""
    created_at: str
    started_at: str | None = None
    ended_at: str | None = None
    status: str | None = None
    """The result's, once it is done."""
    traceparent: str | None = None
    result: msgspec.Raw | None = None
    """The record (sandboxd.result/1); left out of lists."""


class JobList(msgspec.Struct, frozen=True, kw_only=True):
    jobs: tuple[JobView, ...]
    next: int | None
    """`before` of the next page; null at the end."""


class FileView(msgspec.Struct, frozen=True, kw_only=True):
    sha256: str
    bytes: int


class PolicyView(msgspec.Struct, frozen=True, kw_only=True):
    name: str
    description: str


class Info(msgspec.Struct, frozen=True, kw_only=True):
    version: str
    caller: str
    """Who you are to the daemon."""
    tenant: str
    """`own`: its jobs share no user namespace and no ids with another's; else what they share."""
    slots: int
    running: int
    queued: int
    draining: bool
    limits: dict[str, int | float | None]
    """What it takes from one caller, and at once."""


class ProblemView(msgspec.Struct, frozen=True, kw_only=True):
    """application/problem+json (RFC 9457)."""

    type: str
    title: str
    status: int
    detail: str
    kind: str
    hint: str


class Refusal(Exception):
    """An answer that says no: an HTTP status, a word, what is wrong and the way out."""

    def __init__(self, status: int, kind: str, detail: str, *, hint: str = "") -> None:
        super().__init__(detail)
        self.status = status
        self.kind = kind
        self.hint = hint
        self.headers: tuple[tuple[str, str], ...] = ()
        self.more: dict[str, Any] = {}

    def with_header(self, name: str, value: str) -> Refusal:
        self.headers += ((name, value),)
        return self

    def json(self) -> dict[str, Any]:
        return {
            "type": "about:blank",
            "title": HTTPStatus(self.status).phrase,
            "status": self.status,
            "detail": str(self),
            "kind": self.kind,
            "hint": self.hint,
            **self.more,
        }


def refusal_of(error: SandboxError, described: dict[str, Any]) -> Refusal:
    """The answer to a request that sandboxd cannot carry out; `described` is error_json's."""
    wrong = isinstance(error, PolicyError | JobError | ImageError)
    found = Refusal(422 if wrong else 500, described["kind"], described["message"])
    found.hint = error.hint
    found.more = {key: value for key, value in described.items() if key not in ("message", "hint")}
    return found


def encode(value: Any) -> bytes:
    return msgspec.json.encode(value)


# -- what comes in ---------------------------------------------------------------------------


def submission(body: bytes) -> Submission:
    """The submission in a body; Refusal says where it is wrong."""
    found: Submission = decode(body, Submission)
    for name, content in found.files.items():
        _one_of(content, f"files[{name!r}]")
    if isinstance(found.stdin, Content):
        _one_of(found.stdin, "stdin")
        if found.stdin.unpack:
            raise Refusal(422, "job", "stdin is nothing to unpack", hint="name it in files")
    if found.interactive and found.stdin is not None:
        raise Refusal(422, "job", "stdin and interactive exclude each other")
    if found.interactive and found.on_lost == "retry":
        raise Refusal(
            422,
            "job",
            "on_lost: an interactive job cannot be retried",
            hint='what was typed is gone: leave on_lost at "report"',
        )
    return found


def decode(body: bytes, kind: Any) -> Any:
    """JSON of this type."""
    try:
        return msgspec.json.decode(body, type=kind)
    except msgspec.ValidationError as error:
        hint = "GET /openapi.json has every field"
        raise Refusal(422, "request", str(error), hint=hint) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise Refusal(400, "request", f"not JSON: {error}") from None


def _one_of(content: Content, where: str) -> None:
    given = [one for one in (content.data, content.b64, content.sha256) if one is not None]
    if len(given) != 1:
        raise Refusal(422, "job", f"{where}: {len(given)} of data, b64 and sha256", hint="give one")


def digests(wanted: Submission) -> set[str]:
    """The stored files that it names."""
    contents = [*wanted.files.values(), wanted.stdin]
    return {one.sha256 for one in contents if isinstance(one, Content) and one.sha256}


def job_of(
    wanted: Submission, whose: tuple[str, str | None], path_of: Callable[[str], Path]
) -> Job:
    """The Job of an id and a domain; `path_of` knows where a stored file is. JobError if wrong."""
    job_id, domain = whose
    files: dict[str, Input] = {
        name: Tar(_content(one, path_of))
        if one.unpack
        else File(data=_content(one, path_of), mode=one.mode)
        for name, one in wanted.files.items()
    }
    size = wanted.terminal
    try:
        return Job(
            argv=tuple(_text(word) for word in wanted.argv),
            policy=wanted.policy,
            env={key: _text(value) for key, value in wanted.env.items()},
            cwd=None if wanted.cwd is None else _text(wanted.cwd),
            stdin=None if wanted.interactive else _stdin(wanted.stdin, path_of),
            files=files,
            collect=tuple(_pattern(one) for one in wanted.collect),
            artifacts=wanted.artifacts,
            keep_root=wanted.keep_root,
            limits=wanted.limits,
            keep=wanted.keep,
            terminal=None if size is None else Terminal(rows=size.rows, columns=size.columns),
            id=job_id,
            domain=domain,
            ignored=wanted.ignored,
        )
    except UnicodeEncodeError:  # half a pair of UTF-16
        raise JobError("text that is no UTF-8", hint='send {"b64": ...}') from None


def _pattern(value: str | Wanted) -> str | Pattern:
    if isinstance(value, str):
        return value
    return Pattern(_text(value.name), required=value.required, literal=value.literal)


def _text(value: Text) -> str | bytes:
    return value if isinstance(value, str) else value.b64


def _content(value: Content, path_of: Callable[[str], Path]) -> bytes | Path:
    if value.sha256 is not None:
        return path_of(value.sha256)
    return value.b64 if value.b64 is not None else (value.data or "").encode()


def _stdin(value: str | Content | None, path_of: Callable[[str], Path]) -> bytes | Path:
    if value is None:
        return b""
    return value.encode() if isinstance(value, str) else _content(value, path_of)


def words(wanted: Submission) -> tuple[str, ...]:
    """The program and its arguments for a person to read, and no more of them than that takes."""
    texts = []
    for word in wanted.argv[:16]:
        text = _text(word)
        if isinstance(text, bytes):
            text = text.decode("utf-8", "backslashreplace")
        texts.append(text if len(text) <= 128 else f"{text[:127]}…")
    return (*texts, "…") if len(wanted.argv) > 16 else tuple(texts)


def traceparent(header: str | None) -> str | None:
    """What W3C Trace Context lets through."""
    return header if header is not None and TRACE.fullmatch(header) else None


# -- events ----------------------------------------------------------------------------------


def event_line(event: Event, attempt: int) -> tuple[int, bytes]:
    """An event's number within its job, and its JSON."""
    seq = event.seq + (attempt - 1) * FIRST_OF_ATTEMPT
    if event.type == "start":
        return seq, b'{"v":1,"seq":%d,"type":"start"}' % seq
    record = event_json(event)
    record["seq"] = seq
    return seq, encode(record)


def last_line(seq: int, record: bytes) -> bytes:
    """The event that has the result, or why there is none; `record` is JSON already."""
    return b'{"v":1,"seq":%d,"type":"exit","result":%s}' % (seq, record)


SEQ = re.compile(rb'\{"v":1,"seq":(\d{1,16}),"type":"([a-z]+)"')


def place(line: bytes) -> tuple[int, str]:
    """Number and type of an event that event_line or last_line made."""
    found = SEQ.match(line)
    if found is None:
        raise ValueError("no event of ours")
    return int(found[1]), found[2].decode()


def ndjson(line: bytes) -> bytes:
    return line + b"\n"


def sse(line: bytes) -> bytes:
    """As the HTML standard has it ("server-sent events"); JSON has no line breaks of its own."""
    seq, kind = place(line)
    return b"id: %d\nevent: %s\ndata: %s\n\n" % (seq, kind.encode(), line)


# -- what a client makes of it ---------------------------------------------------------------


def text_json(value: str | bytes | os.PathLike[str] | os.PathLike[bytes]) -> Any:
    """A word on its way to the daemon."""
    data = os.fsencode(value)
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return {"b64": base64.b64encode(data).decode()}


def content_json(data: bytes, mode: int | None = None) -> dict[str, Any]:
    found: dict[str, Any] = {} if mode is None else {"mode": mode & 0o777}
    try:
        found["data"] = data.decode("utf-8")
    except UnicodeDecodeError:
        found["b64"] = base64.b64encode(data).decode()
    return found


def result_of(record: Mapping[str, Any], data_of: Mapping[str, bytes]) -> Result:
    """The Result of a record; `data_of` has what was collected, by digest."""
    plain = restored({key: value for key, value in record.items() if key != "schema"})
    plain["streams"] = {
        name: {**stream, "data": _bytes(stream, "data"), "tail": _bytes(stream, "tail")}
        for name, stream in record["streams"].items()
    }
    for artifact in plain["artifacts"]:
        artifact["data"] = data_of.get(artifact["sha256"], b"")
    found: Result = msgspec.convert(plain, Result, builtin_types=(bytes,))
    return found


def event_of(record: Mapping[str, Any], result: Result | None) -> Event:
    """The Event of a line, but for its result, which is given."""
    usage = record.get("usage")
    plain = {"seq": record["seq"], "type": record["type"], "data": _bytes(record, "data")}
    event = msgspec.convert({**plain, "usage": usage}, Event, builtin_types=(bytes,))
    return msgspec.structs.replace(event, result=result)


def _bytes(record: Mapping[str, Any], key: str) -> bytes:
    if f"{key}_b64" in record:
        return base64.b64decode(record[f"{key}_b64"])
    return str(record.get(key, "")).encode()


def restored(value: Any) -> Any:
    """What result.carried() did, undone: names of any bytes are str again (PEP 383)."""
    if isinstance(value, list):
        return [restored(one) for one in value]
    if not isinstance(value, dict):
        return value
    found = {}
    for key, one in value.items():
        if key.endswith("_b64") and key[:-4] in value:
            found[key[:-4]] = base64.b64decode(one).decode("utf-8", "surrogateescape")
        elif key not in found:
            found[key] = restored(one)
    return found


_KINDS: Mapping[str, type[SandboxError]] = {
    "policy": PolicyError,
    "job": JobError,
    "image": ImageError,
    "host": HostError,
    "launch": LaunchError,
    "busy": Busy,
}


def error_of(described: Mapping[str, Any]) -> SandboxError:
    """The exception that an `error` object or a problem tells of, with the details it had."""
    kind = _KINDS.get(str(described.get("kind")), SandboxError)
    message = str(described.get("message", described.get("detail", "")))
    error = kind.__new__(kind)
    SandboxError.__init__(error, message, hint=str(described.get("hint", "")))
    for name in ("where", "missing", "stage", "step", "errno", "kind"):
        if name in described:
            setattr(error, name, described[name])
    return error
