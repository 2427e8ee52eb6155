"""From what was observed to the record the caller gets."""

from __future__ import annotations

import functools
import os
import time
from datetime import UTC, datetime
from pathlib import Path

import msgspec
import trio

import sandboxd
from sandboxd.compile.build import Compiled
from sandboxd.compile.load import digest
from sandboxd.host import Host
from sandboxd.job import Job
from sandboxd.result import (
    Degraded,
    HostRef,
    PolicyRef,
    Result,
    Status,
    Timing,
    Usage,
)
from sandboxd.supervise.quality import judge
from sandboxd.supervise.status import Facts, classify, errno_name, violations
from sandboxd.supervise.supervise import Observed


class Kind(msgspec.Struct, frozen=True):
    """What all runs under one policy share in their records."""

    compiled: Compiled
    reference: PolicyRef

    @classmethod
    def of(cls, compiled: Compiled) -> Kind:
        policy = compiled.policy
        return cls(compiled, PolicyRef(name=policy.name, sha256=digest(policy)))


def new_id() -> str:
    return os.urandom(16).hex()


def moment(seconds: float) -> str:
    """RFC 3339, in UTC, to the microsecond."""
    whole, rest = divmod(round(seconds * 1e6), 1_000_000)
    return f"{_second(whole)}.{rest:06}+00:00"


@functools.lru_cache(maxsize=16)  # the ones that come next are the same
def _second(seconds: int) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%S")


BY_CALLER = "cancelled by the caller"


@functools.lru_cache(maxsize=256)
def degraded(pairs: tuple[tuple[str, str], ...]) -> tuple[Degraded, ...]:
    return tuple(Degraded(what=what, why=why) for what, why in pairs)


@functools.cache
def host_ref(kernel: str) -> HostRef:
    return HostRef(id=machine_id(), kernel=kernel, sandboxd=sandboxd.__version__)


def machine_id() -> str:
    """machine-id(5), or this boot's id where there is none."""
    for path in ("/etc/machine-id", "/proc/sys/kernel/random/boot_id"):
        try:
            text = Path(path).read_text().strip()
        except OSError:
            continue
        if text:
            return text
    return "unknown"


def never_started(asked: float, why: str = "") -> tuple[Observed, tuple[float, float]]:
    """What there is to say of a run that was cancelled while it waited for a slot."""
    now = trio.current_time()
    cause: tuple[Status, str] = ("cancelled", why or BY_CALLER)
    facts = Facts(ended=None, usage=Usage(), output=0, stopped_by=cause)
    return Observed(facts, {}, (), now, now), (asked, now - asked)


def make(
    job: Job, name: str, kept: Kind, seen: Observed, host: Host, waited: tuple[float, float]
) -> Result:
    """The whole record of the run that has this name. `waited`: when it was asked for, and for how
    long it queued."""
    asked, queued = waited
    policy = kept.compiled.policy
    words = classify(seen.facts, policy.limits, policy.network)
    now, clock = time.time(), trio.current_time()
    return Result(
        job=name,
        policy=kept.reference,
        status=words.status,
        causes=words.causes,
        fault=words.fault,
        message=words.message,
        exit_code=words.exit_code,
        signal=words.signal,
        core_dumped=words.core_dumped,
        error=errno_name(seen.facts.start_error[0]) if seen.facts.start_error else None,
        usage=seen.facts.usage,
        streams={name: capture.output() for name, capture in seen.captures.items()},
        limits=words.limits,
        violations=(
            *(violations(seen.facts, policy) if "syscall_denied" in words.causes else ()),
            *seen.refused,
        ),
        artifacts=seen.artifacts,
        artifact_errors=seen.facts.artifact_errors,
        enforcement=kept.compiled.enforcement,
        degraded=degraded(kept.compiled.degraded + job.ignored),
        quality=judge(seen.facts.usage, kept.compiled.cpus, crowded=seen.crowded),
        timing=Timing(
            queued=queued,
            setup=seen.started - asked - queued,
            teardown=clock - seen.ended,
            started_at=moment(now - clock + seen.started),
            ended_at=moment(now - clock + seen.ended),
        ),
        host=host_ref(host.kernel),
    )
