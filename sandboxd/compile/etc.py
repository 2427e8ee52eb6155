"""The few files of /etc that programs need and that must not be the host's."""

from __future__ import annotations

from collections.abc import Mapping

from sandboxd import plan
from sandboxd.compile.carrying import RESOLV_CONF
from sandboxd.host import Place
from sandboxd.plan import Step
from sandboxd.policy import Policy

GROUP = "every member of a group"
SIZE = 64 << 10
"""Bytes; the most members with the longest names take a third."""
NETWORK = ("hosts", "hostname", "resolv.conf")
"""Those that say who one is, and who else is there."""


def files(
    root: str, policy: Policy, network: Mapping[str, str], *, whole: bool, anew: bool = False
) -> list[Step]:
    """`whole`: with the users and groups, which a root that is not the host's has its own of.
    `anew`: an image may have something in their place. `network`: NETWORK and what they say.
    """
    identity = policy.identity
    uid = 1000 if identity.uid is None else identity.uid
    gid = uid if identity.gid is None else identity.gid
    user = f"{identity.name}:x:{uid}:{gid}::{identity.home}:/bin/sh\n"
    others = "" if uid == 0 else "root:x:0:0::/root:/bin/sh\n"
    files = dict(network)
    if whole:
        files["passwd"] = f"{others}{user}nobody:x:65534:65534::/:/bin/false\n"
        root_group = "" if gid == 0 else "root:x:0:\n"
        files["group"] = f"{root_group}{identity.name}:x:{gid}:\nnogroup:x:65534:\n"
        files["nsswitch.conf"] = "passwd: files\ngroup: files\nhosts: files dns\n"
        files["shells"] = "/bin/sh\n/bin/bash\n"
    why = policy.origin("identity")
    return [
        plan.MakeFile(path=f"{root}/etc/{name}", content=text.encode(), anew=anew, why=why)
        for name, text in files.items()
    ]


def network_files(policy: Policy, place: Place | None) -> dict[str, str]:
    """NETWORK and what they say."""
    name = policy.identity.hostname
    if place is not None:
        from sandboxd.compile import grouping

        found = (grouping.hosts(place), place.name, grouping.resolv_conf(place))
    else:
        resolv_conf = RESOLV_CONF if policy.network.mode == "user" else ""
        found = (f"127.0.0.1 localhost {name}\n::1 localhost {name}\n", name, resolv_conf)
    hosts, hostname, resolv_conf = found
    return dict(zip(NETWORK, (hosts, f"{hostname}\n", resolv_conf), strict=True))


def of_template(policy: Policy, place: Place | None) -> dict[str, str]:
    """The same for what all members of a group may start from: each has its own ones over it."""
    return network_files(policy, None) if place is None else dict.fromkeys(NETWORK, "")


def over(policy: Policy, place: Place, area: str) -> list[Step]:
    """A member's own NETWORK over those of a root it shares; they lie in a tmpfs at `area`."""
    why = GROUP
    steps: list[Step] = [
        plan.MakeDir(path=area, why=why),
        plan.Tmpfs(target=area, size=SIZE, mode=0o755, inodes=len(NETWORK) + 1, why=why),
    ]
    for name, text in network_files(policy, place).items():
        path = f"{area}/{name}"
        steps += [
            plan.MakeFile(path=path, content=text.encode(), why=why),
            plan.Bind(source=path, target=f"/etc/{name}", why=why),
        ]
    return steps
