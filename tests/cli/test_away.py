"""`sandboxd run` by a daemon: what it prints and how it ends is what it is without one."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trio

from tests.serve.serving import ROOT, Process, folder, process

pytestmark = pytest.mark.needs("userns")


@pytest.fixture(scope="module")
def served() -> Iterator[Process]:
    with folder() as place:
        flags = ("--listen", f"unix://{place}/second")
        with process(place, *flags) as one:
            links = trio.run(one.links)
            trio.run(links.close)
            yield one


@pytest.fixture(autouse=True)
def nothing_left() -> None:
    """The daemon of all tests here is a process of its own, and stays."""


def environ(served: Process | None) -> dict[str, str]:
    found = {**os.environ, "PYTHONPATH": str(ROOT)}
    if served is not None:
        found["SANDBOXD_HOST"] = f"unix://{served.place}/s"
    return found


def run(served: Process | None, *argv: str, **more: Any) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-P", "-m", "sandboxd", "run", *argv]
    if "input" not in more:
        more["stdin"] = subprocess.DEVNULL
    return subprocess.run(
        command, env=environ(served), capture_output=True, timeout=50, check=False, **more
    )


def start(served: Process, *argv: str, **more: Any) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-P", "-m", "sandboxd", "run", *argv]
    return subprocess.Popen(command, env=environ(served), **more)


def plain(data: bytes) -> str:
    """Without what differs from run to run; whether a short one was sampled does."""
    numbers = re.sub(r"\d+\.\d+", "N", data.decode())
    return re.sub(r", memory N \w+ \(sampled \w+\)", "", numbers)


SAME: dict[str, list[str]] = {
    "output": ["--", "sh", "-c", "echo out; echo err >&2"],
    "exit status": ["--", "sh", "-c", "exit 3"],
    "a signal": ["--", "sh", "-c", "kill -SEGV $$"],
    "a missing program": ["--", "no-such-program"],
    "a limit": ["--wall-time", "0.3", "--", "sleep", "60"],
    "a raised limit": ["--wall-time", "20min", "-m", "3G", "--", "echo", "x"],
    "an output limit": ["--output", "1000", "--", "yes"],
    "a policy": ["-p", "judge-native", "--", "echo", "x"],
    "a file of a policy": ["-p", "policies/ci.toml", "--", "echo", "x"],
    "no such policy": ["-p", "nosuch", "--", "echo"],
    "variables": ["-e", "A=b", "--", "sh", "-c", "echo $A $HOME"],
    "a place": ["-w", "/tmp", "--", "pwd"],
    "quiet": ["-q", "--", "echo", "x"],
    "no program": [],
    "a user": ["-u", "0", "--", "id", "-u"],
    "a tmpfs": ["--tmpfs", "/data", "--", "ls", "/data"],
    "what cannot be": ["--usage-every", "1s", "--", "true"],
    "no file": ["--file", "/nosuch", "--", "true"],
}


@pytest.mark.parametrize("what", SAME)
def test_it_is_the_same(served: Process, what: str) -> None:
    here, away = (run(one, *SAME[what], cwd=ROOT) for one in (None, served))
    assert away.stdout == here.stdout
    assert plain(away.stderr) == plain(here.stderr)
    assert away.returncode == here.returncode


def shape(value: Any) -> Any:
    """What a record consists of, without what was measured."""
    if isinstance(value, dict):
        return {key: shape(one) for key, one in value.items()}
    return value if isinstance(value, str) else None


CHANGING = {"job", "timing", "usage", "quality"}


@pytest.mark.parametrize("flags", [["--json"], ["--json=stream"], ["--json", "-m", "100M"]])
@pytest.mark.parametrize("program", ["echo x; echo y >&2", "exit 1", "printf '\\377'"])
def test_its_json_is_the_same(served: Process, flags: list[str], program: str) -> None:
    found = []
    for one in (None, served):
        done = run(one, *flags, "--", "sh", "-c", program)
        lines = [json.loads(line) for line in done.stdout.splitlines()]
        for line in lines:
            record = line.get("result", line if "schema" in line else {})
            for key in CHANGING & set(record):
                record[key] = sorted(record[key]) if isinstance(record[key], dict) else None
        found.append((sorted(map(json.dumps, map(shape, lines))), done.returncode, done.stderr))
    assert found[0] == found[1]


def test_the_record_goes_to_a_descriptor_and_errors_too(served: Process) -> None:
    script = f"{sys.executable} -P -m sandboxd run --result-fd 3 -q"
    for argv, status in (("-- true", "ok"), ("-p nosuch -- true", "error")):
        done = subprocess.run(
            ["sh", "-c", f"{script} {argv} 3>&1 >/dev/null"],
            env=environ(served), capture_output=True, timeout=50, check=False,
        )  # fmt: skip
        assert json.loads(done.stdout)["status"] == status


def test_files_go_in_and_come_out(served: Process, tmp_path: Path) -> None:
    (tmp_path / "large").write_bytes(b"\xff\0" * 600_000)
    (tmp_path / "dir/deep").mkdir(parents=True)
    (tmp_path / "dir/deep/x").write_text("x")
    (tmp_path / "tool").write_text("#!/bin/sh\necho made > out\n")
    (tmp_path / "tool").chmod(0o755)
    done = run(
        served, "-q", "--file", f"{tmp_path}/large", "--file", f"{tmp_path}/dir", "--file",
        f"{tmp_path}/tool:t", "--stdin", f"{tmp_path}/dir/deep/x", "--collect", "out", "--collect",
        "none*", "--collect-to", f"{tmp_path}/got", "--",
        "sh", "-c", "wc -c < large; cat dir/deep/x -; ./t",
    )  # fmt: skip
    assert (done.stdout, done.stderr, done.returncode) == (b"1200000\nxx", b"", 0)
    assert (tmp_path / "got/out").read_text() == "made\n"


def test_stdin_goes_in_as_it_comes(served: Process) -> None:
    data = os.urandom(3_000_000)
    done = run(served, "-q", "-i", "--", "cat", input=data)
    assert done.stdout == data
    with start(served, "-q", "-i", "--", "sh", "-c", "read a; echo got $a; read b; echo and $b",
               stdin=subprocess.PIPE, stdout=subprocess.PIPE) as live:  # fmt: skip
        assert live.stdin is not None
        assert live.stdout is not None
        live.stdin.write(b"one\n")
        live.stdin.flush()
        assert live.stdout.readline() == b"got one\n"  # while it runs
        live.stdin.write(b"two\n")
        live.stdin.close()
        assert live.stdout.read() == b"and two\n"


def test_a_terminal(served: Process) -> None:
    ours, theirs = pty.openpty()
    with start(served, "-q", "-it", "--", "sh", "-c", "stty size; read a; echo got $a",
               stdin=theirs, stdout=theirs) as live:  # fmt: skip
        os.close(theirs)
        shown = os.read(ours, 100)
        os.write(ours, b"word\r")
        while b"got word\r\n" not in shown:
            shown += os.read(ours, 100)
        assert live.wait(50) == 0
    os.close(ours)


def running(served: Process) -> list[dict[str, Any]]:
    """The jobs that the daemon has running."""
    command = [sys.executable, "-P", "-m", "sandboxd", "ps", "--json"]
    done = subprocess.run(command, env=environ(served), capture_output=True, check=True)
    return [one for one in map(json.loads, done.stdout.splitlines()) if one["state"] == "running"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_cancels_it(served: Process, number: signal.Signals) -> None:
    with start(served, "--", "sh", "-c", "echo ready; sleep 60",
               stdout=subprocess.PIPE, stderr=subprocess.PIPE) as live:  # fmt: skip
        assert live.stdout is not None
        assert live.stderr is not None
        assert live.stdout.readline() == b"ready\n"
        live.send_signal(number)
        assert live.wait(50) == 128 + number
        assert b"cancelled" in live.stderr.read()
    assert not running(served)


def test_a_signal_is_heard_while_nobody_reads(served: Process) -> None:
    with start(served, "-q", "--", "yes", stdout=subprocess.PIPE) as live:
        assert live.stdout is not None
        assert live.stdout.read(2) == b"y\n"
        while len(running(served)) != 1:
            time.sleep(0.01)
        live.send_signal(signal.SIGTERM)
        assert live.wait(50) == 128 + signal.SIGTERM


def test_a_reader_who_goes_away_ends_it(served: Process) -> None:
    with start(served, "-q", "--", "yes", stdout=subprocess.PIPE) as live:
        assert live.stdout is not None
        live.stdout.read(2)
        live.stdout.close()
        assert live.wait(50) == 141
    assert not running(served)


def test_killed_it_takes_its_job_with_it(served: Process) -> None:
    with start(served, "--", "sh", "-c", "echo ready; sleep 60", stdout=subprocess.PIPE) as live:
        assert live.stdout is not None
        assert live.stdout.readline() == b"ready\n"
        live.kill()
    while running(served):
        time.sleep(0.01)


CONFIG: dict[str, Any] = {
    "ociVersion": "1.0.2",
    "root": {"path": "rootfs"},
    "mounts": [{"destination": "/proc", "type": "proc", "source": "proc"}],
    "process": {
        "args": ["sh", "-c", "pwd; echo $A; read x; echo $x"],
        "cwd": "/tmp",
        "env": ["PATH=/usr/bin", "A=a"],
        "capabilities": {"bounding": ["CAP_KILL"]},
    },
    "hooks": {"prestart": [{"path": "/bin/true"}]},
}


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    (tmp_path / "rootfs").mkdir()
    for name in ("bin", "lib", "lib64"):
        (tmp_path / "rootfs" / name).symlink_to(f"usr/{name}")
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    return tmp_path


@pytest.mark.needs("overlay")
@pytest.mark.parametrize(
    "more", [[], ["-q"], ["--strict"], ["-e", "A=b", "--", "env"], ["--json"], ["-m", "1G"]]
)
def test_a_bundle_and_what_of_it_is_not_done(
    served: Process, bundle: Path, more: list[str]
) -> None:
    flags = ["--bundle", str(bundle), "-v", "/usr:/usr:ro", *more]
    here, away = (run(one, *flags, input=b"in\n") for one in (None, served))
    if more == ["--json"]:
        degraded = [json.loads(done.stdout)["degraded"] for done in (here, away)]
        assert degraded[0] == degraded[1]
        assert {
            "what": "config.json: hooks",
            "why": "hooks are programs of the host, and are never run",
        } in degraded[0]
    else:
        assert away.stdout == here.stdout
    assert plain(away.stderr) == plain(here.stderr)
    assert away.returncode == here.returncode
    told = b"sandboxd: not done: config.json: hooks (" in away.stderr
    assert told == (more not in (["-q"], ["--json"], ["--strict"]))
    assert away.returncode == (125 if more == ["--strict"] else 0)


REFUSED = [
    ["--keep"], ["--commit", "x"], ["--built", "aabb"], ["--files-from", "x.tar"],
    ["--collect-optional", "x", "--collect-to", "y"], ["--cgroup", "none"],
    ["--collect-required", "x", "--collect-to", "y"],
]  # fmt: skip


@pytest.mark.parametrize("flags", REFUSED, ids=lambda flags: str(flags[0]))
def test_what_does_not_go_there_is_refused_by_name(served: Process, flags: list[str]) -> None:
    done = run(served, *flags, "--", "true")
    assert done.returncode == 125
    first, hint = done.stderr.decode().splitlines()
    assert f"{flags[0]}: not by the daemon at unix://" in first
    assert "--host local" in hint


def test_which_daemon(served: Process) -> None:
    assert run(served, "-q", "--host", "local", "--keep", "-p", "ci", "--", "true").returncode == 0
    done = run(None, "-q", "--host", f"unix://{served.place}/second", "--", "echo", "x")
    assert done.stdout == b"x\n"
    done = run(None, "--host", f"unix://{served.place}/none", "--", "echo", "x")
    assert done.returncode == 125
    assert b"no daemon at" in done.stderr
    assert run(None, "--host", "nonsense", "--", "echo", "x").returncode == 125


def test_it_starts_without_what_it_does_not_need(served: Process) -> None:
    command = [sys.executable, "-P", "-X", "importtime", "-m", "sandboxd", "run"]
    done = subprocess.run(
        [*command, "--", "true"], env=environ(served), capture_output=True, timeout=50, check=False
    )
    loaded = set(re.findall(r"\| +(\S+)$", done.stderr.decode(), re.MULTILINE))
    assert "sandboxd.cli.away" in loaded
    assert not {"trio", "asyncio", "pyroute2", "msgspec", "sandboxd.policy", "yaml"} & loaded
