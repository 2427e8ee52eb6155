"""Hosts to run the same tests on: as this one is, and with one thing less each."""

from __future__ import annotations

from functools import cache

import msgspec
import pytest

from sandboxd.host import Host
from sandboxd.policy import Environment, Identity, Limits, Policy, Root
from sandboxd.probe.host import probe

PATH = "/usr/local/bin:/usr/bin:/bin"


@cache
def as_found() -> Host:
    return probe()


def without(what: str) -> Host:
    """This host without one of its capabilities; not a pretence: what is missing is not used."""
    host = as_found()
    less: dict[str, dict[str, object]] = {
        "nothing": {},
        "subuid": {"subuid": None, "subgid": None, "direct_maps": False},
        "cgroup": {"cgroup": None, "cgroup_why_not": "left out by the test"},
        "machine": {"memfd_exec": False},
        "landlock": {"landlock": 0},
        "overlay": {"overlay": False},
    }
    return msgspec.structs.replace(host, **less[what])


def hosts(*names: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("host", [pytest.param(name, id=f"no-{name}") for name in names])


EVERY = hosts("nothing", "subuid", "cgroup", "machine", "landlock")


def policy(
    limits: Limits | None = None, root: Root | None = None, identity: Identity | None = None
) -> Policy:
    """A policy with no more limits than a test needs, under the standard filter."""
    return Policy(
        name="test",
        limits=limits or Limits(wall_time=30.0),
        root=root or Root(),
        identity=identity or Identity(),
        environment=Environment(set={"PATH": PATH, "LANG": "C.UTF-8"}),
    )
