"""`sandboxd run` as a user meets it: streams, exit codes, JSON, files, and what flags are worth."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

RUN = [sys.executable, "-P", "-m", "sandboxd", "run"]
PATIENCE = 60

pytestmark = [pytest.mark.needs("userns"), pytest.mark.root_ok]


def run(*words: str | bytes, **options: Any) -> subprocess.CompletedProcess[bytes]:
    streams: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    if "input" not in options:
        streams["stdin"] = subprocess.DEVNULL
    done: subprocess.CompletedProcess[bytes] = subprocess.run(
        [*RUN, *words], timeout=PATIENCE, check=False, **streams | options
    )
    return done


def result(*words: str | bytes, **options: Any) -> dict[str, Any]:
    """The record of --json."""
    done = run("--json", *words, **options)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def shell(script: str) -> list[str]:
    return ["--", "sh", "-c", script]


# -- streams ---------------------------------------------------------------------------------


def test_output_and_accounting() -> None:
    done = run(*shell("echo out; echo err >&2; exit 3"))
    assert (done.returncode, done.stdout) == (3, b"out\n")
    lines = done.stderr.decode().splitlines()
    assert lines[0] == "err"
    assert lines[1].startswith("sandboxd: nonzero_exit 3, cpu 0.")
    assert " s, wall " in lines[1]
    assert all(line.startswith("sandboxd: ") for line in lines[1:])


def test_quiet() -> None:
    done = run("-q", *shell("echo err >&2"))
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"err\n")


def test_the_accounting_says_what_is_not_enforced() -> None:
    degraded = result("--", "true")["degraded"]
    said = run("--", "true").stderr.decode()
    assert ("sandboxd: not enforced: " in said) == bool(degraded)
    assert all(f"{one['what']} (" in said for one in degraded)


def test_output_is_live() -> None:
    words = [*RUN, "-qi", *shell("echo ready; read word; echo got $word")]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        process.stdin.write(b"this\n")
        process.stdin.flush()
        assert process.stdout.readline() == b"got this\n"
    assert process.returncode == 0


def test_bytes_pass_as_they_are() -> None:
    every = bytes(range(256)) * 1000
    assert run("-qi", "--", "cat", input=every).stdout == every


def test_much_output_in_order() -> None:
    done = run("-q", *shell("seq 300000"))
    assert done.stdout == b"".join(b"%d\n" % number for number in range(1, 300001))


def test_stdin(tmp_path: Path) -> None:
    source = tmp_path / "in"
    source.write_bytes(b"from a file\xff")
    assert run("-q", "--", "cat", input=b"not forwarded").stdout == b""
    assert run("-q", "-i", "--", "cat", input=b"forwarded").stdout == b"forwarded"
    assert run("-q", "--stdin", str(source), "--", "cat").stdout == b"from a file\xff"
    with source.open("rb") as stream:
        assert run("-qi", "--", "cat", stdin=stream).stdout == b"from a file\xff"
    assert run("-qi", "--", "cat").stdout == b""  # /dev/null
    assert run("-q", "--stdin", "/dev/null", "--", "cat").stdout == b""


def test_a_program_that_does_not_read_its_stdin() -> None:
    done = run("-qi", "--", "true", input=bytes(10 << 20))
    assert (done.returncode, done.stderr) == (0, b"")


def test_output_that_cannot_be_written() -> None:
    with open("/dev/full", "wb") as full:
        done = run("-q", *shell("echo x; sleep 60"), stdout=full)
    assert done.returncode == 125
    assert done.stderr == b"sandboxd: output cannot be written: No space left on device\n"


@pytest.mark.parametrize("form", ["--json", "--json=stream"])
def test_a_record_that_cannot_be_written(form: str) -> None:
    with open("/dev/full", "wb") as full:
        done = run(form, "--", "true", stdout=full)
    assert done.returncode == 125
    assert done.stderr == b"sandboxd: output cannot be written: No space left on device\n"


def test_a_limit_of_ours_under_which_nothing_can_be_started() -> None:
    """What would be executed is a file without a name, and RLIMIT_FSIZE holds for those, too."""
    lowered = ["sh", "-c", 'trap "" XFSZ; ulimit -f 0; exec "$@"', "sh", *RUN, "true"]
    done = subprocess.run(lowered, stdin=subprocess.DEVNULL, capture_output=True, check=False)
    assert done.returncode == 125
    assert done.stderr.startswith(b"sandboxd: tenant: step 0 start its zygote: File too large\n")


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (["--open-files", "4"], b"sandboxd:   command line: --open-files is too low for a sandbox"),
        (["--inodes", "1"], b"limits.disk, or limits.inodes, is too low for a sandbox itself"),
    ],
)
def test_a_limit_under_which_no_sandbox_fits(words: list[str], hint: bytes) -> None:
    done = run(*words, "--", "true")
    assert done.returncode == 125
    assert hint in done.stderr


def test_a_nonblocking_stdout() -> None:
    """Whoever shares it with us may have made it so."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    with subprocess.Popen([*RUN, "-q", *shell("seq 200000")], stdout=writer) as process:
        os.close(writer)
        with open(reader, "rb") as stream:
            assert len(stream.read().splitlines()) == 200000
    assert process.returncode == 0


