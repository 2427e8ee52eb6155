"""One case of an interactive problem: a submission and a validator that talk to each other.

Theory of operation. Each has a sandbox of its own; two relayed pipes join them, and both ends of
them are held (supervise/pipeline.py). So neither can know that the other has ended before this file
says so, nobody dies of SIGPIPE, and what is found out is not who happened to be reaped first but
what each did without knowing how the other ended:

- The validator ends, and was not told that the submission had: what it says counts. If it accepts,
  the submission gets the end of its input and has to end well by itself; what it still prints goes
  nowhere. If not, the submission is ended, and what became of it does not matter.
- The submission ends well: the validator is told, and decides.
- The submission ends badly: the validator may already have read what decides. It gets a moment to
  say so; then it is told, and how the submission ended is what counts.

The submission's wall clock stands still while the validator computes, or waits for a CPU (which the
pressure of its cgroup says). A stream that a program closes while it goes on is at its end for the
other, too.
"""

from __future__ import annotations

from dataclasses import dataclass

import trio

from sandboxd.errors import SandboxError
from sandboxd.job import Job, Pipe
from sandboxd.judge.compiling import Joins, Ready, over, with_limits
from sandboxd.judge.judgement import SHOWN
from sandboxd.judge.problem import Case, Limits
from sandboxd.judge.validators import Validator, make_job, verdict_of
from sandboxd.result import Result
from sandboxd.supervise.one_error import one_error
from sandboxd.supervise.pipeline import Pipeline

SUBMISSION, VALIDATOR = 0, 1
SAID, ANSWERED = 0, 1
"""The pipes: from the submission to the validator, and back."""

DECIDES = 0.25
"""Seconds for a validator that has read everything to decide, if the submission ended badly."""
READS = 10.0
"""Seconds in which it must have read that everything."""
LAST_WORDS = 5.0
"""Seconds for it to end when it was told that the submission ended badly."""
CLOSING = 0.5
"""Seconds after the end of a stream in which a program that is ending has ended."""
SHORTEST = 0.01
IDLE = 0.1
"""A program that used a smaller share of a CPU waited."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Played:
    """How it went."""

    submission: Result
    validator: Result
    unprompted: bool
    """The validator ended before it was told that the submission had."""
    late: str = ""
    """Why the submission was ended, if the conversation took too long."""


async def play(
    runner: Joins, ready: Ready, validator: Validator, case: Case, limits: Limits
) -> Played:
    """Runs both on one case."""
    time = ready.policy.limits.wall_time or limits.time
    jobs = [_submission(ready, case, limits), _validator(validator, case, limits, time)]
    pipes = [
        Pipe(writer=SUBMISSION, reader=VALIDATOR, relay=True, hold=True, limit=limits.output),
        Pipe(writer=VALIDATOR, reader=SUBMISSION, relay=True, hold=True,
             limit=limits.validation_output),
    ]  # fmt: skip
    async with runner.start_pipeline(jobs, pipes) as pipeline:
        talk = _Conversation(pipeline, time, limits.validation_time)
        with one_error():
            async with trio.open_nursery() as nursery:
                for number in (SUBMISSION, VALIDATOR):
                    nursery.start_soon(talk.follow, number)
                    nursery.start_soon(talk.pass_closed, number)
                nursery.start_soon(talk.watch_clock)
                unprompted = await talk.settle()
                nursery.cancel_scope.cancel()
        submission, judge = await pipeline.wait()
    return Played(submission=submission, validator=judge, unprompted=unprompted, late=talk.late)


def _submission(ready: Ready, case: Case, limits: Limits) -> Job:
    """Its clock is watched here; the policy's is for when nobody does."""
    wall = ready.policy.limits.wall_time
    most = None if wall is None else wall + limits.validation_time + 2
    return Job(
        argv=[*ready.argv, *case.args],
        policy=ready.policy if most is None else with_limits(ready.policy, wall_time=most),
        files=over(ready.files, case.files),
        keep=SHOWN,
    )


def _validator(validator: Validator, case: Case, limits: Limits, time: float) -> Job:
    """It waits for the submission as long as that runs, and has its own time after that."""
    most = time + 3 * limits.validation_time + LAST_WORDS + 4
    policy = with_limits(validator.ready.policy, wall_time=most)
    return make_job(validator, case, policy=policy)


