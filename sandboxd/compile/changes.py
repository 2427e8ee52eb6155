"""Where in a run's area its changes to the root are, and what in there is sandboxd's own."""

from __future__ import annotations

from typing import Any

from sandboxd import plan
from sandboxd.compile import pieces, rootfs
from sandboxd.host import Host
from sandboxd.plan import SetupPlan
from sandboxd.policy import Policy


def trees(policy: Policy, host: Host) -> list[dict[str, Any]]:
    """Directories of the area, where in the root each is, and what lies below it, topmost first."""
    found: list[dict[str, Any]] = []
    if pieces.of_host(policy):  # all but /usr is made anew for each run
        found.append({"path": "root", "prefix": "", "lowers": []})
    if rootfs.driver(policy, host) in ("kernel", "fuse"):
        layered = rootfs.layered(policy)
        path = f"upper/{layered}".rstrip("/")
        found.append({"path": path, "prefix": layered, "lowers": pieces.lowers(policy, host)})
    return found


def ours(setup: SetupPlan) -> dict[str, str | None]:
    """What the plan makes in the root: path -> what is in the file, None for all else."""
    found: dict[str, str | None] = {}
    top = f"{rootfs.NEW}/root/"
    for step in setup.steps:
        if isinstance(step, plan.MakeDir | plan.MakeFile | plan.Symlink):
            path = step.path.removeprefix(top)
            if path != step.path:
                content = step.content.decode() if isinstance(step, plan.MakeFile) else None
                found.setdefault(path, content)
    return found
