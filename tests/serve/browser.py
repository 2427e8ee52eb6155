"""A headless Chromium, driven through its DevTools pipe: JSON on two descriptors, NUL in between.

It runs with its own sandbox, as an ordinary user, in a PID namespace that takes all of its
processes with it. https://chromedevtools.github.io/devtools-protocol/
"""

from __future__ import annotations

import itertools
import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PATIENCE = 50.0
STARTER = """\
import fcntl, os, sys
ours, theirs = (fcntl.fcntl(int(one), fcntl.F_DUPFD, 10) for one in sys.argv[1:3])
os.dup2(ours, 3), os.dup2(theirs, 4)
os.execvp(sys.argv[3], sys.argv[3:])
"""
FLAGS = (
    "--headless=new", "--remote-debugging-pipe", "--disable-gpu", "--no-first-run",
    "--disable-breakpad", "--disable-background-networking", "--disable-dev-shm-usage",
)  # fmt: skip


class Page:
    """A tab, and what has happened in it."""

    def __init__(self, said: int, heard: int) -> None:
        self._said, self._heard = said, heard
        self._numbers = itertools.count(1)
        self._rest = b""
        self.events: list[dict[str, Any]] = []
        self._session: str | None = None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        number = next(self._numbers)
        message: dict[str, Any] = {"id": number, "method": method, "params": params}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._said, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._message()
            if answer.get("id") == number:
                assert "error" not in answer, answer
                return dict(answer["result"])
            self.events.append(answer)

    def _message(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            assert select.select([self._heard], [], [], PATIENCE)[0], "the browser says nothing"
            data = os.read(self._heard, 1 << 20)
            assert data, "the browser has gone"
            self._rest += data
        message, _, self._rest = self._rest.partition(b"\0")
        return dict(json.loads(message))

    def open(self, url: str) -> None:
        self.call("Page.navigate", url=url)

    def value(self, script: str) -> Any:
        """What an expression is in the page; AssertionError if it throws."""
        found = self.call(
            "Runtime.evaluate", expression=script, returnByValue=True,
            allowUnsafeEvalBlockedByCSP=False,
        )  # fmt: skip
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def until(self, script: str) -> None:
        """Returns once it is true; as long as the page is not there it is not."""
        deadline = time.monotonic() + PATIENCE
        while not self.value(f"(() => {{ try {{ return Boolean({script}) }} catch {{ }} }})()"):
            assert time.monotonic() < deadline, (script, self.value("document.body.innerText"))
            time.sleep(0.05)

    def complaints(self) -> list[dict[str, Any]]:
        """Errors of the page, and what it was not allowed."""
        self.value("1")
        wrong = ("Runtime.exceptionThrown", "Log.entryAdded")
        found = [one["params"] for one in self.events if one["method"] in wrong]
        unknown = "the server responded with a status of 401"  # before the token is known
        return [one for one in found if unknown not in str(one.get("entry", {}).get("text"))]

    def asked(self) -> set[str]:
        """What was requested, of whomever."""
        self.value("1")
        sent = (one for one in self.events if one["method"] == "Network.requestWillBeSent")
        return {one["params"]["request"]["url"] for one in sent}


@contextmanager
def browser(folder: Path) -> Iterator[Page]:
    """A page; `folder` is for what the browser writes."""
    their_in, said = os.pipe()
    heard, their_out = os.pipe()
    namespace = ("unshare", "--user", "--map-current-user", "--mount", "--pid", "--fork")
    command = [
        *(sys.executable, "-c", STARTER, str(their_in), str(their_out)),
        *(*namespace, "--kill-child", "--mount-proc", "chromium", *FLAGS),
        f"--user-data-dir={folder}/profile",
    ]
    places = dict.fromkeys(("HOME", "TMPDIR", "XDG_RUNTIME_DIR", "XDG_CACHE_HOME"), str(folder))
    with (folder / "errors").open("wb") as errors:
        process = subprocess.Popen(
            command, pass_fds=(their_in, their_out), stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL, stderr=errors, env={**os.environ, **places},
        )  # fmt: skip
    os.close(their_in)
    os.close(their_out)
    try:
        yield Page(said, heard)
    except AssertionError as error:
        error.add_note((folder / "errors").read_text(errors="replace")[-2000:])
        raise
    finally:
        os.close(said)  # which ends it; and then the kernel all that is in its namespace
        os.close(heard)
        try:
            process.wait(PATIENCE)
        finally:
            process.kill()
