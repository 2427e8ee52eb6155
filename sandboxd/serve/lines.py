"""The daemon's own log: lines of JSON on stderr, with priorities if the journal reads them."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import time
from collections.abc import Mapping
from typing import Any

import msgspec

_PRIORITIES = {"critical": 2, "error": 3, "warning": 4, "info": 6, "debug": 7}
_FIELDS = ("caller", "job", "status", "why", "path", "traceparent", "address")


class Lines(logging.Formatter):
    """What happened and to whom. ASCII, and line breaks are escaped: nobody can forge a line."""

    def __init__(self, *, priorities: bool) -> None:
        super().__init__()
        self._priorities = priorities
        self._second = (0, "")

    def format(self, record: logging.LogRecord) -> str:
        given = vars(record)
        about = {"message": record.getMessage(), **{name: given.get(name) for name in _FIELDS}}
        if record.exc_info:
            about["traceback"] = self.formatException(record.exc_info)
        return self.line(record.created, record.levelname.lower(), about)

    def line(self, moment: float, level: str, about: Mapping[str, Any]) -> str:
        """What is None in it is left out."""
        second = int(moment)
        if self._second[0] != second:
            self._second = second, time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(second))
        line = {"time": f"{self._second[1]}.{int(moment % 1 * 1000):03}Z", "level": level}
        line |= {name: value for name, value in about.items() if value is not None}
        prefix = f"<{_PRIORITIES.get(level, 6)}>" if self._priorities else ""
        text = msgspec.json.encode(line)
        return prefix + (text.decode() if text.isascii() else json.dumps(line))


def tell(logger: logging.Logger, message: str, about: Mapping[str, Any]) -> None:
    """logger.info, without looking where it was called from: for what is said of every job."""
    if logger.isEnabledFor(logging.INFO):
        handlers = logger.handlers
        if len(handlers) == 1 and isinstance(handlers[0], ToStderr) and not logger.propagate:
            handlers[0].say(time.time(), "info", {"message": message, **about})
            return
        record = {"name": logger.name, "levelno": logging.INFO, "levelname": "INFO"}
        logger.handle(logging.makeLogRecord({**record, "msg": message, **about}))


class ToStderr(logging.Handler):
    """Each line by one write(2), which needs no lock and no buffer."""

    def __init__(self, lines: Lines) -> None:
        super().__init__()
        self.setFormatter(lines)
        self._lines = lines

    def say(self, moment: float, level: str, about: Mapping[str, Any]) -> None:
        """A line without a LogRecord."""
        with contextlib.suppress(OSError):
            os.write(2, f"{self._lines.line(moment, level, about)}\n".encode())

    def handle(self, record: logging.LogRecord) -> bool:
        with contextlib.suppress(OSError):  # nobody reads it, or its disk is full
            os.write(2, f"{self.format(record)}\n".encode())
        return True


def open_log(level: str) -> None:
    """From now on what the daemon has to say goes to stderr."""
    handler = ToStderr(Lines(priorities=_is_journal()))
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
