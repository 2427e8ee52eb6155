"""From a request of go-judge's to jobs of ours, and what is to be kept of each.

What cannot be done is refused by name: Refusal 400 where the request says what go-judge would not
take or we do not have, Refusal 500 where its parts do not fit together, as go-judge answers.
"""

from __future__ import annotations

import io
import posixpath
import tarfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from sandboxd.errors import JobError
from sandboxd.job import File, Input, Job, Pattern, Pipe, Tar, Terminal
from sandboxd.policy import Limits, Policy
from sandboxd.serve.gojudge.wire import Cmd, CmdFile, FileError, PipeMap, Request
from sandboxd.serve.wire import Refusal

WORK = ("/w", "/box")
"""The working directory, by go-judge's name and by ours."""
NANO = 10**9
COPY_OUT = 64 << 20
"""Bytes of one file that is copied out, where the request does not say."""
MOST = 16
"""Programs of one request."""
STREAMS = {1: "stdout", 2: "stderr"}
HIGHEST_CPU = 65536
EXECUTABLE = 0o777
"""What go-judge gives to everything that is copied in."""


@dataclass(frozen=True, slots=True)
class Sources:
    """Where files come from: a path of this machine's, or one that was stored. Both may refuse."""

    local: Callable[[str], Path]
    stored: Callable[[str], Path]


@dataclass(frozen=True, slots=True)
class Collected:
    """Something that the result is to have under a name."""

    name: str
    most: int
    cached: bool = False
    optional: bool = False
    path: str | None = None
    """Below the working directory; None for a stream, and for what lies elsewhere."""


@dataclass(slots=True)
class Order:
    """One program: its job, and what is to become of what it leaves."""

    cmd: Cmd
    job: Job
    streams: dict[str, Collected] = field(default_factory=dict)
    files: list[Collected] = field(default_factory=list)
    streamed: dict[str, int] = field(default_factory=dict)
    """Stream -> descriptor, of those that are passed on as they come."""
    fed: bool = False
    """Whether its stdin comes live."""
    silent: set[str] = field(default_factory=set)
    """Collected streams that are cut off without a word."""


@dataclass(frozen=True, slots=True)
class Orders:
    """A request that can be carried out; or what keeps its files from going in."""

    request_id: str
    orders: tuple[Order, ...]
    pipes: tuple[Pipe, ...]
    faults: dict[int, FileError]


class _Missing(Exception):
    """A file to be copied in is not there, or has no place to go to."""

    def __init__(self, fault: FileError) -> None:
        super().__init__(fault.message)
        self.fault = fault


def orders(asked: Request, policy: Policy, sources: Sources, *, live: bool = False) -> Orders:
    """What is to be done; `live` is for /stream, whose programs may be fed and followed."""
    cmds = asked.cmd or []
    if len(cmds) > MOST:
        raise Refusal(400, "request", f"{len(cmds)} cmd: not supported, at most {MOST}")
    mapping = asked.pipe_mapping or [] if len(cmds) > 1 else []
    joined = _joined(cmds, mapping)
    found, faults = [], dict[int, FileError]()
    for index, cmd in enumerate(cmds):
        maker = _Maker(index, cmd, policy, sources, live)
        try:
            found.append(maker.make(joined[index]))
        except _Missing as missing:
            faults[index] = missing.fault
            found.append(Order(cmd, Job(argv=["true"])))
    pipes = tuple(
        Pipe(
            writer=one.in_.index,
            reader=one.out.index,
            stream="stdout" if one.in_.fd == 1 else "stderr",
            relay=bool(one.proxy),
        )
        for one in mapping
    )
    return Orders(asked.request_id, tuple(found), pipes, faults)


def _joined(cmds: list[Cmd], mapping: list[PipeMap]) -> list[dict[int, PipeMap]]:
    """For each program, which of its descriptors are pipes."""
    found: list[dict[int, PipeMap]] = [{} for _ in cmds]
    for one in mapping:
        for end, allowed in ((one.in_, (1, 2)), (one.out, (0,))):
            if not 0 <= end.index < len(cmds):
                raise Refusal(500, "request", f"pipe: index out of range {end.index}")
            if end.fd not in allowed:
                what = "written to" if end is one.in_ else "read"
                raise Refusal(400, "request", f"pipe: fd {end.fd} {what}: not supported")
            if end.fd in found[end.index] or _file(cmds[end.index], end.fd) is not None:
                raise Refusal(500, "request", f"pipe: fd already occupied {end.index} {end.fd}")
            found[end.index][end.fd] = one
    return found


