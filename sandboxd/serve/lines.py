"""The daemon's own log: lines of JSON on stderr, with priorities if the journal reads them."""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from typing import Any

_PRIORITIES = {"CRITICAL": 2, "ERROR": 3, "WARNING": 4, "INFO": 6, "DEBUG": 7}
_FIELDS = ("caller", "job", "status", "why", "path", "traceparent", "address")


class Lines(logging.Formatter):
    """What happened and to whom. Line breaks are escaped, so nobody can forge a line."""

    def __init__(self, *, priorities: bool) -> None:
        super().__init__()
        self._priorities = priorities

    def format(self, record: logging.LogRecord) -> str:
        moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line: dict[str, Any] = {
            "time": f"{moment}.{int(record.msecs):03}Z",
            "level": record.levelname.lower(),
            "message": record.getMessage(),
        }
        given = vars(record)
        line |= {name: given[name] for name in _FIELDS if given.get(name) is not None}
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        prefix = f"<{_PRIORITIES.get(record.levelname, 6)}>" if self._priorities else ""
        return prefix + json.dumps(line)


def open_log(level: str) -> None:
    """From now on what the daemon has to say goes to stderr."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(Lines(priorities=_is_journal()))
    logger = logging.getLogger("sandboxd.serve")
    logger.handlers[:] = [handler]
    logger.setLevel(level.upper())
    logger.propagate = False


def _is_journal() -> bool:
    """$JOURNAL_STREAM of systemd.exec(5): device and inode of what we were given as stderr."""
    try:
        found = os.fstat(2)
    except OSError:
        return False
    return os.environ.get("JOURNAL_STREAM") == f"{found.st_dev}:{found.st_ino}"
