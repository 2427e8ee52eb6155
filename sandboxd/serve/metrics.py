"""Counters, gauges and histograms as Prometheus reads them (its text format 0.0.4).

What is counted of jobs is counted of all callers and of each: a caller is told its own, and an
overseer that of all, with whose it is for the few numbers that tell who uses the machine.
"""

from __future__ import annotations

import bisect
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

TEXT = "text/plain; version=0.0.4; charset=utf-8"
BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 60.0)
"""Upper bounds in seconds."""

Labels = tuple[tuple[str, str], ...]


@dataclass(slots=True)
class Counter:
    """What only goes up, by its labels."""

    name: str
    text: str
    of_all: Counter | None = None
    """What this is a part of, and counts, too."""
    values: dict[Labels, float] = field(default_factory=dict)

    def add(self, amount: float = 1.0, **labels: str) -> None:
        key = tuple(labels.items() if len(labels) < 2 else sorted(labels.items()))
        self.values[key] = self.values.get(key, 0.0) + amount
        if self.of_all is not None:
            self.of_all.add(amount, **labels)

    def lines(self) -> Iterator[str]:
        yield from _head(self.name, self.text, "counter")
        for labels, value in sorted(self.values.items()):
            yield f"{self.name}{_labels(labels)} {value:g}"
        if not self.values:
            yield f"{self.name} 0"


@dataclass(slots=True)
class Histogram:
    """How long something took."""

    name: str
    text: str
    of_all: Histogram | None = None
    counts: list[int] = field(default_factory=lambda: [0] * (len(BUCKETS) + 1))
    total: float = 0.0

    def observe(self, seconds: float) -> None:
        self.counts[bisect.bisect_left(BUCKETS, seconds)] += 1
        self.total += seconds
        if self.of_all is not None:
            self.of_all.observe(seconds)

    def lines(self) -> Iterator[str]:
        yield from _head(self.name, self.text, "histogram")
        so_far = 0
        for bound, count in zip((*map(str, BUCKETS), "+Inf"), self.counts, strict=True):
            so_far += count
            yield f'{self.name}_bucket{{le="{bound}"}} {so_far}'
        yield f"{self.name}_sum {self.total:g}"
        yield f"{self.name}_count {so_far}"


@dataclass(slots=True)
class Gauge:
    """What is so at this moment: asked when somebody reads it."""

    name: str
    text: str
    ask: Callable[[], float]
    of: Callable[[str], float] | None = None
    """The part of one caller."""
    told: bool = False
    """Whether callers who have no part in it are told it, too."""

    def lines(self, caller: str | None) -> Iterator[str]:
        ask = self.ask
        if caller is not None and self.of is not None:
            ask = functools.partial(self.of, caller)
        elif caller is not None and not self.told:
            return
        yield from _head(self.name, self.text, "gauge")
        yield f"{self.name} {ask():g}"


class Counts:
    """What is counted of jobs: of all, or of one caller's."""

    def __init__(self, every: Counts | None = None) -> None:
        self._counters: dict[str, Counter] = {}
        self._histograms: dict[str, Histogram] = {}

        def counter(name: str, text: str) -> Counter:
            found = Counter(f"sandboxd_{name}", text)
            if every is not None:
                found.of_all = every._counters[found.name]
            self._counters[found.name] = found
            return found

        def histogram(name: str, text: str) -> Histogram:
            found = Histogram(f"sandboxd_{name}", text)
            if every is not None:
                found.of_all = every._histograms[found.name]
            self._histograms[found.name] = found
            return found

        self.accepted = counter("jobs_accepted_total", "jobs taken on")
        self.refused = counter("jobs_refused_total", "submissions refused, by why")
        self.ended = counter("jobs_ended_total", "jobs that ended, by status")
        self.lost = counter("jobs_lost_total", "jobs that ran when an earlier daemon died")
        self.retried = counter("jobs_retried_total", "of those, the ones started again")
        self.cpu = counter("cpu_seconds_total", "CPU seconds that jobs used")
        self.denials = counter("denials_total", "what jobs were denied, by kind")
        self.queue_time = histogram("queue_seconds", "from acceptance to a slot")
        self.setup_time = histogram("setup_seconds", "making the sandbox")
        self.run_time = histogram("run_seconds", "wall clock of the program")

    def lines(self) -> Iterator[str]:
        for counter in self._counters.values():
            yield from counter.lines()
        for histogram in self._histograms.values():
            yield from histogram.lines()


class Metrics:
    """All there are; docs/reference/http.md lists them."""

    def __init__(self) -> None:
        self.all = Counts()
        self._counts: dict[str, Counts] = {}
        self.requests = Counter("sandboxd_http_requests_total", "requests answered, by status")
        self._gauges: list[Gauge] = []

    def of(self, caller: str) -> Counts:
        """Where what is a caller's is counted; so it is of all."""
        found = self._counts.get(caller)
        if found is None:
            found = self._counts[caller] = Counts(self.all)
        return found

    def gauge(self, gauge: Gauge) -> None:
        self._gauges.append(gauge)

    def text(self, caller: str | None = None) -> bytes:
        """What is of this caller; None: of all."""
        return "".join(f"{line}\n" for line in self._lines(caller)).encode()

    def _lines(self, caller: str | None) -> Iterator[str]:
        if caller is None:
            yield from self.all.lines()
            yield from self.requests.lines()
        else:
            yield from self._counts.get(caller, Counts()).lines()
        for gauge in self._gauges:
            yield from gauge.lines(caller)
        if caller is None:
            yield from self._by_caller()

    def _by_caller(self) -> Iterator[str]:
        """Who uses the machine."""
        every = sorted(self._counts.items())
        name = "sandboxd_caller_jobs_ended_total"
        yield from _head(name, "jobs that ended, by caller and status", "counter")
        for caller, counts in every:
            for labels, value in sorted(counts.ended.values.items()):
                yield f"{name}{_labels((('caller', caller), *labels))} {value:g}"
        name = "sandboxd_caller_cpu_seconds_total"
        yield from _head(name, "CPU seconds that jobs used, by caller", "counter")
        for caller, counts in every:
            yield f"{name}{_labels((('caller', caller),))} {sum(counts.cpu.values.values()):g}"
        for gauge in self._gauges:
            if gauge.of is not None:
                name = gauge.name.replace("sandboxd_", "sandboxd_caller_")
                yield from _head(name, f"{gauge.text}, by caller", "gauge")
                for caller, _ in every:
                    yield f"{name}{_labels((('caller', caller),))} {gauge.of(caller):g}"


def _head(name: str, text: str, kind: str) -> Iterator[str]:
    yield f"# HELP {name} {text}"
    yield f"# TYPE {name} {kind}"


def _labels(labels: Labels) -> str:
    """Values are words of ours and names of callers, so nothing in them needs to be escaped."""
    return "{" + ",".join(f'{key}="{value}"' for key, value in labels) + "}" if labels else ""