def _file(cmd: Cmd, fd: int) -> CmdFile | None:
    files = cmd.files or []
    return files[fd] if fd < len(files) else None


class _Maker:
    """Makes the order of one program."""

    def __init__(self, index: int, cmd: Cmd, policy: Policy, sources: Sources, live: bool) -> None:
        self._where = f"cmd[{index}]"
        self._cmd = cmd
        self._policy = policy
        self._sources = sources
        self._live = live

    def make(self, joined: dict[int, PipeMap]) -> Order:
        cmd = self._cmd
        if not cmd.args:
            raise self._no("args: there are none")
        if len(cmd.files or []) > 3:
            raise self._no("files: descriptors above 2 are not supported")
        order = Order(cmd, Job(argv=["true"]))
        stdin = self._stdin(order, joined)
        for fd in STREAMS:
            self._stream(order, fd, joined)
        taken = {one.name for one in order.streams.values()}
        self._copy_out(order, taken)
        output = self._most_output(order)
        patterns = [
            Pattern(one.path, required=False, literal=True) for one in order.files if one.path
        ]
        try:
            order.job = Job(
                argv=cmd.args,
                policy=self._with_cpus(),
                env=_environment(cmd.env or []),
                stdin=stdin,
                files=self._copy_in(),
                collect=list(dict.fromkeys(patterns)),
                limits=self._limits(output),
                keep=2 * max([one.most + 1 for one in order.streams.values()], default=0),
                terminal=Terminal() if cmd.tty else None,
            )
        except UnicodeEncodeError:  # half a pair of UTF-16
            raise self._no("text that is no UTF-8") from None
        except JobError as error:
            raise self._no(str(error)) from None
        return order

    def _no(self, why: str) -> Refusal:
        return Refusal(400, "request", f"{self._where}: {why}")

    # -- descriptors

    def _stdin(self, order: Order, joined: dict[int, PipeMap]) -> bytes | Path | None:
        file = _file(self._cmd, 0)
        if file is None:
            if self._cmd.files and 0 not in joined:
                raise Refusal(500, "request", f"null file for index/fd: {self._where}/0")
            return b""
        if file.stream_in:
            self._check_live()
            order.fed = True
            return None
        if self._cmd.tty:
            raise self._no("tty: its input can only be a stream: not supported")
        if file.stream_out or _is_collector(file):
            raise self._no("files[0]: descriptor 0 cannot be written to: not supported")
        try:
            return self._content(file, "files[0]")
        except OSError as error:
            why = f"{self._where}: open file {error.filename}: {error.strerror}"
            raise Refusal(500, "file", why) from None

    def _check_live(self) -> None:
        if not self._live:
            raise self._no("file type is not valid: streams are for /stream")

    def _stream(self, order: Order, fd: int, joined: dict[int, PipeMap]) -> None:
        name, file = STREAMS[fd], _file(self._cmd, fd)
        if fd in joined:
            one = joined[fd]
            if one.proxy and one.name:
                self._collect(order, name, one.name, one.max or 0)
                order.silent.add(name)
            return
        if self._cmd.tty and fd == 2:  # it is on the terminal, with stdout
            return
        if file is None:
            if len(self._cmd.files or []) > fd:
                raise Refusal(500, "request", f"null file for index/fd: {self._where}/{fd}")
            return
        if file.stream_out:
            self._check_live()
            order.streamed[name] = fd
        elif _is_collector(file):
            self._collect(order, name, file.name or "", file.max or 0)
        elif file.src != "/dev/null":
            raise self._no(f"files[{fd}]: descriptor {fd} cannot be read: not supported")

    def _collect(self, order: Order, stream: str, name: str, most: int) -> None:
        if any(one.name == name for one in order.streams.values()):
            raise self._no(f"files: two descriptors collected as {name!r}: not supported")
        cached = name in _plain(self._cmd.copy_out_cached)
        order.streams[stream] = Collected(name, max(0, most), cached=cached)

    def _most_output(self, order: Order) -> int | None:
        """What both streams may have together before the program is ended."""
        shown = [one.most + 1 for name, one in order.streams.items() if name not in order.silent]
        count = 2 - len(order.silent) - (1 if self._cmd.tty else 0)
        most = self._policy.limits.output
        if order.streamed or len(shown) < count:
            return None
        total = sum(shown)
        return total if most is None else min(total, most)

    # -- files

    def _content(self, file: CmdFile, where: str) -> bytes | Path:
        if file.src is not None:
            return b"" if file.src == "/dev/null" else self._sources.local(file.src)
        if file.content is not None:
            try:
                return file.content.encode()
            except UnicodeEncodeError:
                raise self._no(f"{where}: text that is no UTF-8") from None
        if file.file_id is not None:
            return self._sources.stored(file.file_id)
        raise self._no(f"{where}: file type is not valid")

    def _copy_in(self) -> dict[str | bytes, Input]:
        found: dict[str | bytes, Input] = {}
        links: dict[str, str] = {}
        for name, file in (self._cmd.copy_in or {}).items():
            place = inside(name)
            if place is None:
                message = f"{name}: only below /w files can be copied in"
                raise _Missing(FileError(name=name, type="CopyInCreateFile", message=message))
            if file.symlink is not None:
                links[place] = file.symlink
                continue
            try:
                content = self._content(file, f"copyIn {name}")
            except OSError as error:
                message = f"{name}: {error.filename}: {error.strerror}"
                raise _Missing(
                    FileError(name=name, type="CopyInOpenFile", message=message)
                ) from None
            found[place] = File(data=content, mode=EXECUTABLE)
        if links:
            found["."] = Tar(_archive(links))
        return found

    def _copy_out(self, order: Order, taken: set[str]) -> None:
        most = self._cmd.copy_out_max or COPY_OUT
        for cached, names in ((False, self._cmd.copy_out), (True, self._cmd.copy_out_cached)):
            for word in names or []:
                name = word.removesuffix("?")
                if name in taken:
                    continue
                optional = word.endswith("?")
                order.files.append(Collected(name, most, cached, optional, inside(name)))

    # -- limits

    def _limits(self, output: int | None) -> Limits:
        cmd = self._cmd
        memory = cmd.memory_limit or None
        stack = cmd.stack_limit or None
        asked = {
            "cpu_time": (cmd.cpu_limit or 0) / NANO or None,
            "wall_time": cmd.clock / NANO or None,
            "memory": memory,
            "stack": min(stack, memory) if stack and memory else stack,
            "processes": cmd.proc_limit or None,
            "cpus": (cmd.cpu_rate_limit or 0) / 1000 or None,
            "address_space": memory if cmd.address_space_limit else None,
            "output": output,
        }
        try:
            return msgspec.convert(
                {name: value for name, value in asked.items() if value is not None}, Limits
            )
        except msgspec.ValidationError as error:
            raise self._no(f"limits: {error}") from None

    def _with_cpus(self) -> Policy:
        if not self._cmd.cpu_set_limit:
            return self._policy
        resources = msgspec.to_builtins(self._policy.resources)
        try:
            found = msgspec.convert(
                {**resources, "cpuset": self._cmd.cpu_set_limit}, type(self._policy.resources)
            )
        except msgspec.ValidationError as error:
            raise self._no(f"cpuSetLimit: {error}") from None
        allowed = self._policy.resources.cpuset
        if allowed is not None and not _cpus(self._cmd.cpu_set_limit) <= _cpus(allowed):
            raise self._no(f"cpuSetLimit: the policy allows {allowed}")
        return msgspec.structs.replace(self._policy, resources=found)


