"""What happened: the record of a run (`sandboxd.result/1`) and its words.

Seconds are floats and sizes bytes, as measured; what was not measured is None, never 0.
The reference is docs/reference/result.md.
"""

from __future__ import annotations

import base64
from typing import Any, Literal

import msgspec

from sandboxd.errors import (
    Busy,
    HostError,
    ImageError,
    JobError,
    LaunchError,
    PolicyError,
    SandboxError,
)

SCHEMA = "sandboxd.result/1"

Bytes = bytes
"""The type, where a field has its name."""

Status = Literal[
    "ok",
    "nonzero_exit",
    "signaled",
    "cpu_time_limit",
    "wall_time_limit",
    "idle_limit",
    "memory_limit",
    "output_limit",
    "disk_limit",
    "process_limit",
    "syscall_denied",
    "start_failed",
    "artifact_error",
    "cancelled",
]
Fault = Literal["job", "policy", "caller", "sandbox", "host"]


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """A part of the result."""


class PolicyRef(Record, frozen=True):
    name: str
    sha256: str


class Signal(Record, frozen=True):
    """The signal that ended the program, and who sent it where that is known."""

    number: int
    name: str
    sender: str | None = None


class Usage(Record, frozen=True):
    """What the run consumed. `*_source` names where a figure comes from."""

    cpu_time: float | None = None
    cpu_user: float | None = None
    cpu_system: float | None = None
    cpu_time_source: str | None = None
    wall_time: float | None = None
    idle_longest: float | None = None
    memory_current: int | None = None
    memory_peak: int | None = None
    memory_peak_source: str | None = None
    memory_base: int | None = None
    memory_program_peak: int | None = None
    memory_anon_peak: int | None = None
    memory_file_peak: int | None = None
    memory_shmem_peak: int | None = None
    memory_kernel_peak: int | None = None
    memory_events: dict[str, int] | None = None
    swap_peak: int | None = None
    oom_kills: int | None = None
    processes_current: int | None = None
    processes_peak: int | None = None
    processes_peak_source: str | None = None
    process_limit_hits: int | None = None
    io_read: int | None = None
    io_written: int | None = None
    disk_used: int | None = None
    inodes_used: int | None = None
    net_received: int | None = None
    net_sent: int | None = None
    net_connections: int | None = None
    context_switches_voluntary: int | None = None
    context_switches_forced: int | None = None
    pressure: dict[str, float] | None = None
    cpu_throttled: float | None = None
    cpu_throttlings: int | None = None


class Output(Record, frozen=True):
    """One stream: all bytes are counted and hashed, the first and last `kept` are here.

    `data` is the head; when `truncated`, `tail` is the end and what lay between is lost.
    """

    bytes: int
    kept: int
    truncated: bool
    sha256: str
    data: Bytes
    tail: Bytes = b""


class LimitReport(Record, frozen=True):
    """One limit held against what was used.

    action: "none" (not reached), "killed" (the run was stopped for it), "refused" (the kernel
    refused more), "exceeded" (found afterwards), "not enforced".
    """

    limit: float | int
    used: float | int | None
    exceeded: bool | None
    action: Literal["none", "killed", "refused", "exceeded", "not enforced"]


class Violation(Record, frozen=True):
    """A rule that was broken: "syscall", or "network", whose `name` is who was to be reached.

    `name` is None where nobody can know it without being root, and for what came after the 256
    destinations of a run that are told one by one.
    """

    kind: str
    name: str | None
    count: int
    rule: str


class Artifact(Record, frozen=True):
    """A collected file: `path` is relative to the working directory, `mode` its permissions."""

    path: str
    bytes: int
    sha256: str
    mode: int
    data: Bytes = b""


class ArtifactError(Record, frozen=True):
    path: str
    reason: str


class Kept(Record, frozen=True):
    """What the job changed in its root, kept for `sandboxd diff` and `commit`.

    counts: added, changed, deleted, and what a layer cannot have, by its kind. complete: false if
    there was more than a layer may have.
    """

    name: str
    counts: dict[str, int] = {}
    complete: bool = True


class Degraded(Record, frozen=True):
    what: str
    why: str


class Quality(Record, frozen=True):
    grade: Literal["good", "noisy", "unknown"] = "unknown"
    reasons: tuple[str, ...] = ()


class Timing(Record, frozen=True):
    """Seconds; `started_at` and `ended_at` are RFC 3339 in UTC."""

    queued: float
    setup: float
    teardown: float
    started_at: str
    ended_at: str


class HostRef(Record, frozen=True):
    id: str
    kernel: str
    sandboxd: str