# -- exit codes ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "code", "status"),
    [
        (["--", "true"], 0, "ok"),
        (shell("exit 77"), 77, "nonzero_exit"),
        (shell("kill -SEGV $$"), 139, "signaled"),
        (["--", "no-such-program"], 127, "start_failed"),
        (["--", "/no/such/program"], 127, "start_failed"),
        (["--", "/etc"], 126, "start_failed"),
        (["--", "/etc/passwd"], 126, "start_failed"),
        (["-w", "/nowhere", "--", "true"], 127, "start_failed"),
        (["--cpu-time", "300ms", *shell("while :; do :; done")], 124, "cpu_time_limit"),
        (["--wall-time", "300ms", "--", "sleep", "60"], 124, "wall_time_limit"),
        (["--idle-time", "1s", "--", "sleep", "60"], 124, "idle_limit"),
        (["--output", "10K", "--", "yes"], 153, "output_limit"),
    ],
)
def test_exit_codes(words: list[str], code: int, status: str) -> None:
    done = run("--json", *words)
    assert json.loads(done.stdout)["status"] == status
    assert done.returncode == code
    assert run("-q", *words).returncode == code


@pytest.mark.needs("memory")
def test_exit_code_of_the_memory_limit() -> None:
    script = "x = bytearray(300 << 20)\nfor at in range(0, len(x), 4096): x[at] = 1"
    done = run("--json", "-m", "64M", "--", "python3", "-c", script)
    assert json.loads(done.stdout)["status"] == "memory_limit"
    assert done.returncode == 137


def test_a_file_that_is_not_executable(tmp_path: Path) -> None:
    (tmp_path / "prog").write_text("#!/bin/sh\n")
    done = run("--file", f"{tmp_path}/prog", "--", "./prog")
    assert done.returncode == 126
    assert b"sandboxd: start_failed (./prog: Permission denied)" in done.stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["-p", "bsae", "true"], b"sandboxd: no policy 'bsae'\nsandboxd:   did you mean base?"),
        (["--file", "/nowhere", "true"], b"sandboxd: --file /nowhere: No such file or directory"),
        (["--stdin", "/nowhere", "true"], b"sandboxd: stdin: /nowhere: No such file or directory"),
        (["--stdin", "/", "true"], b"sandboxd: stdin: / is no regular file"),
        (["--stdin", "/dev/zero", "true"], b"sandboxd: stdin: /dev/zero is no regular file"),
        (["-p", "", "true"], b"sandboxd: no policy ''"),
        (["--root", "/", "true"], b"sandboxd: --root /: a root cannot be the one we are in"),
        (["-v", "/nowhere:/x", "true"], b"sandboxd: cannot show /nowhere on /x: no such file"),
        (["--collect", "*", "true"], b"sandboxd: --collect without --collect-to"),
        ([], b"sandboxd: no program to run"),
    ],
)
def test_what_sandboxd_cannot_do(words: list[str], said: bytes) -> None:
    done = run(*words)
    assert (done.returncode, done.stdout) == (125, b"")
    assert said in done.stderr
    record = json.loads(run("--json", *words).stdout)
    assert (record["schema"], record["status"]) == ("sandboxd.result/1", "error")
    assert record["error"]["kind"] in ("policy", "job")
    assert record["error"]["message"].encode() in done.stderr


