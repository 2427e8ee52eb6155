"""The page of /ui in a real browser: what it shows, to whom, and that names of jobs run nothing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import trio

from tests.serve.browser import Page, browser
from tests.serve.serving import ROOT, Process, folder, process
from tests.serve.test_gojudge_daemon import free_port

pytestmark = [pytest.mark.needs("userns", "chromium"), pytest.mark.time_limit(100)]

TOKENS = {"me": "m" * 20, "other": "o" * 20}
HOSTILE = [
    "<img src=x onerror=\"document.title='run'\">",
    "<script>document.title='run'</script>",
    "'\"></td></tr></table><svg onload=\"document.title='run'\">",
    "javascript:document.title='run'",
]
TEXT = "document.body.innerText"


@contextmanager
def serving() -> Iterator[tuple[Process, str]]:
    """A daemon with tokens, on TCP as well."""
    port = free_port()
    with folder() as place:
        tokens = place / "tokens"
        tokens.write_text("".join(f"{name} {token}\n" for name, token in TOKENS.items()))
        tokens.chmod(0o600)
        flags = ("--listen", f"http://127.0.0.1:{port}", "--token-file", str(tokens))
        with process(place, *flags, "--overseer", "me") as served:
            trio.run(ready, served)
            yield served, f"http://127.0.0.1:{port}"


async def ready(served: Process) -> None:
    await (await served.links()).close()


def sandboxd(served: Process, *argv: str) -> str:
    environ = {**os.environ, "SANDBOXD_HOST": f"unix://{served.place}/s", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-P", "-m", "sandboxd", *argv]
    done = subprocess.run(command, env=environ, capture_output=True, timeout=50, check=False)
    return done.stdout.decode().strip()


def log_in(page: Page, url: str, name: str) -> None:
    page.open(f"{url}/ui")
    page.until("!document.getElementById('ask').hidden")
    type_token(page, TOKENS[name])
    page.until("Number(document.body.dataset.looks) > 0")


def type_token(page: Page, token: str) -> None:
    page.value(f"document.getElementById('token').value = {json.dumps(token)}")
    page.value("document.querySelector('#ask button').click()")


def test_what_it_shows() -> None:
    with serving() as (served, url), folder() as place, browser(place) as page:
        sandboxd(served, "submit", "--name", "failed", "--", "sh", "-c", "exit 7")
        sandboxd(served, "wait", "failed")
        busy = ("--name", "busy", "--", "sh", "-c", "while :; do :; done")
        sandboxd(served, "submit", *busy)
        sandboxd(served, "submit", "--name", "second", "--", "sleep", "60")
        sandboxd(served, "submit", "--name", "waits", "--", "true")
        log_in(page, url, "me")
        row = "[...document.querySelectorAll('#jobs tbody tr')].find((one) => one.cells[0]"
        row += ".textContent === 'busy')"
        page.until(f"/^[1-9]\\d* %$/.test({row}?.cells[4].textContent)")  # CPUs in use
        cells = page.value(f"[...{row}.cells].map((one) => one.textContent)")
        assert cells[1] == f"uid:{os.getuid()}"
        assert cells[2] == 'sh -c "while :; do :; done"'
        assert cells[6].endswith("iB")  # memory
        first = page.value(f"parseFloat({row}.cells[5].textContent)")
        page.until(f"parseFloat({row}.cells[5].textContent) > {first}")  # it is live
        assert page.value("document.querySelector('#waiting tbody').innerText").startswith("waits")
        assert "2 running, 1 waiting; 2 slots" in page.value(TEXT)
        failure = page.value("document.querySelector('#failures tbody').innerText")
        assert "failed" in failure
        assert "nonzero_exit" in failure
        sandboxd(served, "cancel", "busy")
        page.until("document.getElementById('counts').innerText.includes('cancelled 1')")
        page.until("document.getElementById('counts').innerText.includes('ok 1')")
        assert not page.complaints()
        assert {one.removeprefix(url) for one in page.asked()} <= {"/ui", "/v1/overview"}


def test_names_run_nothing() -> None:
    with serving() as (served, url), folder() as place, browser(place) as page:
        sandboxd(served, "submit", "--name", "a", "--", "sh", "-c", "sleep 60", *HOSTILE)
        sandboxd(served, "submit", "--name", "b", "--", "no-such-program", *HOSTILE)
        sandboxd(served, "wait", "b")
        log_in(page, url, "me")
        page.until("document.querySelector('#jobs tbody tr')")
        page.until("document.querySelector('#failures tbody tr')")
        shown = page.value(TEXT)
        for word in HOSTILE:
            assert json.dumps(word) in shown or word in shown  # as text
        assert page.value("document.querySelectorAll('img, svg, iframe, a').length") == 0
        assert page.value("document.scripts.length") == 1
        assert page.value("document.title") == "sandboxd"
        assert not page.complaints()


def test_even_a_mistake_of_ours_would_run_nothing() -> None:
    """Text does not become markup, and markup would not run: the page's own policy."""
    with serving() as (_, url), folder() as place, browser(place) as page:
        log_in(page, url, "me")
        for mistake in (
            f"document.body.innerHTML = {json.dumps(HOSTILE[0])}",
            "eval('1')",
            f"document.write({json.dumps(HOSTILE[1])})",
        ):
            tried = f"try {{ {mistake}; 'done' }} catch (error) {{ error.name }}"
            assert page.value(tried) in ("TypeError", "EvalError")
        page.value(
            "const made = document.createElement('button'); made.id = 'made';"
            "made.setAttribute('style', 'color: red'); document.body.append(made)"
        )
        assert page.value("made.style.color") == ""
        sent = page.call(
            "Runtime.evaluate",
            expression="fetch('http://127.0.0.1:1/').then(() => 'sent', (error) => error.name)",
            awaitPromise=True,
        )
        assert sent["result"]["value"] == "TypeError"
        told = [str(one.get("entry", {}).get("text")) for one in page.complaints()]
        assert any("connect-src 'self'" in one or "Content Security Policy" in one for one in told)
        assert page.value("document.title") == "sandboxd"


