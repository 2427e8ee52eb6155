"""Trust domains: whose jobs share a user namespace and ids, and whose never do.

Each domain has tenants of its own: so its sandboxes lie in a user namespace that no other's are in.
Where there are subordinate ids enough each has a range of its own besides, as if it were another
user of the machine. An image, a volume and a root that is kept have owners in the whole range, so
with them the whole range is used, and said to be.
"""

from __future__ import annotations

import msgspec

from sandboxd.compile.idmap import MAP_SIZE
from sandboxd.host import Host, IdRange
from sandboxd.probe.idrange import SMALLEST

NOTHING = "no subordinate ids"
WHOLE = "an image, a volume or a kept root has its owners in the ids that all callers share"


class Domains:
    """The domains that one runner has seen, and their ids."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self._numbers: dict[str, int] = {}

    def why_not(self, domain: str) -> str:
        """Why a domain has no ids of its own; "" if it has."""
        if self._host.subuid is None or self._host.subgid is None:
            return f"{NOTHING}: callers share one uid, in user namespaces of their own"
        number = self._numbers.setdefault(domain, len(self._numbers))
        if number < self._room():
            return ""
        return f"the subordinate ids are enough for {self._room()} callers, and this is one more"

    def host(self, domain: str, host: Host, *, whole: bool) -> tuple[Host, str]:
        """The host as one policy sees it with the ids of the domain alone; or why with all."""
        why = self.why_not(domain) or (WHOLE if whole else "")
        if why or host.subuid is None or host.subgid is None:
            return host, why
        number = self._numbers[domain]
        uids, gids = _part(host.subuid, number), _part(host.subgid, number)
        return msgspec.structs.replace(host, subuid=uids, subgid=gids), ""

    def _room(self) -> int:
        """How many domains there are ids for."""
        assert self._host.subuid is not None
        assert self._host.subgid is not None
        return min(self._host.subuid.count, self._host.subgid.count, MAP_SIZE) // SMALLEST


def _part(ids: IdRange, number: int) -> IdRange:
    return IdRange(start=ids.start + number * SMALLEST, count=SMALLEST)
