"""`sandboxd run` by a daemon: the same output, exit status and record, and no trio here.

Theory of operation. The job belongs to our connection, on which its events come; reading them is
what keeps it going. stdin goes by a thread of its own. A signal cancels the job; what it still has
to say gets a moment to be written, then is dropped, and the last event brings the result as always.
A second signal does not wait for that either. What breaks a wait off is an exception raised by the
handler of the signal, and only where one is waited for.

What the daemon says is JSON already, and is passed on as such: no type of ours is needed for it,
and loading those takes longer than many a job.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import errno
import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from sandboxd.cli import attach, flags, inputs, remote
from sandboxd.cli.attach import (
    CHUNK,
    END_OF_FILE,
    LAST_WORDS,
    PATIENCE,
    STDERR,
    STDIN,
    STDOUT,
    Ending,
)
from sandboxd.cli.submit import _content, _files, _text
from sandboxd.errors import JobError, SandboxError

if TYPE_CHECKING:
    from sandboxd.job import Job
    from sandboxd.serve.plain import Plain

NDJSON = "application/x-ndjson"
LOCAL = "local"
HERE = f"leave it out, or run it without the daemon: --host {LOCAL}"


def wanted(args: argparse.Namespace) -> bool:
    """Whether a daemon is to run it: --host, or $SANDBOXD_HOST."""
    if args.host == LOCAL:
        return False
    return bool(args.host or os.environ.get("SANDBOXD_HOST"))


def described(args: argparse.Namespace) -> Job | None:
    """The job that a bundle describes, which is read here; JobError for what cannot go there."""
    _check(args, remote.daemon(args))
    return flags.described(args)[1] if args.bundle is not None or args.strict else None


def run(args: argparse.Namespace, meant: Job | None) -> Ending:
    """Have it run; SandboxError is what could not be done."""
    daemon = remote.daemon(args)
    live = _on_terminal(args, meant) and _is_fed(args, meant)
    with attach.raw_terminal() if live else contextlib.nullcontext():
        here = _Here(args, daemon)
        with here.obeying():
            _carry_out(args, daemon, here, meant)
    return here.ending


def _on_terminal(args: argparse.Namespace, meant: Job | None) -> bool:
    return args.tty or (meant is not None and meant.terminal is not None)


def _is_fed(args: argparse.Namespace, meant: Job | None) -> bool:
    """Whether what is typed goes there; to the terminal of a bundle by itself."""
    if args.tty or meant is None or meant.terminal is None:
        return bool(args.interactive)
    return args.stdin is None


def _carry_out(args: argparse.Namespace, daemon: Plain, here: _Here, meant: Job | None) -> None:
    given = flags.policy_flags(args)
    submission, feeder = _submission(args, daemon, given, meant), _feeder(args, meant)
    try:
        here.follow(submission, feeder)
    except SandboxError as error:
        # Our own daemon takes a policy of ours; another's takes lower limits.
        if getattr(error, "kind", "") != "denied" or isinstance(submission["policy"], str):
            raise
        if set(given) - {"limits"} or meant is not None:
            raise
        here.follow({**submission, **_tightened(args)}, feeder)
    record = here.record
    if record is None:
        return
    if record["status"] == "error":
        from sandboxd.serve.wire import error_of

        raise error_of(record["error"])
    if record["artifacts"] and args.collect_to is not None:
        _save(args, daemon, record)
    here.ending.record = record
    here.ending.result = _seen(record)


def _seen(value: Any) -> Any:
    """A record of JSON with attributes, as a Result has them."""
    if isinstance(value, dict):
        return SimpleNamespace(**{key: _seen(one) for key, one in value.items()})
    return [_seen(one) for one in value] if isinstance(value, list) else value


def _save(args: argparse.Namespace, daemon: Plain, record: dict[str, Any]) -> None:
    from sandboxd.serve.wire import result_of
    from sandboxd.supervise.artifacts import save

    found = remote.collected(daemon, record)
    kept = [one for one in result_of(record, found).artifacts if one.sha256 in found]
    save(kept, args.collect_to)


# -- what is asked for -----------------------------------------------------------------------


def _check(args: argparse.Namespace, daemon: Plain) -> None:
    """JobError, by its name, for what does not go over the wire."""
    from sandboxd.serve.address import Tcp

    never = {
        "--cgroup": args.cgroup,
        "--keep": args.keep,
        "--commit": args.commit,
        "--built": args.built,
        "--files-from": args.files_from,
        "--collect-optional": args.collect_optional,
        "--collect-required": args.collect_required,
    }
    for flag, value in never.items():
        if value:
            raise JobError(f"{flag}: not by the daemon at {daemon.address}", hint=HERE)
    others = set(flags.policy_flags(args)) - {"limits"}
    own = bool(others) or _is_path(args.policy) or args.bundle is not None
    if isinstance(daemon.address, Tcp) and own:
        flag = min(others, default="--policy FILE")
        flag = "--bundle" if args.bundle is not None else flag
        hint = f"there a policy is named, and limits are lowered; {HERE}"
        raise JobError(f"{flag}: not by a daemon on TCP", hint=hint)


def _is_path(policy: str | None) -> bool:
    return policy is not None and ("/" in policy or policy.endswith(".toml"))


def _submission(
    args: argparse.Namespace, daemon: Plain, given: dict[str, Any], meant: Job | None
) -> dict[str, Any]:
    from sandboxd.serve.address import Unix

    found: dict[str, Any] = {"policy": flags.policy_name(args), "overflow": "stall"}
    words = [os.fsencode(word) for word in flags.words(args)]
    if given and not isinstance(daemon.address, Unix):
        found |= _tightened(args)
    elif given or _is_path(args.policy) or meant is not None:
        import msgspec

        if meant is None:
            policy = flags.policy(args, flags.described(args)[0])
            words = flags.argv(args, policy.root)
        else:
            assert not isinstance(meant.policy, str)
            policy = flags.policy(args, meant.policy)
            words = [os.fsencode(word) for word in meant.argv]
        found["policy"] = msgspec.to_builtins(policy)
    if not words:
        raise flags.no_program()
    found["argv"] = [_text(word) for word in words]
    found["keep"] = args.keep_output
    found["collect"] = args.collect
    found |= _surroundings(args, meant)
    found |= _inputs(args, daemon, _is_fed(args, meant))
    return found


def _tightened(args: argparse.Namespace) -> dict[str, Any]:
    limits: dict[str, float] = {}
    for field, (value, flag) in flags.given_limits(args).items():
        if value is None:
            raise JobError(f"{flag} unlimited: not by this daemon", hint="limits can be lowered")
        limits[field] = value
    return {"policy": flags.policy_name(args), "limits": limits}


def _surroundings(args: argparse.Namespace, meant: Job | None) -> dict[str, Any]:
    found: dict[str, Any] = {}
    env = inputs.environment(args.env_file, args.env, os.environb)
    if args.tty:
        env.setdefault(b"TERM", os.environb.get(b"TERM", b"xterm"))
    if _on_terminal(args, meant):
        found["terminal"] = flags.window()
    if meant is not None:
        env = {**meant.env, **env}
        found |= {"ignored": meant.ignored}
        if meant.cwd is not None:
            found["cwd"] = _text(os.fsencode(meant.cwd))
    found["env"] = {os.fsdecode(key): _text(os.fsencode(value)) for key, value in env.items()}
    for name in found["env"]:
        if not name.isprintable() or not _is_text(name):
            raise JobError(f"-e {name!r}: not by a daemon", hint="its name is no text")
    if args.workdir is not None:
        found["cwd"] = _text(os.fsencode(os.path.join(flags.WORK, args.workdir)))
    if args.name is not None:
        found["id"] = args.name
    if args.usage_every is not None:
        found["usage_every"] = args.usage_every
    return found


def _is_text(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _inputs(args: argparse.Namespace, daemon: Plain, fed: bool) -> dict[str, Any]:
    if args.stdin is not None and args.interactive:
        raise JobError("--stdin and --interactive exclude each other", hint="leave one of them out")
    found: dict[str, Any] = {"files": {}}
    if fed:
        found["interactive"] = True
    elif args.stdin is not None:
        found["stdin"] = _content(daemon, args.stdin, f"--stdin {args.stdin}")
    for source, name in args.file:
        inputs.check_source(source)
        for path, inner in _files(Path(source), name):
            content = _content(daemon, path, f"--file {path}")
            found["files"][inner] = {**content, "mode": os.stat(path).st_mode & 0o777}
    return found


# -- while it runs ---------------------------------------------------------------------------


class _Dropped(BaseException):
    """What is being written is not waited for any more."""


class _Hurried(BaseException):
    """Nothing is."""


Feeder = Callable[["Plain", str], None]


class _Here:
    """Our side of a run: its events go out, our signals end it."""

    def __init__(self, args: argparse.Namespace, daemon: Plain) -> None:
        self.ending = Ending()
        self.record: dict[str, Any] | None = None
        self._args = args
        self._daemon = daemon
        self._target: str | None = None
        self._writing = self._waiting = self._deaf = False

    @contextlib.contextmanager
    def obeying(self) -> Iterator[None]:
        """Our signals, while this lasts; who is in a hurry leaves it early."""
        handlers = dict.fromkeys(attach.wanted_signals(), self._obey)
        before = {one: signal.signal(one, handler) for one, handler in handlers.items()}
        before[signal.SIGALRM] = signal.signal(signal.SIGALRM, self._alarm)
        self._waiting = True
        try:
            yield
        except _Hurried:
            pass
        finally:
            self._waiting = False
            signal.setitimer(signal.ITIMER_REAL, 0)
            for one, handler in before.items():
                signal.signal(one, handler)

    def _obey(self, number: int, _: object) -> None:
        if number == signal.SIGWINCH:
            self._say("POST", "/signal", {"signal": "WINCH", **flags.window()})
            return
        again, self.ending.signal = self.ending.signal is not None, self.ending.signal or number
        if again or self._target is None:
            self._leave()
        else:
            self._end()

    def _end(self) -> None:
        """It is to end; its last words get a moment, its result some seconds."""
        self._say("DELETE", "", None)
        signal.setitimer(signal.ITIMER_REAL, LAST_WORDS, PATIENCE)

    def _say(self, method: str, path: str, body: object) -> None:
        if self._target is not None:
            with contextlib.suppress(SandboxError):  # it is over, or the daemon: we hear of it
                self._daemon.ask(method, self._target + path, body)

    def _alarm(self, *_: object) -> None:
        again, self._deaf = self._deaf, True
        if again:
            self._leave()
        elif self._writing:
            self._writing = False
            raise _Dropped

    def _leave(self) -> None:
        if self._waiting:
            self._waiting = False
            raise _Hurried

    def follow(self, submission: dict[str, Any], feed: Feeder | None) -> None:
        """Submit it and show its events to the last one."""
        body, headers = json.dumps(submission).encode(), {"Accept": NDJSON}
        target = "/v1/jobs?wait=1"
        with self._daemon.asking("POST", target, body, headers) as answer:
            self._target = answer.headers["location"]
            for line in answer.lines():
                self._event(json.loads(line), feed)
        self._target = None
        if self.record is None:
            raise SandboxError("the daemon ended before there was a result",
                               hint="its log says why")  # fmt: skip

    def _event(self, told: dict[str, Any], feed: Feeder | None) -> None:
        if told["type"] == "start" and feed is not None and self._target is not None:
            import threading

            threading.Thread(target=feed, args=(self._daemon, self._target), daemon=True).start()
        if told["type"] == "exit":
            self.record = told["result"]
            if told["result"]["status"] == "error":  # who called us tells that
                return
        if self._args.json == "stream":
            self._args.following = told["seq"] + 1
            self._show(STDOUT, json.dumps(told).encode() + b"\n")
        elif self._args.json is None and told["type"] in ("stdout", "stderr"):
            data = base64.b64decode(told["data_b64"]) if "data_b64" in told else None
            fd = STDOUT if told["type"] == "stdout" else STDERR
            self._show(fd, told["data"].encode() if data is None else data)

    def _show(self, fd: int, data: bytes) -> None:
        if self._deaf:
            return
        try:
            self._writing = True
            attach.write_all(fd, data)
            self.ending.open_line = attach.leaves_line_open(fd, data)
        except _Dropped:
            return
        except OSError as error:
            self._writing = False
            self.ending.error, self._deaf = error, True
            self._end()
        finally:
            self._writing = False


# -- stdin -----------------------------------------------------------------------------------


def _feeder(args: argparse.Namespace, meant: Job | None) -> Feeder | None:
    """Forwards our stdin to its end, in a thread; a job may have closed its own before."""
    if not _is_fed(args, meant):
        return None

    def feed(daemon: Plain, target: str) -> None:
        with contextlib.suppress(SandboxError, OSError):
            pieces = _typed(_on_terminal(args, meant))
            with daemon.asking("POST", f"{target}/stdin?eof=1", pieces) as answer:
                answer.body()

    return feed


def _typed(terminal: bool) -> Iterator[bytes]:
    last = b"\n"
    while data := _read():
        last = data[-1:]
        yield data
    if terminal:  # in the middle of a line the first one only ends the line
        yield END_OF_FILE if last == b"\n" else END_OF_FILE * 2


def _read() -> bytes:
    import select

    while True:
        try:
            return os.read(STDIN, CHUNK)
        except BlockingIOError:
            select.select([STDIN], [], [])
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            return b""
