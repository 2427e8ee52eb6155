"""Who is next: slots by CPUs and memory, shared fairly between callers. Pure.

A slot goes to the caller who has the fewest; among equals to the one who has used the least time
so far. Of that caller's jobs the one with the highest priority goes first, then the oldest: so a
priority decides among one's own jobs, and nobody gets past another by it. A job for which there is
no room yet keeps its place at the head until there is, else small ones would keep it out for good.
Jobs that run together wait as one, and take their slots at once.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from dataclasses import dataclass, field

from sandboxd.policy import Policy


@dataclass(frozen=True, slots=True)
class Need:
    """What a job takes up while it runs; or jobs that run together, all of them."""

    cpus: float = 1.0
    memory: int = 0
    slots: int = 1


def need_of(policy: Policy) -> Need:
    """What a job is counted for: its limits; a CPU, and no memory, where it has none."""
    return Need(max(1.0, policy.limits.cpus or 1.0), policy.limits.memory or 0)


def together(needs: Iterable[Need], most: int) -> Need:
    """Of jobs that run at the same time, in so many slots at most."""
    every = list(needs)
    slots = min(sum(one.slots for one in every), most)
    return Need(sum(one.cpus for one in every), sum(one.memory for one in every), slots)


@dataclass(slots=True, eq=False)
class Waiting:
    """A job in the queue, or several that run together; `gone` when it has left it."""

    caller: str
    priority: int
    need: Need
    gone: bool = False


@dataclass(slots=True)
class _Account:
    queue: list[tuple[int, int, Waiting]] = field(default_factory=list)
    queued: int = 0
    running: int = 0
    spent: float = 0.0

    def head(self) -> Waiting:
        """Who is next of what is `queued`."""
        while self.queue[0][2].gone:
            heapq.heappop(self.queue)
        return self.queue[0][2]


class Share:
    """The queue, and what is taken. `slots` bounds how many run, `room` what they take up."""

    def __init__(self, slots: int, room: Need, most_running: int | None = None) -> None:
        self._slots = slots
        self._room = room
        self.most_running = min(slots, slots if most_running is None else most_running)
        """Slots of one caller."""
        self._accounts: dict[str, _Account] = {}
        self._number = 0
        self._cpus = 0.0
        self._memory = 0
        self.running = 0
        self.queued = 0

    def add(self, one: Waiting) -> None:
        account = self._accounts.get(one.caller)
        if account is None:
            # Who comes late does not get all the time that others have used before.
            others = [other.spent for other in self._accounts.values()]
            account = self._accounts[one.caller] = _Account(spent=min(others, default=0.0))
        self._number += 1
        heapq.heappush(account.queue, (-one.priority, self._number, one))
        account.queued += one.need.slots
        self.queued += one.need.slots

    def remove(self, one: Waiting) -> bool:
        """Take a job out of the queue; False if it is not in it any more."""
        if one.gone:
            return False
        one.gone = True
        account = self._accounts[one.caller]
        account.queued -= one.need.slots
        self.queued -= one.need.slots
        if len(account.queue) > 2 * account.queued + 64:
            account.queue = [item for item in account.queue if not item[2].gone]
            heapq.heapify(account.queue)
        self._tidy(one.caller)
        return True

    def next(self) -> Waiting | None:
        """The job to start now, which has its slot then; None if there is none, or no room."""
        if not self.queued or self.running >= self._slots:
            return None
        able = [
            (account.running, account.spent, name)
            for name, account in self._accounts.items()
            if account.queued and account.running + account.head().need.slots <= self.most_running
        ]
        if not able:
            return None
        account = self._accounts[min(able)[2]]
        one = account.head()
        if not self._fits(one.need):
            return None
        heapq.heappop(account.queue)
        one.gone = True
        slots = one.need.slots
        account.queued -= slots
        self.queued -= slots
        account.running += slots
        self.running += slots
        self._cpus += one.need.cpus
        self._memory += one.need.memory
        return one

    def _fits(self, need: Need) -> bool:
        """A job that is larger than the machine runs alone."""
        if not self.running:
            return True
        cpus, memory = self._cpus + need.cpus, self._memory + need.memory
        fits = cpus <= self._room.cpus and memory <= self._room.memory
        return fits and self.running + need.slots <= self._slots

    def give_back(self, one: Waiting, seconds: float) -> None:
        """A job that had a slot is over."""
        account = self._accounts[one.caller]
        account.running -= one.need.slots
        account.spent += seconds * one.need.slots
        self.running -= one.need.slots
        self._cpus -= one.need.cpus
        self._memory -= one.need.memory
        if not self.running:
            self._cpus = 0.0  # floats add up to almost nothing
        self._tidy(one.caller)

    def queued_of(self, caller: str) -> int:
        account = self._accounts.get(caller)
        return account.queued if account else 0

    def running_of(self, caller: str) -> int:
        account = self._accounts.get(caller)
        return account.running if account else 0

    def _tidy(self, caller: str) -> None:
        """Forget a caller who has nothing here, and the cancelled jobs at the head of a queue."""
        account = self._accounts[caller]
        while account.queue and account.queue[0][2].gone:
            heapq.heappop(account.queue)
        if not account.queued and not account.running:
            del self._accounts[caller]
