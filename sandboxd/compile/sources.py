"""Where a policy's mounts come from, and that it is nowhere but where the policy lets them.

`Host.sources` has the real path of everything that is asked for: no link is in it. That path is
held against allow_sources here, and the tenant opens it through no link (RESOLVE_NO_SYMLINKS). So
what is mounted lay below an allowed place in the moment in which it was opened, whoever changed
links in between; no descriptor has to be carried from one to the other.
"""

from __future__ import annotations

from sandboxd.errors import HostError, PolicyError
from sandboxd.host import Host
from sandboxd.policy import Mount, Policy


def real(mount: Mount, host: Host) -> str:
    """The path of the host that a mount shows."""
    return host.sources.get(mount.asked, mount.source or "")


def restricted(host: Host) -> bool:
    """Whether not just anything may be a source."""
    return "/" not in host.allow_sources


def check(policy: Policy, host: Host, driver: str) -> None:
    """PolicyError for a source that is not allowed; HostError where a cache cannot be copied."""
    for number, mount in enumerate(policy.mounts):
        where = policy.origin(f"mounts[{number}]")
        if mount.type == "bind":
            _check(policy, host, mount.source or "", where)
        elif mount.is_copy and not host.overlay:
            why = host.fault_notes.get("overlay", "kernel overlayfs does not work here")
            raise HostError("overlay", f"{where}: no copy of the cache {mount.name}: {why}",
                            hint='lock = "shared-ro" needs none')  # fmt: skip
    if policy.root.source != "host" and not policy.root.image:
        where = policy.origin("root.source")
        _check(policy, host, policy.root.source, where)
        if driver == "fuse" and restricted(host):
            what = (
                "fuse-overlayfs opens its directory by name, and links could be changed meanwhile"
            )
            hint = 'root.driver = "kernel", or allow_sources = ["/"]'
            raise PolicyError(where, what, hint=hint)


def _check(policy: Policy, host: Host, asked: str, where: str) -> None:
    path = host.sources.get(asked, asked)
    if any(_is_below(path, place) for place in host.allow_sources):
        return
    really = "" if path == asked else f" is {path}, and that"
    allowed = ", ".join(policy.allow_sources) or "nothing"
    origin = policy.origin("allow_sources")
    raise PolicyError(where, f"{asked}{really} is not in what {origin} allows: {allowed}",
                      hint="add its directory there, or put it in one of these")  # fmt: skip


def _is_below(path: str, place: str) -> bool:
    return place == "/" or path == place or path.startswith(f"{place}/")