class _Conversation:
    """The two runs of a pipeline whose ends are held."""

    def __init__(self, pipeline: Pipeline, time: float, validation_time: float) -> None:
        self._pipeline = pipeline
        self._runs = pipeline.runs
        self._over = (trio.Event(), trio.Event())
        self._results: list[Result | None] = [None, None]
        self._time = time
        self._validation_time = validation_time
        self.late = ""

    async def follow(self, number: int) -> None:
        """Read what keeps a run going, to its end."""
        run = self._runs[number]
        async for _ in run.events:
            pass
        self._results[number] = await run.wait()
        self._over[number].set()

    async def pass_closed(self, number: int) -> None:
        """Pass the end of a stream on that a program closed, and goes on without."""
        await self._pipeline.wait_end(number)
        with trio.move_on_after(CLOSING):
            await self._over[number].wait()
            return
        self._pipeline.pass_end(number)

    async def settle(self) -> bool:
        """Until both have ended; whether the validator did before it was told."""
        submission, validator = self._over
        await self._wait_first()
        if not validator.is_set() and not self._ended_well():
            await self._let_decide()
        unprompted = validator.is_set()
        if not unprompted:
            await self._tell_validator()
        elif not submission.is_set():
            await self._end_submission()
        return unprompted

    async def _wait_first(self) -> None:
        async with trio.open_nursery() as waiting:
            for event in self._over:
                waiting.start_soon(_cancel_after, event, waiting.cancel_scope)

    def _ended_well(self) -> bool:
        result = self._results[SUBMISSION]
        return result is not None and result.ok

    async def _let_decide(self) -> None:
        """Perhaps what it was sent is enough for it."""
        with trio.move_on_after(READS):
            await self._pipeline.wait_end(SAID)
            while self._pipeline.unread(SAID):  # noqa: ASYNC110  nobody tells who reads a pipe
                await trio.sleep(SHORTEST)
        with trio.move_on_after(DECIDES):
            await self._over[VALIDATOR].wait()

    async def _tell_validator(self) -> None:
        self._pipeline.pass_end(SAID)
        patience = 2 * self._validation_time + 2 if self._ended_well() else LAST_WORDS
        with trio.move_on_after(patience):
            await self._over[VALIDATOR].wait()
            return
        self._runs[VALIDATOR].kill(f"no decision {patience:g} s after the submission's end")
        await self._over[VALIDATOR].wait()

    async def _end_submission(self) -> None:
        result = self._results[VALIDATOR]
        if result is not None and verdict_of(result) == "accepted":
            self._pipeline.pass_end(ANSWERED)
        else:
            self._runs[SUBMISSION].kill("the validator has decided")
        await self._over[SUBMISSION].wait()

    # -- the clock

    async def watch_clock(self) -> None:
        """End the submission when it has lasted its wall time, the validator's computing apart."""
        pause = self._time
        while True:
            await trio.sleep(pause)
            if self._over[SUBMISSION].is_set():
                return
            try:
                used = self._runs[SUBMISSION].usage()
            except SandboxError:  # it has not started, or is just over
                pause = SHORTEST
                continue
            computed, waited = self._validator_time()
            wall, cpu = used.wall_time or 0.0, used.cpu_time or 0.0
            left = self._time + computed + waited - wall
            if left <= 0:
                break
            pause = max(left, SHORTEST)
        self.late = f"wall time {self._time:g} s used up"
        if max(cpu, computed) < IDLE * wall:
            self.late += ": it and the validator waited"
        self._runs[SUBMISSION].kill(self.late)

    def _validator_time(self) -> tuple[float, float]:
        """Seconds that it computed, and that it could have if there had been a CPU."""
        result = self._results[VALIDATOR]
        try:
            used = result.usage if result is not None else self._runs[VALIDATOR].usage()
        except SandboxError:
            return 0.0, 0.0
        return used.cpu_time or 0.0, (used.pressure or {}).get("cpu", 0.0)


async def _cancel_after(event: trio.Event, scope: trio.CancelScope) -> None:
    await event.wait()
    scope.cancel()