# -- arguments and environment ---------------------------------------------------------------


def test_arguments_are_bytes() -> None:
    done = run("-q", "--", "printf", "%s|", b"\xff\xe9", "", "é", b"a\nb")
    assert done.stdout == b"\xff\xe9||\xc3\xa9|a\nb|"


def test_ten_thousand_arguments() -> None:
    words = [str(number) for number in range(10_000)]
    assert run("-q", "--", "echo", *words).stdout.split() == [word.encode() for word in words]


def test_two_megabytes_of_environment(tmp_path: Path) -> None:
    listed = tmp_path / "env"
    listed.write_bytes(b"".join(b"V%d=%s\n" % (number, b"x" * 1000) for number in range(2000)))
    assert run("-q", "--env-file", str(listed), *shell("env | grep -c ^V")).stdout == b"2000\n"


def test_environment() -> None:
    env = {**os.environ, "PASSED": "on", "SECRET": "s"}
    found = run("-q", "-e", "PASSED", "-e", "A=b c", "-e", b"B=\xff", "--", "env", env=env)
    lines = found.stdout.splitlines()
    assert {b"PASSED=on", b"A=b c", b"B=\xff", b"HOME=/box"} <= set(lines)
    assert not [line for line in lines if line.startswith(b"SECRET")]


def test_one_argument_too_large() -> None:
    """A string of execve(2) has at most 128 KiB."""
    done = run("-e", "A=" + "x" * 130_000, "--env-file", "/dev/null", "--", "true")
    assert done.returncode == 0


# -- JSON ------------------------------------------------------------------------------------


def test_json_is_all_there_is_on_stdout() -> None:
    done = run("--json", *shell("echo out; printf 'err\\377' >&2; exit 4"))
    assert (done.returncode, done.stderr) == (4, b"")
    record = json.loads(done.stdout)
    assert done.stdout.count(b"\n") == 1
    assert (record["status"], record["exit_code"]) == ("nonzero_exit", 4)
    assert record["streams"]["stdout"]["data"] == "out\n"
    assert base64.b64decode(record["streams"]["stderr"]["data_b64"]) == b"err\xff"
    assert record["policy"]["name"] == "base"


def test_keep_output() -> None:
    streams = result("--keep-output", "10", *shell("printf 0123456789abcdefghij"))["streams"]
    assert streams["stdout"]["bytes"] == 20
    assert (streams["stdout"]["data"], streams["stdout"]["tail"]) == ("01234", "fghij")


def test_json_stream_with_usage() -> None:
    done = run("--json=stream", "--usage-every", "20ms", *shell("sleep 0.3"))
    events = [json.loads(line) for line in done.stdout.splitlines()]
    usages = [event["usage"] for event in events if event["type"] == "usage"]
    assert len(usages) >= 2
    assert all(usage["wall_time"] < 30 for usage in usages)
    assert [event["seq"] for event in events] == list(range(len(events)))
    wrong = run("--json", "--usage-every", "1s", "--", "true")
    assert wrong.returncode == 125
    assert b"--json=stream" in wrong.stderr
    wrong = run("--json=stream", "--usage-every", "1ms", "--", "true")
    assert wrong.returncode == 2
    assert b"argument --usage-every: '1ms' is less than 10ms" in wrong.stderr


