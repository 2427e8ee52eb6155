"""Counters, gauges and histograms as Prometheus reads them (its text format 0.0.4)."""

from __future__ import annotations

import bisect
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
    values: dict[Labels, float] = field(default_factory=dict)

    def add(self, amount: float = 1.0, **labels: str) -> None:
        key = tuple(labels.items() if len(labels) < 2 else sorted(labels.items()))
        self.values[key] = self.values.get(key, 0.0) + amount

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
    counts: list[int] = field(default_factory=lambda: [0] * (len(BUCKETS) + 1))
    total: float = 0.0

    def observe(self, seconds: float) -> None:
        self.counts[bisect.bisect_left(BUCKETS, seconds)] += 1
        self.total += seconds

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

    def lines(self) -> Iterator[str]:
        yield from _head(self.name, self.text, "gauge")
        yield f"{self.name} {self.ask():g}"


class Metrics:
    """All there are; docs/reference/http.md lists them."""

    def __init__(self) -> None:
        self.accepted = Counter("sandboxd_jobs_accepted_total", "jobs taken on")
        self.refused = Counter("sandboxd_jobs_refused_total", "submissions refused, by why")
        self.ended = Counter("sandboxd_jobs_ended_total", "jobs that ended, by status")
        self.lost = Counter("sandboxd_jobs_lost_total", "jobs that ran when an earlier daemon died")
        self.retried = Counter("sandboxd_jobs_retried_total", "of those, the ones started again")
        self.requests = Counter("sandboxd_http_requests_total", "requests answered, by status")
        self.cpu = Counter("sandboxd_cpu_seconds_total", "CPU seconds that jobs used")
        self.denials = Counter("sandboxd_denials_total", "what jobs were denied, by kind")
        self.queue_time = Histogram("sandboxd_queue_seconds", "from acceptance to a slot")
        self.setup_time = Histogram("sandboxd_setup_seconds", "making the sandbox")
        self.run_time = Histogram("sandboxd_run_seconds", "wall clock of the program")
        self._gauges: list[Gauge] = []

    def gauge(self, name: str, text: str, ask: Callable[[], float]) -> None:
        self._gauges.append(Gauge(name, text, ask))

    def text(self) -> bytes:
        kinds = (Counter, Histogram)
        found = [one for one in vars(self).values() if isinstance(one, kinds)] + self._gauges
        return "".join(f"{line}\n" for one in found for line in one.lines()).encode()


def _head(name: str, text: str, kind: str) -> Iterator[str]:
    yield f"# HELP {name} {text}"
    yield f"# TYPE {name} {kind}"


def _labels(labels: Labels) -> str:
    """Values are words of ours, so nothing in them needs to be escaped."""
    return "{" + ",".join(f'{key}="{value}"' for key, value in labels) + "}" if labels else ""
