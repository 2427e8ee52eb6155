"""Starts launch/prober.py, which tries things in processes of their own, and reads its answer."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import msgspec

from sandboxd.plan import IdMap

_ROOT = Path(__file__).resolve().parents[2]
_PATIENCE = 60.0
"""Seconds for all trials together; a machine in emulation takes a few."""

# -I leaves the caller's directory and environment out, so where the package lies must be said.
_BOOTSTRAP = """\
import sys
sys.path.insert(0, sys.argv[1])
from sandboxd.launch.prober import main
main()
"""

SOURCES = tuple(f"{_ROOT}/sandboxd/launch/{name}.py" for name in ("prober", "trials"))


class Outcome(msgspec.Struct, frozen=True):
    """What one trial found; or `why` it found nothing, with the errno if the kernel said so."""

    found: object = None
    why: str = ""
    errno: int | None = None

    @property
    def ok(self) -> bool:
        return not self.why


class Tools(msgspec.Struct, frozen=True):
    """Programs of others, by path; None where PATH has none."""

    newuidmap: str | None
    newgidmap: str | None
    fuse_overlayfs: str | None
    slirp4netns: str | None = None
    pasta: str | None = None

    @classmethod
    def in_path(cls) -> Tools:
        names = ("newuidmap", "newgidmap", "fuse-overlayfs", "slirp4netns", "pasta")
        return cls(*map(shutil.which, names))

    def found(self) -> dict[str, str]:
        return {name: path for name, path in msgspec.structs.asdict(self).items() if path}


def attempt(
    trials: Iterable[str],
    *,
    ids: IdMap | None = None,
    tools: Tools,
    cgroup: str | None = None,
    place: Callable[[int], None] = lambda _: None,
    carriers: Mapping[str, Sequence[str]] = MappingProxyType({}),
) -> dict[str, Outcome]:
    """One outcome a trial, whatever happens to the prober.

    `carriers`: the argv of each kind that is to be tried.
    `place` gets its pid before it has anything to do, and may move it into another cgroup.
    """
    from sandboxd.compile import bridge
    from sandboxd.compile.carrying import INTERFACE

    names = tuple(trials)
    maps = None if ids is None else {**msgspec.structs.asdict(ids), **msgspec.structs.asdict(tools)}
    request = {
        "trials": names,
        "maps": maps,
        "fuse_overlayfs": tools.fuse_overlayfs,
        "cgroup": cgroup,
        "bridge": [message.hex() for message in bridge.trial()],
        "namespace": bridge.TRIAL_NAMESPACE,
        "carriers": dict(carriers),
        "interface": INTERFACE,
        **_network(),
    }
    try:
        said, complained, status = _ask(json.dumps(request), place)
    except (OSError, subprocess.SubprocessError) as error:
        return dict.fromkeys(names, Outcome(why=f"the prober: {error}"))
    answer = parse(said)
    if set(answer) != set(names):
        why = complained.strip().rpartition("\n")[2] or f"exit status {status}"
        return dict.fromkeys(names, Outcome(why=f"the prober: {why}"))
    return answer


def _network() -> dict[str, object]:
    """What is tried of a network with a way out, as messages."""
    from sandboxd.compile import netlink, nftables
    from sandboxd.compile.egress import Caps, parse

    egress = parse(("*", "example.org:443"))
    caps = {"filter": Caps(), "filter_bytes": Caps(bytes=1), "filter_rate": Caps(rate=1 << 20)}
    filters = {
        name: nftables.ruleset(msgspec.structs.replace(egress, caps=one)).hex()
        for name, one in caps.items()
    }
    return {**filters, "shaper": netlink.add_shaper(LOOPBACK, 1 << 20, 1 << 20).hex()}


LOOPBACK = 1
"""The index of lo in every network namespace."""


def _ask(request: str, place: Callable[[int], None]) -> tuple[str, str, int]:
    """What a prober of its own answers, on stdout and stderr, and its exit status."""
    with subprocess.Popen(
        [sys.executable, "-I", "-S", "-B", "-c", _BOOTSTRAP, str(_ROOT)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, errors="replace",
    ) as prober:  # fmt: skip
        try:
            place(prober.pid)
            said, complained = prober.communicate(request, timeout=_PATIENCE)
        except BaseException:
            prober.kill()
            raise
        return said, complained, prober.returncode


def parse(text: str) -> dict[str, Outcome]:
    """Whatever text comes in: the outcomes in it, or none."""
    try:
        answer = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return unpack(answer)


def unpack(answer: object) -> dict[str, Outcome]:
    """Outcomes from JSON types; all of them or none."""
    if not isinstance(answer, Mapping):
        return {}
    outcomes: dict[str, Outcome] = {}
    for name, fields in answer.items():
        match fields:
            case {"found": found, "why": str(why), "errno": int() | None as errno}:
                outcomes[name] = Outcome(found, why, errno)
            case _:
                return {}
    return outcomes


def pack(outcomes: Mapping[str, Outcome]) -> dict[str, Any]:
    return {name: msgspec.structs.asdict(outcome) for name, outcome in outcomes.items()}
