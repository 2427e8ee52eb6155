"""What was not enforced, as a line for a person: a reason that several have is said once."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

LONG = 40
"""Characters from which on a reason is worth sharing."""
_ENDS = ("", ";", ":")


def not_enforced(degraded: Iterable[tuple[str, str]]) -> str:
    """Of what and why: `cpu_time (a lower bound), memory (sampled): no cgroup; root (why)`"""
    groups: list[list[tuple[str, str]]] = []
    for one in degraded:
        group = next((group for group in groups if _shared([*group, one])), None)
        if group is None:
            groups.append([one])
        else:
            group.append(one)
    return "; ".join(map(_group, groups))


def _shared(group: list[tuple[str, str]]) -> str:
    """The reason that all of them begin with; "" if there is none that is worth it."""
    alike = (len(set(column)) == 1 for column in zip(*(why for _, why in group), strict=False))
    common = group[0][1][: sum(itertools.takewhile(bool, alike))]
    whole = all(why[len(common) : len(common) + 1] in _ENDS for _, why in group)
    return common if whole and len(common) >= LONG else ""


def _group(group: list[tuple[str, str]]) -> str:
    if len(group) == 1:
        return f"{group[0][0]} ({group[0][1]})"
    common = _shared(group)
    parts = [(what, why[len(common) :].lstrip(";: ")) for what, why in group]
    return f"{', '.join(f'{what} ({own})' if own else what for what, own in parts)}: {common}"
