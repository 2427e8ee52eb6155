"""submit, ps, logs, wait and cancel, against a daemon in a process of its own."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

from sandboxd.serve.address import Unix
from sandboxd.serve.plain import Plain
from tests.serve.serving import ROOT, Process, folder, process


@pytest.fixture
def served() -> Iterator[Process]:
    with folder() as place, process(place) as one:
        links = trio.run(one.links)
        trio.run(links.close)
        yield one


def sandboxd(served: Process, *argv: str) -> subprocess.CompletedProcess[bytes]:
    environ = {**os.environ, "SANDBOXD_HOST": f"unix://{served.place}/s", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-P", "-m", "sandboxd", *argv]
    return subprocess.run(command, env=environ, capture_output=True, timeout=50, check=False)


def submit(served: Process, *argv: str) -> str:
    done = sandboxd(served, "submit", *argv)
    assert done.returncode == 0, done.stderr
    return done.stdout.decode().strip()


def test_a_job_from_its_beginning_to_its_end(served: Process) -> None:
    job = submit(served, "--", "sh", "-c", "echo out; echo err >&2; exit 7")
    waited = sandboxd(served, "wait", job)
    assert waited.returncode == 7
    assert b"nonzero_exit 7" in waited.stderr
    logs = sandboxd(served, "logs", job)
    assert (logs.stdout, logs.stderr, logs.returncode) == (b"out\n", b"err\n", 0)
    record = json.loads(sandboxd(served, "wait", "--json", job).stdout)
    assert (record["status"], record["job"]) == ("nonzero_exit", job)


def test_files_limits_variables_and_a_place(served: Process, tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"\xff" * 1_000_000)
    (tmp_path / "d").mkdir()
    (tmp_path / "d/x").write_text("x")
    script = 'test "$PWD" = /tmp && cat /box/d/x && wc -c && printf "$Y" && cp /box/a /box/out'
    job = submit(
        served, "--file", f"{tmp_path}/a", "--file", f"{tmp_path}/d", "--stdin", f"{tmp_path}/a",
        "-w", "/tmp", "-e", "Y=y", "--collect", "out", "-m", "64M", "--", "sh", "-c", script,
    )  # fmt: skip
    done = sandboxd(served, "wait", "-q", "--collect-to", str(tmp_path / "got"), job)
    assert (done.returncode, done.stderr) == (0, b"")
    assert (tmp_path / "got/out").read_bytes() == (tmp_path / "a").read_bytes()
    assert sandboxd(served, "logs", job).stdout == b"x1000000\ny"


@pytest.mark.parametrize("given", ["00-" + "a" * 32 + "-" + "b" * 16 + "-01", "x\r\nA: b", ""])
def test_a_trace_goes_with_it(served: Process, monkeypatch: pytest.MonkeyPatch, given: str) -> None:
    monkeypatch.setenv("TRACEPARENT", given)
    job = submit(served, "--", "true")
    done = sandboxd(served, "run", "-q", "--name", "traced", "--", "true")
    assert done.returncode == 0
    views = map(json.loads, sandboxd(served, "ps", "-a", "--json").stdout.splitlines())
    kept = given if given.startswith("00-") else None
    assert {one["id"]: one["traceparent"] for one in views} == {job: kept, "traced": kept}


def test_following_ends_with_the_job(served: Process) -> None:
    job = submit(served, "--", "sh", "-c", "for i in 1 2 3; do echo $i; sleep 0.1; done")
    assert sandboxd(served, "logs", "-f", job).stdout == b"1\n2\n3\n"
    lines = sandboxd(served, "logs", "--json", job).stdout.splitlines()
    assert json.loads(lines[-1])["type"] == "exit"


def test_without_follow_it_ends_now(served: Process) -> None:
    job = submit(served, "--", "sleep", "100")
    assert sandboxd(served, "logs", job).returncode == 0
    assert sandboxd(served, "cancel", job).returncode == 0
    assert sandboxd(served, "wait", job).returncode == 137


def test_the_list(served: Process) -> None:
    job = submit(served, "--name", "listed", "--priority", "9", "--", "sleep", "100")
    assert job == "listed"
    lines = sandboxd(served, "ps").stdout.decode().splitlines()
    assert lines[0].split() == ["ID", "STATE", "STATUS", "AGE", "POLICY", "COMMAND"]
    assert [line for line in lines if line.startswith("listed ") and line.endswith("sleep 100")]
    sandboxd(served, "cancel", job)
    sandboxd(served, "wait", job)
    assert b"listed" not in sandboxd(served, "ps").stdout
    found = [
        json.loads(line) for line in sandboxd(served, "ps", "-a", "--json").stdout.splitlines()
    ]
    assert [one["status"] for one in found if one["id"] == "listed"] == ["cancelled"]
    assert len(sandboxd(served, "ps", "-a", "-n", "1").stdout.splitlines()) == 2


WRONG: dict[tuple[str, ...], str] = {
    ("submit",): "no program to run",
    ("submit", "-p", "nope", "--", "true"): "no policy 'nope'",
    ("submit", "-m", "1024G", "--", "true"): "more than base.toml allows",
    ("submit", "--file", "/nothing", "--", "true"): "/nothing: No such file",
    ("wait", "nobody"): "no such job",
    ("wait", "../info"): "no such job",
    ("logs", "nobody"): "no such job",
    ("cancel", "nobody"): "no such job",
    ("ps", "--host", "ftp://x"): "no address",
    ("ps", "--host", "unix:///nothing"): "no daemon at unix:///nothing",
}


def test_what_is_wrong_is_a_line(served: Process) -> None:
    for argv, message in WRONG.items():
        done = sandboxd(served, *argv)
        assert done.returncode in (1, 125)
        assert message in done.stderr.decode()
        assert b"Traceback" not in done.stderr


def test_it_starts_without_trio() -> None:
    program = (
        "import sys\n"
        "from sandboxd.cli import main, submit, ps, logs, cancel, wait\n"
        "from sandboxd.serve import plain, address\n"
        "print(*{'trio', 'msgspec', 'asyncio', 'sandboxd.supervise'} & set(sys.modules))\n"
    )
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-P", "-c", program]
    done = subprocess.run(command, env=environ, capture_output=True, check=True)
    assert done.stdout.strip() == b""


@pytest.mark.parametrize("words", [["wait", "-q"], ["logs", "-f"]])
def test_who_waits_for_a_job_that_waits_goes_on_with_the_next_daemon(
    served: Process, words: list[str]
) -> None:
    for _ in range(2):
        submit(served, "--", "sleep", "1000")
    job = submit(served, "--", "sh", "-c", "echo there; exit 3")
    environ = {**os.environ, "SANDBOXD_HOST": f"unix://{served.place}/s", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-P", "-m", "sandboxd", *words, job]
    _, before = counts(served)
    with subprocess.Popen(command, env=environ, stdout=subprocess.PIPE) as waits:
        looks = 0
        while counts(served) < (2, before + looks + 2):  # it has had an answer, and asks again
            assert waits.poll() is None
            looks += 1
        served.kill()
        assert waits.poll() is None
        served.start()
        out, _ = waits.communicate(timeout=50)
    assert (waits.returncode, out) == ((3, b"") if words[0] == "wait" else (0, b"there\n"))


def counts(served: Process) -> tuple[float, float]:
    """Connections, this one among them; and requests that were well answered before."""
    with Plain(Unix(served.place / "s")).asking("GET", "/metrics") as answer:
        said = answer.body().decode()
    names = ("sandboxd_connections", r'sandboxd_http_requests_total\{status="200"\}')
    found = [re.search(rf"^{name} (.*)$", said, re.MULTILINE) for name in names]
    connections, requests = (float(one[1]) if one else 0.0 for one in found)
    return connections, requests


def test_what_there_is_not_is_told_from_a_job_that_failed(served: Process) -> None:
    done = sandboxd(served, "wait", "nosuch")
    assert (done.returncode, done.stderr.splitlines()[0]) == (125, b"sandboxd: no such job")
    assert sandboxd(served, "logs", "nosuch").returncode == 1


def test_a_name_that_no_job_can_have(served: Process) -> None:
    done = sandboxd(served, "submit", "--name", "a b", "--", "true")
    assert done.returncode == 2
    assert b"--name: 'a b': letters, digits, and _.- after the first\n" in done.stderr


@pytest.mark.parametrize("token", ["", "\n", "a b", "a\nb", "\u00e9"])
def test_a_token_that_is_none(served: Process, token: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SANDBOXD_TOKEN", token)
    done = sandboxd(served, "ps")
    if token.strip():
        assert done.returncode == 1
        assert done.stderr.startswith(b"sandboxd: the token is no token\n")
    else:
        assert (done.returncode, done.stderr) == (0, b"")


def test_a_file_that_the_daemon_could_not_keep(served: Process, tmp_path: Path) -> None:
    partial = served.place / "state/files/tmp"
    partial.rmdir()
    partial.touch()
    try:
        flags = ("--collect", "out", "--collect-to", str(tmp_path))
        done = sandboxd(served, "run", *flags, "--", "sh", "-c", "echo x > out")
    finally:
        partial.unlink()
        partial.mkdir()
    assert done.returncode == 0
    assert b"not kept: a file cannot be kept: Not a directory" in done.stderr
    assert not (tmp_path / "out").exists()
