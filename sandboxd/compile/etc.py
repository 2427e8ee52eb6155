"""The few files of /etc that programs need and that must not be the host's."""

from __future__ import annotations

from sandboxd import plan
from sandboxd.compile.carrying import RESOLV_CONF
from sandboxd.plan import Step
from sandboxd.policy import Policy


def files(root: str, policy: Policy, *, whole: bool, anew: bool = False) -> list[Step]:
    """`whole`: with the users and groups, which a root that is not the host's has its own of.
    `anew`: an image may have something in their place.
    """
    identity = policy.identity
    uid = 1000 if identity.uid is None else identity.uid
    gid = uid if identity.gid is None else identity.gid
    user = f"{identity.name}:x:{uid}:{gid}::{identity.home}:/bin/sh\n"
    others = "" if uid == 0 else "root:x:0:0::/root:/bin/sh\n"
    files = {
        "hosts": f"127.0.0.1 localhost {identity.hostname}\n::1 localhost {identity.hostname}\n",
        "hostname": f"{identity.hostname}\n",
        "resolv.conf": RESOLV_CONF if policy.network.mode == "user" else "",
    }
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
