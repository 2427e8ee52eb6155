"""What goes over go-judge's wire, as types: requests, results, and messages of its streams. Pure.

Its JSON is read as Go reads it: what is missing is zero, null is nothing, unknown keys are ignored.
Times are nanoseconds, sizes bytes.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from sandboxd.serve.wire import Refusal

Unsigned = Annotated[int, Meta(ge=0, le=(1 << 63) - 1)]
Signed = Annotated[int, Meta(ge=-(1 << 63), le=(1 << 63) - 1)]

REQUEST, RESIZE, INPUT, CANCEL = 1, 2, 3, 4
"""First byte of what a client sends on /stream."""
RESULT, OUTPUT = 1, 2
"""First byte of what it gets."""

Word = Literal[
    "Accepted", "Memory Limit Exceeded", "Time Limit Exceeded", "Output Limit Exceeded",
    "File Error", "Nonzero Exit Status", "Signalled", "Dangerous Syscall", "Internal Error",
]  # fmt: skip
"""How a program ended."""
Fault = Literal[
    "CopyInOpenFile", "CopyInCreateFile", "CopyInCopyContent", "CopyOutOpen",
    "CopyOutNotRegularFile", "CopyOutSizeExceeded", "CopyOutCopyContent", "CollectSizeExceeded",
]  # fmt: skip
"""What went wrong with a file."""


class Camel(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """A JSON object with names in camelCase."""


class CmdFile(Camel, frozen=True):
    """What a descriptor or a name is made of: one of the first four, a collector, or a stream."""

    src: str | None = None
    content: str | None = None
    file_id: str | None = None
    symlink: str | None = None
    name: str | None = None
    max: Signed | None = None
    pipe: bool | None = None
    stream_in: bool | None = None
    stream_out: bool | None = None


class Cmd(Camel, frozen=True):
    """One program."""

    args: list[str] | None = None
    env: list[str] | None = None
    files: list[CmdFile | None] | None = None
    tty: bool | None = None
    cpu_limit: Unsigned | None = None
    real_cpu_limit: Unsigned | None = None
    clock_limit: Unsigned | None = None
    memory_limit: Unsigned | None = None
    stack_limit: Unsigned | None = None
    proc_limit: Unsigned | None = None
    cpu_rate_limit: Unsigned | None = None
    cpu_set_limit: str | None = None
    strict_memory_limit: bool | None = None
    data_segment_limit: bool | None = None
    address_space_limit: bool | None = None
    copy_in: dict[str, CmdFile] | None = None
    copy_out: list[str] | None = None
    copy_out_cached: list[str] | None = None
    copy_out_max: Unsigned | None = None
    copy_out_truncate: bool | None = None

    @property
    def clock(self) -> int:
        """As go-judge takes it: an old name first; where there is none, the limit of CPU time."""
        return self.real_cpu_limit or self.clock_limit or self.cpu_limit or 0


class PipeIndex(Camel, frozen=True):
    index: Signed = 0
    fd: Signed = 0


class PipeMap(Camel, frozen=True):
    """What `in_` writes is what `out` reads: seen from the pipe, not from the programs."""

    in_: PipeIndex = msgspec.field(name="in", default=PipeIndex())
    out: PipeIndex = PipeIndex()
    name: str | None = None
    max: Signed | None = None
    proxy: bool | None = None


class Request(Camel, frozen=True):
    """What is to be run together; on /ws, or what is to be cancelled."""

    request_id: str = ""
    cmd: list[Cmd] | None = None
    pipe_mapping: list[PipeMap] | None = None
    cancel_request_id: str = ""


class FileError(Camel, frozen=True, omit_defaults=True):
    name: str
    type: Fault
    message: str = ""


class CmdResult(Camel, frozen=True, kw_only=True):
    """What became of one program."""

    status: Word
    exit_status: int
    error: str | msgspec.UnsetType = msgspec.UNSET
    time: int
    memory: int
    run_time: int
    proc_peak: int | msgspec.UnsetType = msgspec.UNSET
    files: dict[str, str] | msgspec.UnsetType = msgspec.UNSET
    file_ids: dict[str, str] | msgspec.UnsetType = msgspec.UNSET
    file_error: list[FileError] | msgspec.UnsetType = msgspec.UNSET


class Response(Camel, frozen=True):
    """What is said of a request on /ws and /stream."""

    request_id: str
    results: list[CmdResult]
    error: str | msgspec.UnsetType = msgspec.UNSET


class Resize(Camel, frozen=True):
    """A terminal has another size."""

    index: Signed = 0
    fd: Signed = 0
    rows: Annotated[int, Meta(ge=0, le=65535)] = 0
    cols: Annotated[int, Meta(ge=0, le=65535)] = 0


class Input(msgspec.Struct, frozen=True):
    """Bytes for the stdin of a program."""

    index: int
    fd: int
    content: bytes


class Cancel(msgspec.Struct, frozen=True):
    """The programs are to end."""


def request(body: bytes | str) -> Request:
    """A request; Refusal 400 says where it is wrong."""
    found: Request = _decode(body, Request)
    return found


def _decode(body: bytes | str, kind: Any) -> Any:
    try:
        return msgspec.json.decode(body, type=kind, strict=True)
    except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
        raise Refusal(400, "request", str(error)) from None


def message(data: bytes) -> Request | Resize | Input | Cancel:
    """What a client says on /stream; Refusal 400 for what it cannot say."""
    if not data:
        raise Refusal(400, "request", "an empty message")
    code, rest = data[0], data[1:]
    if code == REQUEST:
        return request(rest)
    if code == RESIZE:
        found: Resize = _decode(rest, Resize)
        return found
    if code == INPUT:
        if not rest:
            raise Refusal(400, "request", "input for nobody")
        return Input(rest[0] >> 4, rest[0] & 15, rest[1:])
    if code == CANCEL:
        return Cancel()
    raise Refusal(400, "request", f"no message begins with {code}")


def output(index: int, fd: int, data: bytes) -> bytes:
    """What a program has written, for /stream."""
    return bytes((OUTPUT, index << 4 | fd)) + data


def result(response: Response) -> bytes:
    """The last message of /stream."""
    return bytes((RESULT,)) + msgspec.json.encode(response)