def test_json_stream() -> None:
    done = run("--json=stream", *shell("echo out; echo err >&2; exit 4"))
    assert (done.returncode, done.stderr) == (4, b"")
    events = [json.loads(line) for line in done.stdout.splitlines()]
    assert [event["seq"] for event in events] == list(range(len(events)))
    assert (events[0]["type"], events[-1]["type"]) == ("start", "exit")
    texts = {event["type"]: event["data"] for event in events if "data" in event}
    assert texts == {"stdout": "out\n", "stderr": "err\n"}
    assert events[-1]["result"]["exit_code"] == 4


def test_json_stream_of_a_failure() -> None:
    done = run("--json=stream", "-p", "nothing", "true")
    (event,) = [json.loads(line) for line in done.stdout.splitlines()]
    assert (event["type"], event["result"]["error"]["kind"]) == ("exit", "policy")
    assert event["seq"] == 0


def test_json_stream_of_a_failure_after_the_start(tmp_path: Path) -> None:
    policy = tmp_path / "missing.toml"
    mount = '[[mounts]]\nsource = "/nonexistent"\ntarget = "/x"\n'
    policy.write_text(f'extends = "base"\n{mount}')
    done = run("--json=stream", "-p", str(policy), "true")
    events = [json.loads(line) for line in done.stdout.splitlines()]
    assert [(event["seq"], event["type"]) for event in events] == [(0, "start"), (1, "exit")]
    assert events[-1]["result"]["error"]["kind"] == "launch"


def test_result_fd(tmp_path: Path) -> None:
    target = tmp_path / "result.json"
    with target.open("wb") as stream:
        fd = stream.fileno()
        script = f"echo out; ls /proc/self/fd; echo x >&{fd}"
        done = run("-q", "--result-fd", str(fd), *shell(script), pass_fds=[fd])
    assert done.stdout.startswith(b"out\n0\n1\n2\n")
    record = json.loads(target.read_bytes())
    assert record["streams"]["stdout"]["data"].encode() == done.stdout
    assert record["exit_code"] == done.returncode != 0  # the program does not have it


def test_result_fd_of_a_failure(tmp_path: Path) -> None:
    target = tmp_path / "result.json"
    with target.open("wb") as stream:
        fd = stream.fileno()
        run("--result-fd", str(fd), "-p", "nothing", "true", pass_fds=[fd])
    assert json.loads(target.read_bytes())["error"]["kind"] == "policy"


@pytest.mark.parametrize(
    ("fd", "said"),
    [("99", b"'99' is no open descriptor"), ("x", b"e.g. 3>result.json"), ("0", b"not open for")],
)
def test_result_fd_that_is_wrong(fd: str, said: bytes) -> None:
    with open("/dev/null", "rb") as stdin:
        done = run("--result-fd", fd, "true", stdin=stdin)
    assert done.returncode == 2
    assert said in done.stderr


# -- the policy and flags --------------------------------------------------------------------


def test_flags_make_a_policy_of_their_own() -> None:
    record = result("--open-files", "100", "--wall-time", "2h", *shell("ulimit -n"))
    assert record["policy"]["name"] == "base+flags"
    assert record["policy"]["sha256"] != result("--", "true")["policy"]["sha256"]
    assert record["streams"]["stdout"]["data"] == "100\n"
    assert record["limits"]["wall_time"]["limit"] == 7200  # base has 10 minutes


def test_identity_and_hostname() -> None:
    done = run("-q", "-u", "33:44", "--hostname", "here", *shell("id -u; id -g; hostname"))
    assert done.stdout == b"33\n44\nhere\n"


def test_entrypoint_and_workdir() -> None:
    assert run("-q", "--entrypoint", "sh", "-w", "/tmp", "-c", "pwd").stdout == b""
    assert run("-q", "-w", "/tmp", "--entrypoint", "pwd").stdout == b"/tmp\n"


