"""Tries what this machine allows and says what it found: JSON in on stdin, JSON out on stdout.

Theory of operation. The supervisor has threads and must not fork, so it starts this program, which
has none, and which forks a child per trial. Child and prober share two pipes:

    prober                                    child
      |                                         | unshare(CLONE_NEWUSER)
      | <- MAPS --------------------------------| only if somebody else has to write its maps
      | (newuidmap, or uid_map itself)          |
      | - DONE, or why not -------------------->|
      |                                         | become root inside; other namespaces; the trial
      | <- outcome -----------------------------|
      |                                         | exit

EOF without an outcome: the child was killed, which is an outcome as well. A child dies with the
prober (PR_SET_PDEATHSIG), and what it started dies with its pid namespace.

Request: {"trials": [name ...], "maps": {"writer", "uids", "gids", "newuidmap", "newgidmap"} or
null, "fuse_overlayfs": path, "cgroup": path}. Answer: {name: {"found", "why", "errno"}}; `why` is
empty if the trial went well.
"""

from __future__ import annotations

import json
import os
import signal
import sys

from sandboxd.launch.trials import TRIALS, Refused, Trial, run_tool, step, write
from sandboxd.linux.namespaces import CLONE_NEWPID, CLONE_NEWUSER, unshare
from sandboxd.linux.process import die_with_parent

_MAPS = b"maps"
_DONE = b"done"
_LONGEST = 65536

TYPE_CHECKING = False  # as typing's, which is not imported for it
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any, NoReturn

    from sandboxd.launch.trials import Request

    Outcome = dict[str, Any]


def main() -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # ignored, it is inherited, and nothing waits
    request = json.load(sys.stdin)
    answer: dict[str, Outcome] = {}
    for name in request["trials"]:
        answer[name] = _attempt(TRIALS[name], request)
        if name == "id_maps" and answer[name]["why"]:
            request["maps"] = None  # the trials after it make do with a single id
    json.dump(answer, sys.stdout)


class _Pipes:
    """One end of the conversation: where to read and where to write."""

    __slots__ = ("reading", "writing")

    def __init__(self, reading: int, writing: int) -> None:
        self.reading = reading
        self.writing = writing

    def receive(self) -> bytes:
        return os.read(self.reading, _LONGEST)

    def send(self, message: bytes) -> None:
        os.write(self.writing, message)

    def close(self) -> None:
        os.close(self.reading)
        os.close(self.writing)


def _attempt(trial: Trial, request: Request) -> Outcome:
    up, down = os.pipe(), os.pipe()
    ours, theirs = _Pipes(up[0], down[1]), _Pipes(down[0], up[1])
    pid = os.fork()
    if pid == 0:
        ours.close()
        _child(trial, request, theirs)
    theirs.close()
    outcome = _converse(ours, pid, request)
    ours.close()
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return outcome or _outcome(why=f"ended without an answer ({_ending(status)})")


def _outcome(found: object = None, why: str = "", errno: int | None = None) -> Outcome:
    return {"found": found, "why": why, "errno": errno}


def _ending(status: int) -> str:
    return f"exit status {status}" if status >= 0 else signal.Signals(-status).name


def _converse(ours: _Pipes, pid: int, request: Request) -> Outcome | None:
    while message := ours.receive():
        if message != _MAPS:
            outcome: Outcome = json.loads(message)
            return outcome
        reply = _DONE
        try:
            _map(pid, request["maps"])
        except Refused as refusal:
            reply = str(refusal).encode()
        ours.send(reply)
    return None


def _map(pid: int, maps: Mapping[str, Any]) -> None:
    """Write the maps of a process in a new user namespace (user_namespaces(7), newuidmap(1))."""
    for tool, file, rows in (
        ("newuidmap", "uid_map", maps["uids"]),
        ("newgidmap", "gid_map", maps["gids"]),
    ):
        if maps["writer"] == "newuidmap":
            run_tool([maps[tool], str(pid), *(str(word) for row in rows for word in row)])
        else:
            with step(f"write /proc/PID/{file}"):
                text = "".join(f"{inside} {outside} {count}\n" for inside, outside, count in rows)
                write(f"/proc/{pid}/{file}", text)


def _child(trial: Trial, request: Request, theirs: _Pipes) -> NoReturn:
    try:
        die_with_parent(signal.SIGKILL)
        if trial.namespaces is not None:
            _enter(trial, request, theirs)
        outcome = _outcome(trial.run(request))
    except Refused as refusal:
        outcome = _outcome(why=str(refusal), errno=refusal.errno)
    except Exception as error:
        outcome = _outcome(why=f"{type(error).__name__}: {error}")
    theirs.send(json.dumps(outcome).encode())
    os._exit(0)


def _enter(trial: Trial, request: Request, theirs: _Pipes) -> None:
    """A user namespace, root inside it, then the other namespaces; as PID 1 if there is one."""
    uid, gid = os.getuid(), os.getgid()
    with step("unshare the user namespace"):
        unshare(CLONE_NEWUSER)
    if trial.ranges and request["maps"]:
        theirs.send(_MAPS)
        reply = theirs.receive()
        if reply != _DONE:
            raise Refused(reply.decode(errors="replace") or "the prober is gone")
    else:
        _map_single(uid, gid)
    with step("become root of the user namespace"):
        os.setresgid(0, 0, 0)
        os.setresuid(0, 0, 0)
    if trial.namespaces:
        with step("unshare other namespaces"):
            unshare(trial.namespaces)
    if (trial.namespaces or 0) & CLONE_NEWPID:
        _become_init()
    die_with_parent(signal.SIGKILL)  # a change of ids, as a fork, cleared it (prctl(2))


def _map_single(uid: int, gid: int) -> None:
    """What an ordinary process may write itself: one id, setgroups(2) given up first."""
    for file, text in (
        ("setgroups", "deny"),
        ("uid_map", f"0 {uid} 1\n"),
        ("gid_map", f"0 {gid} 1\n"),
    ):
        with step(f"write /proc/self/{file}"):
            write(f"/proc/self/{file}", text)


def _become_init() -> None:
    """Go on as PID 1 of the namespace that is for our children; we only wait."""
    with step("fork into the pid namespace"):
        pid = os.fork()
    if pid:
        os.waitpid(pid, 0)
        os._exit(0)