def _is_collector(file: CmdFile) -> bool:
    return file.name is not None and file.max is not None


def _cpus(text: str) -> set[int]:
    """The CPUs of a list that is one: "0-3,8"."""
    found: set[int] = set()
    for part in text.split(","):
        first, _, last = part.partition("-")
        found.update(range(int(first), min(int(last or first), HIGHEST_CPU) + 1))
    return found


def _plain(names: list[str] | None) -> set[str]:
    return {name.removesuffix("?") for name in names or []}


def _environment(words: list[str]) -> dict[str | bytes, str | bytes]:
    """Words without = are no variables, and go-judge's callers send empty ones."""
    pairs = (word.partition("=") for word in words)
    return {name: value for name, equals, value in pairs if name and equals}


def inside(name: str) -> str | None:
    """A name as a path below the working directory; None if it is elsewhere, or no name."""
    path = posixpath.normpath(posixpath.join(WORK[0], name))
    for top in WORK:
        if path.startswith(f"{top}/") and "\0" not in path:
            return path.removeprefix(f"{top}/")
    return None


def _archive(links: dict[str, str]) -> bytes:
    """Links as an archive, which is how links go into a sandbox."""
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for place, target in links.items():
            entry = tarfile.TarInfo(place)
            entry.type, entry.linkname = tarfile.SYMTYPE, target
            archive.addfile(entry)
    return data.getvalue()
