"""Who is next: tables without a kernel."""

from __future__ import annotations

import pytest

from sandboxd.policy import Limits, Policy
from sandboxd.serve.quotas import Quotas, Spending
from sandboxd.serve.share import Need, Share, Waiting, need_of, together
from sandboxd.serve.wire import Refusal

ROOM = Need(cpus=4.0, memory=100)


def waiting(caller: str, priority: int = 5, need: Need | None = None) -> Waiting:
    return Waiting(caller, priority, need or Need())


def order(share: Share, *jobs: Waiting) -> list[Waiting]:
    """The order in which they run one at a time, each for a second."""
    for one in jobs:
        share.add(one)
    found = []
    while (taken := share.next()) is not None:
        found.append(taken)
        share.give_back(taken, 1.0)
    return found


def test_priority_then_age_among_the_jobs_of_one() -> None:
    low, first, second, high = (waiting("a", one) for one in (1, 5, 5, 9))
    assert order(Share(1, ROOM), low, first, second, high) == [high, first, second, low]


def test_a_priority_does_not_get_past_other_callers() -> None:
    loud = [waiting("loud", 9) for _ in range(4)]
    quiet = [waiting("quiet", 0) for _ in range(4)]
    found = [one.caller for one in order(Share(1, ROOM), *loud, *quiet)]
    assert sorted(found[:2]) == sorted(found[2:4]) == ["loud", "quiet"]


def test_who_has_fewer_running_is_next() -> None:
    share = Share(3, ROOM)
    many, one = [waiting("many") for _ in range(5)], waiting("one")
    for job in (*many, one):
        share.add(job)
    taken = [share.next() for _ in range(3)]
    assert one in taken
    assert share.next() is None
    assert (share.running, share.queued) == (3, 3)


def test_a_quota_of_running_jobs_leaves_slots_to_others() -> None:
    share = Share(4, ROOM, most_running=1)
    for job in (waiting("a"), waiting("a"), waiting("b")):
        share.add(job)
    taken = [share.next() for _ in range(4)]
    assert [one.caller for one in taken if one] == ["a", "b"]


@pytest.mark.parametrize("need", [Need(memory=60), Need(cpus=3.0)])
def test_what_does_not_fit_waits_and_is_not_overtaken(need: Need) -> None:
    share = Share(9, ROOM)
    first, large, small = waiting("a", need=need), waiting("a", need=need), waiting("a")
    for job in (first, large, small):
        share.add(job)
    assert share.next() is first
    assert share.next() is None
    share.give_back(first, 1.0)
    assert share.next() is large
    assert share.next() is small


def test_what_is_larger_than_the_machine_runs_alone() -> None:
    share = Share(9, ROOM)
    small, huge = waiting("a", 9), waiting("a", 5, Need(cpus=64.0, memory=10**6))
    share.add(small)
    share.add(huge)
    assert share.next() is small
    assert share.next() is None
    share.give_back(small, 1.0)
    assert share.next() is huge


def test_a_cancelled_job_is_gone_and_takes_no_room() -> None:
    share = Share(1, ROOM)
    jobs = [waiting("a", number % 10) for number in range(1000)]
    for job in jobs:
        share.add(job)
    for job in jobs[:-1]:
        assert share.remove(job)
        assert not share.remove(job)
    assert share.queued == share.queued_of("a") == 1
    assert len(share._accounts["a"].queue) < 100
    assert share.next() is jobs[-1]
    assert not share.remove(jobs[-1])


def test_who_has_nothing_here_is_forgotten() -> None:
    share = Share(1, ROOM)
    assert order(share, *(waiting(f"c{number}") for number in range(50)))
    assert not share._accounts
    assert (share.queued_of("c1"), share.running_of("c1")) == (0, 0)


def test_what_a_job_counts_for() -> None:
    assert need_of(Policy()) == Need(1.0, 0)
    assert need_of(Policy(limits=Limits(memory=7, cpus=0.5))) == Need(1.0, 7)
    assert need_of(Policy(limits=Limits(cpus=2.5))) == Need(2.5, 0)


def test_quotas_say_when_to_ask_again() -> None:
    share = Share(1, ROOM)
    share.add(waiting("a"))
    for quotas, message in (
        (Quotas(queue=1), "queue is full"),
        (Quotas(queued=1), "waiting already"),
        (Quotas(cpu=10.0), "CPU seconds"),
    ):
        spending = Spending(quotas)
        spending.spent("a", 10.0)
        with pytest.raises(Refusal, match=message) as refused:
            spending.check("a", share)
        assert refused.value.status == 429
        assert int(dict(refused.value.headers)["Retry-After"]) >= 1
    spending = Spending(Quotas(cpu=10.0, queued=2))
    spending.spent("b", 10.0)
    spending.check("a", share)


def test_jobs_that_run_together_get_all_their_slots_and_are_not_overtaken() -> None:
    share = Share(3, Need(cpus=9.0, memory=100))
    first, three, last = waiting("a"), waiting("b", need=Need(slots=3)), waiting("b")
    for one in (first, three, last):
        share.add(one)
    assert share.next() is first
    assert share.next() is None
    assert (share.running, share.queued) == (1, 4)
    share.give_back(first, 1.0)
    assert share.next() is three
    assert share.next() is None
    assert (share.running, share.queued) == (3, 1)
    assert share.remove(last)
    share.give_back(three, 1.0)
    assert (share.running, share.queued) == (0, 0)


def test_the_room_of_jobs_that_run_together_is_that_of_all() -> None:
    need = together([Need(1.0, 10), Need(2.0, 20)], 2)
    assert need == Need(3.0, 30, 2)
    assert together([Need()] * 3, 2) == Need(3.0, 0, 2)
    share = Share(4, Need(cpus=9.0, memory=100))
    pair, single = waiting("a", need=need), waiting("a")
    for one in (pair, single):
        share.add(one)
    assert [share.next(), share.next()] == [pair, single]
    assert share.running_of("a") == 3
    share.give_back(pair, 1.0)
    assert share.running_of("a") == share.running == 1


def test_a_quota_of_slots_holds_up_nobody_else() -> None:
    share = Share(4, ROOM, most_running=2)
    one, pair, other = waiting("a"), waiting("a", need=Need(slots=2)), waiting("b")
    for each in (one, pair, other):
        share.add(each)
    assert [share.next(), share.next(), share.next()] == [one, other, None]
    share.give_back(one, 1.0)
    assert share.next() is pair