class Result(Record, frozen=True):
    """The whole record of one run."""

    job: str
    policy: PolicyRef
    status: Status
    causes: tuple[Status, ...]
    fault: Fault | None
    message: str
    exit_code: int | None
    signal: Signal | None
    core_dumped: bool
    error: str | None
    """start_failed only: the errno's name, as "ENOENT"."""
    usage: Usage
    streams: dict[str, Output]
    limits: dict[str, LimitReport]
    violations: tuple[Violation, ...]
    artifacts: tuple[Artifact, ...]
    artifact_errors: tuple[ArtifactError, ...]
    enforcement: dict[str, str]
    degraded: tuple[Degraded, ...]
    quality: Quality
    timing: Timing
    host: HostRef
    kept: Kept | None = None

    @property
    def ok(self) -> bool:
        return self.status == "ok"

    @property
    def stdout(self) -> bytes:
        """What was kept of stdout: head and tail."""
        return self._kept("stdout")

    @property
    def stderr(self) -> bytes:
        return self._kept("stderr")

    def _kept(self, name: str) -> bytes:
        stream = self.streams.get(name)
        return stream.data + stream.tail if stream else b""


class Event(Record, frozen=True):
    """Something that happened during a run; the last one carries the Result.

    type: start | stdout | stderr | usage | exit.
    """

    seq: int
    type: Literal["start", "stdout", "stderr", "usage", "exit"]
    data: bytes = b""
    usage: Usage | None = None
    result: Result | None = None


def text(key: str, data: bytes) -> dict[str, str]:
    """Bytes in JSON: `key` where they are UTF-8, else `key`_b64."""
    try:
        return {key: data.decode("utf-8")}
    except UnicodeDecodeError:
        return {f"{key}_b64": base64.b64encode(data).decode("ascii")}


def carried(value: Any) -> Any:
    """JSON types whose text is all UTF-8.

    Names may be any bytes. Text that stands for some that are no UTF-8 (PEP 383) has them as
    `\\xff`, and beside it lie the bytes themselves, as `path_b64` beside `path`.
    """
    if isinstance(value, list | tuple):
        return [carried(one) for one in value]
    if isinstance(value, str):
        return _bytes_of(value).decode("utf-8", "backslashreplace")
    if not isinstance(value, dict):
        return value
    record: dict[str, Any] = {}
    for key, one in value.items():
        record[key] = carried(one)
        if isinstance(one, str) and one != record[key]:
            record[f"{key}_b64"] = base64.b64encode(_bytes_of(one)).decode("ascii")
    return record


def _bytes_of(text: str) -> bytes:
    try:
        return text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:  # half a pair of UTF-16, which stands for no bytes
        return text.encode("utf-8", "surrogatepass")


def to_json(value: Result) -> dict[str, Any]:
    """The record as JSON types, in the order of docs/reference/result.md."""
    record: dict[str, Any] = {"schema": SCHEMA}
    record.update(msgspec.to_builtins(value))
    record["streams"] = {name: _stream_json(stream) for name, stream in value.streams.items()}
    record["artifacts"] = [_artifact_json(item) for item in value.artifacts]
    found: dict[str, Any] = carried(record)
    return found


def encoded(value: Result) -> bytes:
    """to_json as JSON, in a tenth of the time: names that are no UTF-8 are rare."""
    record: dict[str, Any] = {"schema": SCHEMA, **msgspec.structs.asdict(value)}
    record["streams"] = {name: _stream_json(stream) for name, stream in value.streams.items()}
    record["artifacts"] = [_artifact_json(item) for item in value.artifacts]
    try:
        return msgspec.json.encode(record)
    except UnicodeEncodeError:
        return msgspec.json.encode(to_json(value))


def _artifact_json(item: Artifact) -> dict[str, Any]:
    names = ("path", "bytes", "sha256", "mode")
    return {name: getattr(item, name) for name in names}


def _stream_json(stream: Output) -> dict[str, Any]:
    record: dict[str, Any] = {
        "bytes": stream.bytes,
        "kept": stream.kept,
        "truncated": stream.truncated,
        "sha256": stream.sha256,
    }
    record.update(text("data", stream.data))
    if stream.truncated:
        record.update(text("tail", stream.tail))
    return record


def event_json(event: Event) -> dict[str, Any]:
    """One line of `--json=stream`."""
    record: dict[str, Any] = {"v": 1, "seq": event.seq, "type": event.type}
    if event.type in ("stdout", "stderr"):
        record.update(text("data", event.data))
    if event.usage is not None:
        record["usage"] = msgspec.to_builtins(event.usage)
    if event.result is not None:
        record["result"] = to_json(event.result)
    return record


def failure_json(error: SandboxError) -> dict[str, Any]:
    """The record where sandboxd itself failed; docs/reference/result.md has its words."""
    return {"schema": SCHEMA, "status": "error", "error": error_json(error)}


def error_json(error: SandboxError) -> dict[str, Any]:
    """Its kind, what it says, the details of its class, and the way out."""
    kinds: dict[type[SandboxError], str] = {
        LaunchError: "launch", HostError: "host", PolicyError: "policy", JobError: "job",
        ImageError: "image", Busy: "busy",
    }  # fmt: skip
    kind = next((word for one, word in kinds.items() if isinstance(error, one)), "internal")
    details = {
        name: value
        for name in ("where", "missing", "stage", "step", "errno")
        if (value := getattr(error, name, None)) is not None
    }
    what = {"kind": kind, "message": str(error.args[0]), **details, "hint": error.hint}
    found: dict[str, Any] = carried(what)
    return found