def test_who_sees_what() -> None:
    with serving() as (served, url), folder() as place, browser(place) as page:
        sandboxd(served, "submit", "--name", "mine", "--", "sleep", "60")
        page.open(f"{url}/ui")
        page.until("!document.getElementById('ask').hidden")
        assert page.value("document.getElementById('all').hidden")
        type_token(page, "wrong")
        page.until("document.getElementById('state').textContent === 'no such token'")
        type_token(page, TOKENS["other"])
        page.until("Number(document.body.dataset.looks) > 0")
        assert "0 running, 0 waiting of token:other" in page.value(TEXT)
        assert page.value("document.querySelectorAll('#jobs tbody tr').length") == 0
        # The token is nowhere but in the page's memory.
        assert page.value("document.getElementById('token').value") == ""
        assert page.value("document.cookie + localStorage.length + sessionStorage.length") == "00"
        assert not any("token" in one or TOKENS["other"] in one for one in page.asked())


def test_without_tokens_it_shows_what_came_over_tcp() -> None:
    port = free_port()
    with folder() as place, process(place, "--listen", f"http://127.0.0.1:{port}") as served:
        trio.run(ready, served)
        sandboxd(served, "submit", "--name", "elsewhere", "--", "sleep", "60")
        over_tcp = ("--host", f"http://127.0.0.1:{port}", "--name", "here")
        sandboxd(served, "submit", *over_tcp, "--", "sleep", "60")
        with folder() as own, browser(own) as page:
            page.open(f"http://127.0.0.1:{port}/ui")
            page.until("document.querySelector('#jobs tbody tr')")
            assert page.value("document.getElementById('ask').hidden")
            shown = page.value("document.getElementById('jobs').innerText")
            assert "here" in shown
            assert "elsewhere" not in shown


def test_the_daemon_may_go_and_come_back() -> None:
    with serving() as (served, url), folder() as place, browser(place) as page:
        log_in(page, url, "me")
        served.kill(signal.SIGTERM)
        page.until("document.getElementById('state').textContent.includes('asking again')")
        looks = page.value("Number(document.body.dataset.looks)")
        served.start()
        page.until(f"Number(document.body.dataset.looks) > {looks}")
