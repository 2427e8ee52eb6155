"""The host as one policy sees it: what its mounts, its image and its places in /etc are here."""

from __future__ import annotations

from pathlib import Path

import msgspec

from sandboxd.compile.idmap import tenant_ids
from sandboxd.host import Host
from sandboxd.policy import Policy
from sandboxd.probe.host import kinds
from sandboxd.supervise import volumes


def host_for(policy: Policy, host: Host) -> Host:
    """The host with what a policy's bind sources are, what lies deeper in /etc, and its image."""
    if policy.root.image:
        from sandboxd.images.store import find

        host = msgspec.structs.replace(host, image=find(policy.root.image, tenant_ids(host)))
    inner = {name for name in policy.root.etc if "/" in name} - host.etc_entries.keys()
    for name in sorted(inner):
        if kind := kinds(Path("/etc", name).parent).get(name.rpartition("/")[2]):
            host = msgspec.structs.replace(host, etc_entries=host.etc_entries | {name: kind})
    return volumes.found(policy, host)
