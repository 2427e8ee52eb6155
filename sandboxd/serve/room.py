"""What jobs may take up together: CPUs, and the memory that was free when the daemon began."""

from __future__ import annotations

import os
import re
from pathlib import Path

from sandboxd.serve.share import Need

_UNKNOWN = 1 << 62
MEMINFO = Path("/proc/meminfo")


def room(slots: int | None, memory: int | None) -> Need:
    """Where slots were named, so many jobs of one CPU; else what there is."""
    cpus = len(os.sched_getaffinity(0))
    return Need(float(max(cpus, slots or 0)), memory if memory is not None else free())


def free() -> int:
    """MemAvailable of proc_meminfo(5); without it memory is not counted."""
    try:
        found = re.search(r"^MemAvailable:\s+(\d+) kB$", MEMINFO.read_text(), re.MULTILINE)
    except OSError:
        found = None
    return int(found[1]) << 10 if found else _UNKNOWN
