"""From a result of ours to go-judge's: one word for how it ended, numbers in its units, files."""

from __future__ import annotations

import signal
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

from msgspec import UNSET

from sandboxd.errors import HostError, JobError, SandboxError
from sandboxd.result import Output, Result, Status
from sandboxd.serve.gojudge.orders import NANO, Collected, Order
from sandboxd.serve.gojudge.store import Store
from sandboxd.serve.gojudge.wire import CmdResult, Fault, FileError, Word
from sandboxd.serve.wire import Refusal

WORDS: Mapping[Status, Word] = MappingProxyType(
    {
        "ok": "Accepted",
        "nonzero_exit": "Nonzero Exit Status",
        "signaled": "Signalled",
        "cpu_time_limit": "Time Limit Exceeded",
        "wall_time_limit": "Time Limit Exceeded",
        "idle_limit": "Time Limit Exceeded",
        "memory_limit": "Memory Limit Exceeded",
        "output_limit": "Output Limit Exceeded",
        "syscall_denied": "Dangerous Syscall",
        "start_failed": "Internal Error",
        "cancelled": "Signalled",
    }
)
"""What is missing here is told by how the program ended: go-judge has no word for it."""
_NO_FILE = ("is a directory", "is a symbolic link", "is a FIFO", "is a socket", "is a device")


@dataclass(slots=True)
class _Found:
    """What a program left, as the result will have it."""

    texts: dict[str, bytes] = field(default_factory=dict)
    stored: dict[str, str] = field(default_factory=dict)
    faults: list[FileError] = field(default_factory=list)
    over: bool = False
    """A collected stream was longer than it may be."""


def not_run(fault: FileError) -> CmdResult:
    """Of a program whose files could not be put in."""
    return _nothing("File Error", fault.message, [fault])


def failed(error: Exception) -> CmdResult:
    """Of a program that could not be run."""
    if isinstance(error, JobError):
        name = str(error).partition(":")[0]
        fault = FileError(name=name, type="CopyInCopyContent", message=str(error))
        return _nothing("File Error", str(error), [fault])
    hint = error.hint if isinstance(error, SandboxError) else ""
    return _nothing("Internal Error", f"{error} ({hint})" if hint else str(error), [])


def _nothing(status: Word, error: str, faults: list[FileError]) -> CmdResult:
    return CmdResult(
        status=status, exit_status=0, error=error, time=0, memory=0, run_time=0,
        file_error=faults or UNSET,
    )  # fmt: skip


def answer(caller: str, order: Order, result: Result, store: Store, folder: Path) -> CmdResult:
    """In a thread: the result of one program, with what it left. Nothing else is kept of it."""
    found = _Found()
    for stream, wanted in order.streams.items():
        output = result.streams.get(stream)
        _stream(caller, wanted, output, stream in order.silent, (store, found))
    for wanted in order.files:
        _file(caller, order, wanted, result, (store, folder, found))
    status, error = _word(result, found)
    usage = result.usage
    return CmdResult(
        status=status,
        exit_status=_exit_status(result),
        error=error or UNSET,
        time=_nano(usage.cpu_time),
        memory=usage.memory_peak or 0,
        run_time=_nano(usage.wall_time),
        proc_peak=usage.processes_peak or UNSET,
        files={name: data.decode("utf-8", "replace") for name, data in found.texts.items()}
        or UNSET,
        file_ids=found.stored or UNSET,
        file_error=found.faults or UNSET,
    )


def _nano(seconds: float | None) -> int:
    return round((seconds or 0.0) * NANO)


def _exit_status(result: Result) -> int:
    """The number of the signal where there was one."""
    if result.exit_code is not None:
        return result.exit_code
    if result.signal is not None:
        return result.signal.number
    return 0 if result.status == "start_failed" else int(signal.SIGKILL)


def _word(result: Result, found: _Found) -> tuple[Word, str]:
    word = WORDS.get(result.status)
    if word is None:
        word = _by_its_end(result)
    if word in ("Internal Error", "Dangerous Syscall"):
        return word, result.message
    if word == "Accepted" and found.over:
        return "Output Limit Exceeded", "Output Limit Exceeded"
    if word == "Accepted" and found.faults:
        return "File Error", found.faults[0].message
    return word, ""


def _by_its_end(result: Result) -> Word:
    if result.signal is not None:
        over = result.signal.number == signal.SIGXFSZ
        return "Output Limit Exceeded" if over else "Signalled"
    return "Nonzero Exit Status" if result.exit_code else "Accepted"


# -- what it left ----------------------------------------------------------------------------


def _stream(
    caller: str, wanted: Collected, output: Output | None, silent: bool, to: tuple[Store, _Found]
) -> None:
    store, found = to
    data = b"" if output is None else output.data + output.tail
    if output is not None and output.bytes > wanted.most:
        data = output.data[: wanted.most + (not silent)]
        if not silent:
            found.over = True
            found.faults.append(
                FileError(
                    name=wanted.name,
                    type="CollectSizeExceeded",
                    message=f"{wanted.name}: {output.bytes} bytes, more than {wanted.most}",
                )
            )
    _hand_over(caller, wanted, data, (store, found))


def _hand_over(
    caller: str, wanted: Collected, data: bytes | Path, to: tuple[Store, _Found]
) -> None:
    store, found = to
    if not wanted.cached:
        found.texts[wanted.name] = data if isinstance(data, bytes) else data.read_bytes()
        return
    try:
        if isinstance(data, bytes):
            found.stored[wanted.name] = store.save(caller, wanted.name, data)
        else:
            found.stored[wanted.name] = store.link(caller, wanted.name, data)
    except (Refusal, HostError) as error:
        _fault(found, wanted, "CopyOutCopyContent", str(error))


def _file(
    caller: str, order: Order, wanted: Collected, result: Result, to: tuple[Store, Path, _Found]
) -> None:
    store, folder, found = to
    artifact = next((one for one in result.artifacts if one.path == wanted.path), None)
    path = folder / (wanted.path or "")
    if artifact is None:
        why = next((one.reason for one in result.artifact_errors if one.path == wanted.path), "")
        _missing(wanted, why, found)
        return
    data: bytes | Path = path
    if artifact.bytes > wanted.most:
        why = f"{wanted.name}: {artifact.bytes} bytes, more than {wanted.most}"
        _fault(found, wanted, "CopyOutSizeExceeded", why)
        if not order.cmd.copy_out_truncate:
            return
        with path.open("rb") as file:
            data = file.read(wanted.most)
    _hand_over(caller, wanted, data, (store, found))


def _missing(wanted: Collected, why: str, found: _Found) -> None:
    """A file that is not there is no fault of an optional one; what is no file is."""
    if why.startswith(_NO_FILE):
        _fault(found, wanted, "CopyOutNotRegularFile", f"{wanted.name}: {why}")
    elif why.endswith("are left"):
        _fault(found, wanted, "CopyOutSizeExceeded", f"{wanted.name}: {why}")
    elif not wanted.optional:
        why = why or ("no such file" if wanted.path else "only what is below /w is copied out")
        _fault(found, wanted, "CopyOutOpen", f"{wanted.name}: {why}")


def _fault(found: _Found, wanted: Collected, kind: Fault, why: str) -> None:
    found.faults.append(FileError(name=wanted.name, type=kind, message=why))
