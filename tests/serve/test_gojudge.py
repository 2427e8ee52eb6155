"""go-judge's protocol over HTTP: what its callers send, and what they rely on in the answers."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import trio

from sandboxd.serve.callers import Callers
from tests.serve.gojudging import PATH, SECOND, STDERR, STDOUT, Judge, cmd, judge, sh

pytestmark = pytest.mark.needs("userns")


async def test_a_program_that_ends_well() -> None:
    async with judge() as served:
        (found,) = await served.run(sh("cat; echo err >&2", stdin="hello\n"))
        assert found["status"] == "Accepted"
        assert found["exitStatus"] == 0
        assert found["files"] == {"stdout": "hello\n", "stderr": "err\n"}
        assert 0 < found["time"] < 10 * SECOND
        assert 0 < found["runTime"] < 20 * SECOND
        assert found["memory"] > 0
        assert found.get("procPeak", 1) >= 1  # nobody has seen it in a short run without cgroup
        assert not {"error", "fileIds", "fileError"} & set(found)


ENDINGS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "exit": (sh("exit 3"), {"status": "Nonzero Exit Status", "exitStatus": 3}),
    "signal": (sh("kill -SEGV $$"), {"status": "Signalled", "exitStatus": 11}),
    "cpu": (
        sh("while :; do :; done", cpuLimit=SECOND // 5),
        {"status": "Time Limit Exceeded", "exitStatus": 9},
    ),
    "clock": (
        sh("sleep 30", clockLimit=SECOND // 5),
        {"status": "Time Limit Exceeded", "exitStatus": 9},
    ),
    "clock by cpu": (
        sh("sleep 30", cpuLimit=SECOND // 5, clockLimit=0),
        {"status": "Time Limit Exceeded"},
    ),
    "old name of clock": (
        sh("sleep 30", realCpuLimit=SECOND // 5),
        {"status": "Time Limit Exceeded"},
    ),
    "memory": (
        cmd("python3", "-c", "b'x' * (1 << 29)", memoryLimit=64 << 20, addressSpaceLimit=True),
        {"status": "Nonzero Exit Status"},
    ),
    "output": (
        sh("head -c 20000 /dev/zero"),
        {"status": "Output Limit Exceeded"},
    ),
    "missing": (cmd("no-such-program"), {"status": "Internal Error"}),
    "large file": (
        sh("ulimit -f 1; head -c 1000000 /dev/zero > big; kill -XFSZ $$"),
        {"status": "Signalled", "exitStatus": 25},
    ),
}


@pytest.mark.parametrize("how", ENDINGS)
async def test_how_it_ended(how: str) -> None:
    asked, expected = ENDINGS[how]
    async with judge() as served:
        (found,) = await served.run(asked)
        assert {key: found[key] for key in expected} == expected, found


@pytest.mark.needs("memory")
async def test_too_much_memory() -> None:
    async with judge() as served:
        asked = cmd("python3", "-c", "b'x' * (1 << 29)", memoryLimit=64 << 20)
        (found,) = await served.run(asked)
        assert found["status"] == "Memory Limit Exceeded"
        assert found["exitStatus"] == 9


async def test_a_forbidden_call() -> None:
    program = "import ctypes; ctypes.CDLL(None).syscall(0x40000000 + 39)"  # of x32
    async with judge() as served:
        (found,) = await served.run(cmd("python3", "-c", program))
        if os.uname().machine == "x86_64":
            assert (found["status"], found["exitStatus"]) == ("Dangerous Syscall", 31)


async def test_the_working_directory_is_w() -> None:
    script = "cat /w/in /w/deep/in ./in; test -x /w/in; echo made > /w/out; echo $HOME"
    async with judge() as served:
        asked = sh(
            script,
            copyIn={"/w/in": {"content": "a"}, "deep/in": {"content": "b"}},
            copyOut=["/w/out", "out", "none?"],
        )
        (found,) = await served.run(asked)
        assert found["status"] == "Accepted", found
        assert found["files"]["stdout"] == "aba/w\n"
        assert found["files"]["/w/out"] == found["files"]["out"] == "made\n"
        twice = sh("echo made > out", copyOutCached=["/w/out", "out"])
        (found,) = await served.run(twice)
        assert set(found["fileIds"]) == {"/w/out", "out"}


async def test_files_are_kept_and_used_again() -> None:
    async with judge() as served:
        compile_ = sh(
            "echo 'echo made of $1' > prog", copyOutCached=["prog", "none?"], copyOut=["stderr"]
        )
        (built,) = await served.run(compile_)
        assert built["status"] == "Accepted"
        prog = built["fileIds"]["prog"]
        assert "prog" not in built["files"]
        again = cmd("sh", "prog", "x", copyIn={"prog": {"fileId": prog}})
        for _ in range(2):
            (found,) = await served.run(again)
            assert found["files"]["stdout"] == "made of x\n"
        (found,) = await served.run(
            cmd("cat", files=[{"fileId": prog}, STDOUT, STDERR], copyOutCached=["stdout"])
        )
        assert found["files"] == {"stderr": ""}
        _, _, body = await served.ask("GET", f"/file/{found['fileIds']['stdout']}")
        assert body == b"echo made of $1\n"
        assert (await served.ask("DELETE", f"/file/{prog}"))[0] == 200
        assert (await served.ask("DELETE", f"/file/{prog}"))[0] == 404
        status, why = await served.refused({"cmd": [again]})
        assert status == 500
        assert prog in why


async def test_files_by_http() -> None:
    data = bytes(range(256)) * 300 + b"\r\n--x\r\n\r"
    form = (
        b'--bound\r\nContent-Disposition: form-data; name="other"\r\n\r\nx\r\n--bound\r\n'
        b'Content-Disposition: form-data; name="file"; filename="a b.bin"\r\n'
        b"Content-Type: application/octet-stream\r\n\r\n" + data + b"\r\n--bound--\r\n"
    )
    kind = {"Content-Type": "multipart/form-data; boundary=bound"}
    async with judge() as served:
        status, _, body = await served.ask("POST", "/file", form, kind)
        assert status == 200
        key = json.loads(body)
        assert json.loads((await served.ask("GET", "/file"))[2]) == {key: "a b.bin"}
        status, headers, body = await served.ask("GET", f"/file/{key}")
        assert (status, body) == (200, data)
        assert headers["content-disposition"] == 'attachment; filename="a b.bin"'
        assert (await served.ask("POST", "/file", form, {"Content-Type": "text/plain"}))[0] == 400
        nothing = b'--bound\r\nContent-Disposition: form-data; name="no"\r\n\r\nx\r\n--bound--'
        assert (await served.ask("POST", "/file", nothing, kind))[0] == 400
        assert (await served.ask("GET", "/file/none"))[0] == 404
        assert (await served.ask("GET", "/nothing"))[0] == 404


FAULTS: dict[str, tuple[dict[str, Any], list[tuple[str, str]]]] = {
    "missing": (sh("true", copyOut=["none"]), [("none", "CopyOutOpen")]),
    "elsewhere": (sh("true", copyOut=["/etc/passwd"]), [("/etc/passwd", "CopyOutOpen")]),
    "above": (sh("true", copyOut=["../x"]), [("../x", "CopyOutOpen")]),
    "directory": (sh("mkdir d", copyOut=["d"]), [("d", "CopyOutNotRegularFile")]),
    "link": (
        sh("ln -s /etc/passwd l", copyOutCached=["l"]),
        [("l", "CopyOutNotRegularFile")],
    ),
    "fifo": (sh("mkfifo f", copyOut=["f?"]), [("f", "CopyOutNotRegularFile")]),
    "size": (
        sh("head -c 100 /dev/zero > f", copyOut=["f"], copyOutMax=99),
        [("f", "CopyOutSizeExceeded")],
    ),
    "in elsewhere": (
        sh("true", copyIn={"/etc/x": {"content": ""}}),
        [("/etc/x", "CopyInCreateFile")],
    ),
}


@pytest.mark.parametrize("how", FAULTS)
async def test_what_is_wrong_with_files(how: str) -> None:
    asked, faults = FAULTS[how]
    async with judge() as served:
        (found,) = await served.run(asked)
        assert found["status"] == "File Error", found
        assert [(one["name"], one["type"]) for one in found["fileError"]] == faults
        assert found["error"] == found["fileError"][0]["message"]


async def test_a_program_that_failed_has_its_own_status_and_the_faults_beside_it() -> None:
    async with judge() as served:
        (found,) = await served.run(sh("exit 1", copyOut=["none"]))
        assert found["status"] == "Nonzero Exit Status"
        assert found["fileError"][0]["type"] == "CopyOutOpen"
        assert "error" not in found


async def test_what_is_too_long_is_cut() -> None:
    async with judge() as served:
        (found,) = await served.run(
            sh("printf 123456 > f", copyOut=["f"], copyOutMax=4, copyOutTruncate=True),
        )
        assert found["files"]["f"] == "1234"
        assert found["fileError"][0]["type"] == "CopyOutSizeExceeded"
        files = [{"src": "/dev/null"}, {"name": "o", "max": 4}, STDERR]
        (found,) = await served.run(sh("printf 123456", files=files))
        assert found["status"] == "Output Limit Exceeded"
        assert found["files"]["o"] == "12345"  # one more than it may be, as go-judge has it
        assert [(one["name"], one["type"]) for one in found["fileError"]] == [
            ("o", "CollectSizeExceeded")
        ]


async def test_links_go_in() -> None:
    async with judge() as served:
        asked = sh(
            "cat here; readlink up",
            copyIn={
                "there": {"content": "x\n"},
                "here": {"symlink": "there"},
                "up": {"symlink": "/usr/bin"},
            },
        )
        (found,) = await served.run(asked)
        assert found["files"]["stdout"] == "x\n/usr/bin\n", found


async def test_local_files_only_where_the_daemon_was_told(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data/1.in").write_text("input")
    (tmp_path / "secret").write_text("secret")
    (tmp_path / "data/link").symlink_to(tmp_path / "secret")
    async with judge(local=[tmp_path / "data"]) as served:
        asked = cmd("cat", "in", copyIn={"in": {"src": f"{tmp_path}/data/1.in"}})
        (found,) = await served.run(asked)
        assert found["files"]["stdout"] == "input"
        files = [{"src": f"{tmp_path}/data/1.in"}, STDOUT, STDERR]
        (found,) = await served.run(cmd("cat", files=files))
        assert found["files"]["stdout"] == "input"
        for path in ("secret", "data/link", "data/../secret"):
            asked = cmd("cat", "in", copyIn={"in": {"src": f"{tmp_path}/{path}"}})
            assert (await served.refused({"cmd": [asked]}))[0] == 400
        missing = cmd("cat", "in", copyIn={"in": {"src": f"{tmp_path}/data/none"}})
        (found,) = await served.run(missing)
        assert found["status"] == "File Error"
        assert found["fileError"][0]["type"] == "CopyInOpenFile"
        files = [{"src": f"{tmp_path}/data/none"}, STDOUT, STDERR]
        assert (await served.refused({"cmd": [cmd("cat", files=files)]}))[0] == 500
    async with judge() as served:
        asked = cmd("cat", "in", copyIn={"in": {"src": "/etc/hostname"}})
        assert "--compat-src" in (await served.refused({"cmd": [asked]}))[1]


GUESSER = "echo 5; read answer; echo $answer >&2"
ANSWERER = "read guess; echo right$guess; cat > /dev/null"


@pytest.mark.parametrize("proxy", [False, True])
async def test_an_interactive_problem(proxy: bool) -> None:
    mapping = [
        {"in": {"index": 0, "fd": 1}, "out": {"index": 1, "fd": 0}, "name": "to", "max": 1 << 20},
        {"in": {"index": 1, "fd": 1}, "out": {"index": 0, "fd": 0}, "name": "from", "max": 3},
    ]
    files = [None, None, STDERR]
    async with judge() as served:
        first, second = await served.run(
            sh(GUESSER, files=files),
            sh(ANSWERER, files=files),
            pipeMapping=[{**one, "proxy": proxy} for one in mapping],
        )
        assert (first["status"], second["status"]) == ("Accepted", "Accepted"), (first, second)
        assert first["files"]["stderr"] == "right5\n"
        if proxy:  # what was said, cut off at its most without a word
            assert first["files"]["to"] == "5\n"
            assert second["files"]["from"] == "rig"
            assert "fileError" not in second
        else:
            assert set(first["files"]) == set(second["files"]) == {"stderr"}


async def test_limits_are_each_programs_own() -> None:
    files = [None, None, STDERR]
    mapping = [
        {"in": {"index": 0, "fd": 1}, "out": {"index": 1, "fd": 0}},
        {"in": {"index": 1, "fd": 1}, "out": {"index": 0, "fd": 0}, "proxy": True},
    ]
    async with judge() as served:
        slow, other = await served.run(
            sh("while :; do :; done", cpuLimit=SECOND // 5, files=files),
            sh("cat", files=files),
            pipeMapping=mapping,
        )
        assert (slow["status"], other["status"]) == ("Time Limit Exceeded", "Accepted")


REFUSED: dict[str, tuple[Any, int]] = {
    "no cmd provided": ({"cmd": []}, 400),
    "truncated": (b"{", 400),
    "Expected `int": ({"cmd": [sh("true", cpuLimit="1s")]}, 400),
    "there are none": ({"cmd": [cmd()]}, 400),
    "file type is not valid": ({"cmd": [sh("true", copyIn={"a": {}})]}, 400),
    "streams are for /stream": (
        {"cmd": [sh("true", files=[{"streamIn": True}, STDOUT, STDERR])]},
        400,
    ),
    "descriptors above 2": ({"cmd": [sh("true", files=[{"content": ""}] * 4)]}, 400),
    "null file": ({"cmd": [sh("true", files=[None, STDOUT, STDERR])]}, 500),
    "collected as 'x'": (
        {"cmd": [sh("true", files=[{"content": ""}, *[{"name": "x", "max": 1}] * 2])]},
        400,
    ),
    "index out of range": (
        {
            "cmd": [sh("true"), sh("true")],
            "pipeMapping": [{"in": {"index": 5, "fd": 1}, "out": {"index": 1, "fd": 0}}],
        },
        500,
    ),
    "already occupied": (
        {
            "cmd": [sh("true"), sh("true")],
            "pipeMapping": [{"in": {"index": 0, "fd": 1}, "out": {"index": 1, "fd": 0}}],
        },
        500,
    ),
    "fd 3 written to": (
        {
            "cmd": [sh("true"), sh("true")],
            "pipeMapping": [{"in": {"index": 0, "fd": 3}, "out": {"index": 1, "fd": 0}}],
        },
        400,
    ),
    "at most 16": ({"cmd": [sh("true")] * 17}, 400),
    "limits.memory": ({"cmd": [sh("true", memoryLimit=1 << 40)]}, 400),
    "cpuSetLimit": ({"cmd": [sh("true", cpuSetLimit="all")]}, 400),
    "its input can only be a stream": ({"cmd": [sh("true", tty=True)]}, 400),
    "NUL": ({"cmd": [cmd("a\0b")]}, 400),
}


@pytest.mark.parametrize("why", REFUSED)
async def test_what_cannot_be_is_refused(why: str) -> None:
    body, status = REFUSED[why]
    async with judge() as served:
        found = await served.refused(body)
        assert found[0] == status, found
        assert why in found[1]


async def test_null_is_nothing_and_the_unknown_is_ignored() -> None:
    asked = sh("echo $A", env=[PATH, "", "A=b=c", "nothing"], copyIn=None, copyOut=None, new=1)
    async with judge() as served:
        (found,) = await served.run(asked, pipeMapping=None, requestId="x")
        assert found["files"]["stdout"] == "b=c\n"


async def test_version_and_config_are_what_callers_look_for() -> None:
    async with judge(callers=Callers(uids=frozenset())) as served:
        _, _, body = await served.ask("GET", "/version")
        version = json.loads(body)
        number = version["buildVersion"].split("v")[1].split("-")[0]
        assert tuple(map(int, number.split("."))) >= (1, 8, 6)
        assert version["os"] == "linux"
        _, _, body = await served.ask("GET", "/config")
        config = json.loads(body)
        assert config["fixSymlinkEscape"] is True
        assert config["copyOutOptional"] is True
        subtree = served.daemon.book.runner.host.cgroup
        assert config["runnerConfig"]["cgroupType"] == (2 if subtree else 0)
        found = set(config["runnerConfig"]["cgroupControllers"])
        assert found == (set(subtree.controllers) if subtree else set())
        assert (await served.refused({"cmd": [sh("true")]}))[0] == 403  # all else is for callers


async def test_they_wait_in_the_queue_with_all_others() -> None:
    async with judge(slots=1) as served:
        book = served.daemon.book
        job = await served.daemon.submit(argv=["sleep", "30"])
        while book.share.running < 1:
            await trio.testing.wait_all_tasks_blocked()
        found = list[str]()

        async def ask() -> None:
            (one,) = await served.run(sh("true"))
            found.append(one["status"])

        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask)
            while not book.share.queued:
                await trio.testing.wait_all_tasks_blocked()
            assert [one.state for one in book.guests.values()] == ["queued"]
            await served.daemon.ask("DELETE", f"/v1/jobs/{job}")
        assert found == ["Accepted"]
        assert not book.guests
        assert book.share.running == book.share.queued == 0


async def test_who_goes_away_takes_his_programs_with_him() -> None:
    async with judge() as served:
        book = served.daemon.book
        with trio.move_on_after(60) as scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(served.run, sh("sleep 60"), sh("sleep 60"))
                while not any(one.runs for one in book.guests.values()):
                    await trio.testing.wait_all_tasks_blocked()
                scope.cancel()
        while book.guests:
            await trio.testing.wait_all_tasks_blocked()
        assert book.share.running == 0


async def test_nothing_stays_of_a_run_but_what_is_cached() -> None:
    async with judge() as served:
        await served.run(sh("echo > a; echo > b", copyOut=["a"], copyOutCached=["b"]))
        left = list((served.daemon.place / "state/go-judge").iterdir())
        assert len(left) == 1
        assert left[0].is_file()


async def test_what_a_caller_may_store_is_bounded() -> None:
    async with judge(stored=1000) as served:
        asked = sh("head -c 600 /dev/zero > f", copyOutCached=["f"])
        (first,) = await served.run(asked)
        (second,) = await served.run(asked)
        assert first["status"] == "Accepted"
        assert second["status"] == "File Error"
        assert "1000 bytes" in second["error"]
        await _remove(served, first["fileIds"]["f"])
        (third,) = await served.run(asked)
        assert third["status"] == "Accepted"


async def _remove(served: Judge, key: str) -> None:
    assert (await served.ask("DELETE", f"/file/{key}"))[0] == 200
