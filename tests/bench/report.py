"""What was measured, as JSON types and as text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tests.bench.measures import Row

AGAINST = ("bwrap", "crun", "crun by nsenter", "none (trio)", "host root", "umoci unpack")
"""Whose p50 everybody else's is held against, in the same measure of the same run."""


def facts(
    rows: Sequence[Row], missing: Mapping[str, str], machine: Mapping[str, object]
) -> dict[str, object]:
    """machine, missing, and rows: measure, who, unit, count, min, p50, p95, max, times_better."""
    medians = {(row.measure, row.who): row.at(0.5) for row in rows}
    return {
        "machine": dict(machine),
        "missing": dict(missing),
        "rows": [
            {
                "measure": row.measure,
                "who": row.who,
                "unit": row.unit,
                "better": row.better,
                "count": len(row.samples),
                "min": row.at(0),
                "p50": row.at(0.5),
                "p95": row.at(0.95),
                "max": row.at(1),
                "times_better": times_better(row, medians),
            }
            for row in rows
        ],
    }


def times_better(row: Row, medians: Mapping[tuple[str, str], float]) -> dict[str, float]:
    """Ratio of the p50s, so turned that more than 1 means that `row` is the better one."""
    ratios = {}
    for peer in AGAINST:
        theirs = medians.get((row.measure, peer))
        own = row.at(0.5)
        if row.better == "unknown" or peer == row.who or not theirs or not own:
            continue
        ratios[peer] = theirs / own if row.better == "less" else own / theirs
    return ratios


def text(found: Mapping[str, Any]) -> str:
    """One table a measure."""
    lines = [describe(found["machine"])]
    lines += [f"{what}: {why}" for what, why in found["missing"].items()]
    measures: dict[str, list[Mapping[str, Any]]] = {}
    for row in found["rows"]:
        measures.setdefault(row["measure"], []).append(row)
    for measure, rows in measures.items():
        lines += ["", *table(measure, rows)]
    lines += [
        "",
        '"bwrap x 4.1": 4.1 times as good as bwrap (p50 against p50 of this run).',
    ]
    return "\n".join(lines)


def describe(machine: Mapping[str, Any]) -> str:
    before, after = machine["before"], machine["after"]
    return (
        f"Linux {before['kernel']} {before['arch']}, {before['cpus']} CPUs, "
        f"Python {before['python']}, load {before['load']:.1f} to {after['load']:.1f}, "
        f"{machine['rounds']} rounds"
    )


def table(measure: str, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    unit, best = rows[0]["unit"], "max" if rows[0]["better"] == "more" else "min"
    peers = [peer for peer in AGAINST if any(peer in row["times_better"] for row in rows)]
    head = f"{measure} ({unit})"
    columns = "".join(f"{name:>10}" for name in (best, "p50", "p95"))
    lines = [f"{head:<44}{columns}" + "".join(f"{peer + ' x':>18}" for peer in peers)]
    for row in rows:
        figures = "".join(f"{number(row[name]):>10}" for name in (best, "p50", "p95"))
        ratios = (row["times_better"].get(peer) for peer in peers)
        shown = "".join(f"{'' if ratio is None else times(ratio):>18}" for ratio in ratios)
        lines.append(f"  {row['who']:<42}{figures}{shown}".rstrip())
    return lines


def times(ratio: float) -> str:
    return f"{ratio:.1f}" if ratio >= 1 else f"{ratio:.2g}"


def number(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"
