"""What a caller asks for when jobs belong together: a group, its members and their network."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from sandboxd.errors import JobError
from sandboxd.job import Job

NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
"""One label of a host's name (RFC 1123), in lower case."""
READY = re.compile(r"started|ended|(tcp|udp):[0-9]{1,5}")
MOST = 64
"""Members of one group."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """One job of a group."""

    job: Job
    address: str | None = None
    """Its IPv4 address in the group's subnet; None: the next one that is free."""
    after: Sequence[str] = ()
    """Members that have to be ready before it is started."""
    ready: str = "started"
    """When it is: "started", "tcp:PORT" or "udp:PORT" (somebody listens there), or "ended", with
    status ok."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Jobs that run at the same time and reach each other: by name, and nobody else.

    The names of `members` are their host names; each is found as NAME and as NAME.GROUP.
    """

    members: Mapping[str, Job | Member]
    name: str = "group"
    """The domain of their names."""
    share: Literal["bridge", "network"] = "bridge"
    """"bridge": each has a network namespace and an address of its own; "network": all are in one,
    and meet at localhost."""
    subnet: str = "192.168.100.0/24"
    """IPv4, for share = "bridge"; the first address of it is nobody's."""
    main: str | None = None
    """When this member ends, the others are stopped."""
    stop: Literal["failure", "exit", "never"] = "failure"
    """What else stops the others: a member that ends with a status other than ok, any that ends,
    or nothing does."""
    _every: dict[str, Member] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not self.members or len(self.members) > MOST:
            raise JobError(f"group: {len(self.members)} members", hint=f"one to {MOST}")
        for name in (self.name, *self.members):
            if not isinstance(name, str) or not NAME.fullmatch(name) or name == "localhost":
                raise JobError(f"group: {name!r} is no name of a host",
                               hint="lower-case letters, digits and hyphens")  # fmt: skip
        if self.name in self.members:
            raise JobError(f"group: {self.name!r} is the group and a member", hint="rename one")
        every = {name: one if isinstance(one, Member) else Member(job=one)
                 for name, one in self.members.items()}  # fmt: skip
        object.__setattr__(self, "_every", every)
        if self.main is not None and self.main not in every:
            raise JobError(f"group: main: no member {self.main!r}")
        for what, value, known in (("share", self.share, ("bridge", "network")),
                                   ("stop", self.stop, ("failure", "exit", "never"))):  # fmt: skip
            if value not in known:
                raise JobError(f"group: {what}: {value!r}", hint=f"one of {', '.join(known)}")
        self._check_order()

    def every(self) -> dict[str, Member]:
        """All members by name, in the order in which they were given."""
        return dict(self._every)

    def _check_order(self) -> None:
        for name, one in self._every.items():
            if isinstance(one.after, str):
                raise JobError(f"{name}: after is one string", hint='give a list: ["db"]')
            if not READY.fullmatch(one.ready) or not 0 < _port(one.ready) < 65536:
                raise JobError(f"{name}: ready: {one.ready!r}",
                               hint='"started", "ended", "tcp:PORT" or "udp:PORT"')  # fmt: skip
            if missing := [other for other in one.after if other not in self._every]:
                raise JobError(f"{name}: after: no member {missing[0]!r}")
        started: set[str] = set()
        while len(started) < len(self._every):
            next_ones = {name for name, one in self._every.items() if {*one.after} <= started}
            if next_ones <= started:
                left = ", ".join(name for name in self._every if name not in started)
                raise JobError(f"group: {left} wait for each other", hint="`after` has a cycle")
            started |= next_ones


def _port(ready: str) -> int:
    return int(ready.partition(":")[2] or 1)