def test_name() -> None:
    assert result("--name", "job-1", "--", "true")["job"] == "job-1"


def test_roots() -> None:
    script = shell("echo x > /written && cat /written")
    assert run("-q", *script).returncode != 0
    assert run("-q", "--writable-root", *script).stdout == b"x\n"
    assert not os.path.exists("/written")
    assert run("-q", "-p", "shell", "--read-only", *script).returncode != 0


# -- files -----------------------------------------------------------------------------------


def test_files_in(tmp_path: Path) -> None:
    (tmp_path / "tree/deep").mkdir(parents=True)
    (tmp_path / "tree/deep/a").write_text("in a tree")
    (tmp_path / "prog").write_text("#!/bin/sh\ncat tree/deep/a other\n")
    (tmp_path / "prog").chmod(0o755)
    (tmp_path / "x").write_text(", renamed")
    done = run(
        "-q", "--file", "prog", "--file", "tree", "--file", "x:other", "--", "./prog", cwd=tmp_path
    )  # fmt: skip
    assert (done.stdout, done.stderr) == (b"in a tree, renamed", b"")


def test_files_out(tmp_path: Path) -> None:
    script = "mkdir -p out/deep; echo 1 > out/deep/a; echo 2 > out/b; echo 3 > c; chmod 6755 out/b"
    words = ["--collect", "out/**", "--collect", "nothing", "--collect-to", str(tmp_path / "new")]
    done = run(*words, *shell(script))
    assert (tmp_path / "new/out/deep/a").read_text() == "1\n"
    assert (tmp_path / "new/out/b").read_text() == "2\n"
    assert (tmp_path / "new/out/b").stat().st_mode & 0o7777 == 0o755
    assert not (tmp_path / "new/c").exists()
    assert b"sandboxd: not collected: nothing (" in done.stderr
    assert done.returncode == 1


@pytest.fixture
def shared(tmp_path: Path) -> Path:
    """A directory of ours that a sandbox gets to see."""
    for folder in (tmp_path, *tmp_path.parents):
        if folder.stat().st_uid == os.geteuid():
            folder.chmod(0o755)
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared/old").write_text("old\n")
    return tmp_path / "shared"


@pytest.mark.parametrize("target", ["/data", "/box/data", "/tmp/data", "/box", "/usr/share/doc"])
def test_read_only_volume(shared: Path, target: str) -> None:
    script = shell(f"cat {target}/old; echo new > {target}/new")
    done = run("-q", "-v", f"{shared}:{target}:ro", *script)
    assert done.stdout == b"old\n"
    assert b"Read-only file system" in done.stderr
    assert os.listdir(shared) == ["old"]


@pytest.mark.skipif(os.geteuid() == 0, reason="as root nobody in a sandbox is the caller")
@pytest.mark.parametrize("target", ["/data", "/box/data", "/box"])
def test_writable_volume(shared: Path, target: str) -> None:
    done = run("-q", "-v", f"./shared:{target}", "-w", target, *shell("echo new > new; rm old"),
               cwd=shared.parent)  # fmt: skip
    assert (done.returncode, done.stderr) == (0, b"")
    assert os.listdir(shared) == ["new"]
    assert (shared / "new").stat().st_uid == os.geteuid()


def test_one_file_as_a_volume(shared: Path) -> None:
    assert run("-q", "-v", f"{shared}/old:/box/f:ro", "--", "cat", "f").stdout == b"old\n"


def test_tmpfs() -> None:
    script = shell(
        "cd /scratch; head -c 99999 /dev/zero > a && echo fits; head -c 999999 /dev/zero > b"
    )
    done = run("-q", "--tmpfs", "/scratch:size=256K", *script)
    assert done.stdout == b"fits\n"
    assert b"No space left" in done.stderr
