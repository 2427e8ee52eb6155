"""What only some runs need, and is loaded with the first of them; who lasts long loads it at once.

`sandboxd run` lives for a moment, and does not pay for groups, builds or images if it has none.
A daemon lives for weeks: its first group must not make others wait for that, and a sandboxd whose
files were replaced meanwhile must not become half of the one that runs.
"""

from __future__ import annotations

from sandboxd.compile import bridge, dns, grouping, netlink, nftables, oci_filter, places
from sandboxd.images import store
from sandboxd.stores import builds as store_of_builds
from sandboxd.supervise import (
    builds,
    floor,
    groups,
    keeping,
    netkeeper,
    pipeline,
    planning,
    porter,
    resolver,
    uppers,
)

__all__ = [
    "bridge", "builds", "dns", "floor", "grouping", "groups", "keeping", "netkeeper", "netlink",
    "nftables", "oci_filter", "pipeline", "places", "planning", "porter", "resolver", "store",
    "store_of_builds", "uppers",
]  # fmt: skip
