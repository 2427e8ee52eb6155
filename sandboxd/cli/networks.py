"""--network, --allow, --publish and the caps of a way out, as a [network] of the policy."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from sandboxd.cli.quantities import count, or_unlimited, size
from sandboxd.errors import JobError

if TYPE_CHECKING:
    from sandboxd.policy import Network

MOST_CONNECTIONS = 1_000_000
RATES = range(1 << 10, (1 << 33) + 1)
_CAPS: Mapping[str, str] = MappingProxyType(
    {
        "connections": "--network-connections",
        "bytes": "--network-bytes",
        "rate": "--network-rate",
    }
)
"""Key of [network] -> flag."""


def add(group: argparse._ArgumentGroup) -> None:
    """Adds the flags; caps that are not given are absent from the namespace."""
    group.add_argument(
        "--network", type=_mode, metavar="none|user",
        help="none: loopback and nothing else; user: a way out, to what is allowed",
    )  # fmt: skip
    group.add_argument(
        "--allow", action="append", default=[], metavar="WHO:PORT",
        help="who may be reached: NAME, *.NAME, ADDRESS[/BITS] or *; --network user with it",
    )  # fmt: skip
    group.add_argument(
        "--publish", action="append", default=[], metavar="[ADDRESS:]PORT:INSIDE[/udp]",
        help="a port of this machine that leads inside; at 127.0.0.1 if nothing is said",
    )  # fmt: skip
    for key, metavar, read, text in (
        ("connections", "N", _connections, "TCP connections and UDP flows in all"),
        ("bytes", "SIZE", size, "bytes sent and received in all"),
        ("rate", "SIZE", _rate, "bytes a second, each way"),
    ):
        group.add_argument(
            _CAPS[key], dest=f"network.{key}", default=argparse.SUPPRESS, metavar=metavar,
            type=or_unlimited(read), help=f"of a way out: {text}, or `unlimited`",
        )  # fmt: skip


def _mode(text: str) -> str:
    if text not in ("none", "user"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither `none` nor `user`")
    return text


def _connections(text: str) -> int:
    found = count(text)
    if found > MOST_CONNECTIONS:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1 to {MOST_CONNECTIONS}")
    return found


def _rate(text: str) -> int:
    found = size(text)
    if found not in RATES:
        raise argparse.ArgumentTypeError(f"{text!r} is not from 1K to 8G a second")
    return found


def caps(args: argparse.Namespace) -> dict[str, int | None]:
    """The caps that are given, by their keys."""
    given = vars(args)
    return {key: given[f"network.{key}"] for key in _CAPS if f"network.{key}" in given}


def changed(args: argparse.Namespace, base: Network) -> tuple[dict[str, Network], dict[str, str]]:
    """A [network] that differs; what is allowed comes on top of the policy's."""
    wanted: dict[str, Any] = {
        key: (*getattr(base, key), *getattr(args, key))
        for key in ("allow", "publish")
        if getattr(args, key)
    }
    if wanted and args.network == "none":
        raise JobError("--network none lets nobody be reached", hint="leave --network out")
    mode = "user" if wanted else args.network
    wanted |= caps(args)
    if mode is not None and mode != base.mode:
        wanted["mode"] = mode
    if not wanted:
        return {}, {}
    import msgspec

    from sandboxd.compile.egress import problems

    network = msgspec.structs.replace(base, **wanted)
    capped = next(iter(caps(args)), None)
    if capped is not None and network.mode == "none":
        hint = "--network user, or --allow WHO:PORT"
        raise JobError(f"{_CAPS[capped]} without a way out", hint=hint)
    if found := problems(network):
        raise found[0]
    flags = {"mode": "--network", "allow": "--allow", "publish": "--publish", **_CAPS}
    return {"network": network}, {f"network.{key}": flags[key] for key in wanted}
