"""What the daemon logs: lines of JSON that nobody can forge, with priorities for a journal."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
from typing import Any

import pytest
import trio

from sandboxd.serve.lines import Lines
from tests.serve.serving import ROOT, folder, process

TRACE = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


def line(message: str, level: int = logging.INFO, **extra: object) -> str:
    record = logging.getLogger("sandboxd.serve").makeRecord(
        "sandboxd.serve", level, "x.py", 1, message, (), None, extra=extra
    )
    return Lines(priorities=True).format(record)


def test_a_line_is_json_with_what_is_known() -> None:
    text = line("job over", caller="uid:1", job="a", status="ok", other="left out")
    found = json.loads(text.removeprefix("<6>"))
    assert found.pop("time").endswith("Z")
    assert found == {
        "level": "info", "message": "job over", "caller": "uid:1", "job": "a", "status": "ok",
    }  # fmt: skip


@pytest.mark.parametrize("name", ["message", "path", "why"])
def test_nobody_forges_a_line(name: str) -> None:
    hostile = 'x\n<0>{"level": "error"}\r\x1b[2J\u2028'
    extra: dict[str, Any] = {} if name == "message" else {name: hostile}
    text = line(hostile if name == "message" else "x", **extra)
    assert text.isprintable()
    assert json.loads(text.removeprefix("<6>"))[name] == hostile


def test_priorities_are_those_of_syslog() -> None:
    levels = {logging.DEBUG: 7, logging.INFO: 6, logging.WARNING: 4, logging.ERROR: 3}
    for level, priority in levels.items():
        assert line("x", level).startswith(f"<{priority}>{{")


PROBE = """\
import logging, os, sys
from sandboxd.serve.lines import open_log
found = os.fstat(2)
os.environ["JOURNAL_STREAM"] = sys.argv[1].format(found.st_dev, found.st_ino)
open_log("info")
logging.getLogger("sandboxd.serve").info("hello")
"""


@pytest.mark.parametrize(("stream", "start"), [("{}:{}", b"<6>{"), ("1:1", b"{"), ("", b"{")])
def test_only_a_journal_gets_priorities(stream: str, start: bytes) -> None:
    done = subprocess.run(
        [sys.executable, "-P", "-c", PROBE, stream], capture_output=True, check=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.stderr.startswith(start)


@pytest.mark.needs("userns")
async def test_what_a_daemon_says_of_a_job() -> None:
    with folder() as place, process(place, "--log-level", "info") as served:
        links = await served.links()
        body = json.dumps({"argv": ["sh", "-c", "exit 3"], "id": "traced"}).encode()
        headers = {"traceparent": TRACE}
        async with links.asking("POST", "/v1/jobs?wait=1", body, headers) as answer:
            view = await answer.json()
        await links.close()
        assert view["traceparent"] == TRACE
        await trio.to_thread.run_sync(served.kill, signal.SIGTERM)
        said = [json.loads(one) for one in served.errors().splitlines()]
        assert [one["message"] for one in said] == ["ready", "job over", "draining"]
        told = {key: said[1][key] for key in ("caller", "job", "status", "traceparent", "level")}
        assert told == {
            "caller": f"uid:{os.getuid()}", "job": "traced", "status": "nonzero_exit",
            "traceparent": TRACE, "level": "info",
        }  # fmt: skip
