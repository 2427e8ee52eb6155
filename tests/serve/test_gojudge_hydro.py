"""HydroOJ's judge against our listener: its requests and what it makes of the answers.

Its client is not here: what it sends and reads was taken from its source (hydro-dev/Hydro, commit
409af927, packages/hydrojudge/src: sandbox.ts, sandbox/client.ts, judge/*.ts). Each constant and
each check below is one of those files'.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.serve.gojudging import Judge, judge

pytestmark = pytest.mark.needs("userns", "gcc", "g++")

ENVIRONMENT = [
    "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "HOME=/w",
    "PYTHONPATH=/lib/python3.13/site-packages",
    "",  # the last line of its setting
]
STDIO = 32 << 20
AGENT = {"User-Agent": "HydroJudge/4.0.0 (abc123)", "Content-Type": "application/json"}
STATUS = {
    "Time Limit Exceeded": "TLE", "Memory Limit Exceeded": "MLE", "Output Limit Exceeded": "RE",
    "Accepted": "AC", "Nonzero Exit Status": "RE", "Internal Error": "SE", "File Error": "SE",
    "Signalled": "RE",
}  # fmt: skip


def proc(execute: str, **given: Any) -> dict[str, Any]:
    """The command that it makes of its parameters."""
    cached = given.get("cache_stdio", False)
    size = STDIO if cached else 4 << 20
    copy_out_cached = [*given.get("copy_out_cached", [])]
    if cached:
        copy_out_cached += ["stdout", "stderr"]
    cpu = given.get("time", 16000) * 1_000_000
    memory = given.get("memory", 512) << 20
    return {
        "args": execute.split(),
        "env": [*ENVIRONMENT, *given.get("env", [])],
        "files": [
            given.get("stdin", {"content": ""}),
            {"name": "stdout", "max": size},
            {"name": "stderr", "max": size},
        ],
        "cpuLimit": cpu,
        "clockLimit": 3 * cpu,
        "memoryLimit": memory,
        "strictMemoryLimit": False,
        "stackLimit": 0,
        "procLimit": 32,
        "copyOutMax": STDIO * 3,
        "copyIn": given.get("copy_in", {}),
        "copyOut": given.get("copy_out", []),
        "copyOutCached": copy_out_cached,
    }


async def run(served: Judge, *cmds: dict[str, Any], pipes: Any = ()) -> list[dict[str, Any]]:
    mapping = [{"proxy": True, "max": STDIO, **pipe} for pipe in pipes]
    for index, cmd in enumerate(cmds):
        for pipe in pipes:
            if pipe["out"] == {"index": index, "fd": 0}:
                cmd["files"][0] = None
            if pipe["in"] == {"index": index, "fd": 1}:
                cmd["files"][1] = None
    status, _, body = await served.ask("POST", "/run", {"cmd": cmds, "pipeMapping": mapping}, AGENT)
    assert status == 200, body
    return [adapted(one) for one in json.loads(body)]


def adapted(result: dict[str, Any]) -> dict[str, Any]:
    """What it makes of a result: milliseconds, kilobytes, and an unknown status is taken for AC."""
    files = result.get("files") or {}
    return {
        "status": STATUS.get(result["status"], "AC"),
        "time": result["time"] / 1_000_000,
        "memory": result["memory"] / 1024,
        "code": result["exitStatus"],
        "stdout": files.get("stdout") or "",
        "stderr": files.get("stderr") or result.get("error") or "",
        "fileIds": result.get("fileIds") or {},
        "files": files,
    }


async def compiled(served: Judge, source: str) -> dict[str, Any]:
    """compile.ts: the program is cached, and copied into every run."""
    (found,) = await run(
        served,
        proc(
            "/usr/bin/g++ -x c++ -std=c++17 -O1 -o foo foo.cc",
            copy_in={"foo.cc": {"content": source}},
            copy_out_cached=["foo"],
        ),
    )
    assert found["status"] == "AC", found
    return {"foo": {"fileId": found["fileIds"]["foo"]}}


SUM = """
#include <cstdio>
int main() { int a, b; scanf("%d%d", &a, &b); printf("%d\\n", a + b); }
"""


async def test_the_check_of_its_versions() -> None:
    async with judge() as served:
        _, _, body = await served.ask("GET", "/version", headers=AGENT)
        version = json.loads(body)
        assert version["copyOutOptional"] is True
        assert version["buildVersion"].split("v")[1]
        _, _, body = await served.ask("GET", "/config", headers=AGENT)
        config = json.loads(body)
        assert config["fixSymlinkEscape"] is True
        assert config["runnerConfig"]["cgroupType"] in (0, 2)
        assert isinstance(config["runnerConfig"]["cgroupControllers"], list)


async def test_a_submission_is_compiled_run_and_compared(tmp_path: Path) -> None:
    (tmp_path / "1.in").write_text("40 2\n")
    async with judge(local=[tmp_path]) as served:
        program = await compiled(served, SUM)
        (ran,) = await run(
            served,
            proc(
                "/w/foo",
                stdin={"src": f"{tmp_path}/1.in"},
                copy_in=program,
                time=1000,
                memory=256,
                cache_stdio=True,
            ),
        )
        assert (ran["status"], ran["code"]) == ("AC", 0), ran
        assert ran["time"] < 1000
        # The checker gets what was printed by its id.
        (checked,) = await run(
            served,
            proc(
                "/usr/bin/diff user_out answer",
                copy_in={
                    "user_out": {"fileId": ran["fileIds"]["stdout"]},
                    "answer": {"content": "42\n"},
                },
            ),
        )
        assert checked["status"] == "AC", checked
        for key in ran["fileIds"].values():
            assert (await served.ask("DELETE", f"/file/{key}", headers=AGENT))[0] == 200


WRONG = {
    "a crash": ("int main() { *(volatile int *)0 = 1; }", "RE", 11),
    "an exit": ("int main() { return 7; }", "RE", 7),
    "for ever": ("int main() { for (volatile int i = 0;; ) i = i + 1; }", "TLE", 9),
}


@pytest.mark.parametrize("what", WRONG)
async def test_what_becomes_of_a_bad_submission(what: str) -> None:
    source, status, code = WRONG[what]
    async with judge() as served:
        program = await compiled(served, source)
        (ran,) = await run(served, proc("/w/foo", copy_in=program, time=300, memory=64))
        assert (ran["status"], ran["code"]) == (status, code), ran


async def test_a_compile_error_is_told_on_stderr() -> None:
    asked = proc(
        "/usr/bin/g++ -x c++ -o foo foo.cc",
        copy_in={"foo.cc": {"content": "int main() {"}},
        copy_out_cached=["foo"],
    )
    async with judge() as served:
        (found,) = await run(served, asked)
        assert found["status"] == "RE"
        assert "foo.cc:1:" in found["stderr"]
        assert found["fileIds"] == {}


PLAYER = """
#include <cstdio>
int main() { int n; scanf("%d", &n); printf("%d\\n", 2 * n); fflush(stdout); return 0; }
"""
INTERACTOR = """
#include <cstdio>
#include <cstring>
int main(int, char **argv) {
    int n, answer;
    FILE *in = fopen(argv[1], "r"), *tout = fopen(argv[2], "w"), *out = fopen(argv[3], "r");
    if (!in || !tout || !out || fscanf(in, "%d", &n) != 1) return 3;
    printf("%d\\n", n);
    fflush(stdout);
    if (scanf("%d", &answer) != 1) return 2;
    fprintf(tout, "%d\\n", answer);
    fprintf(stderr, answer == 2 * n ? "ok\\n" : "wrong answer\\n");
    return answer == 2 * n ? 0 : 1;
}
"""


async def test_an_interactive_problem(tmp_path: Path) -> None:
    (tmp_path / "in").write_text("21\n")
    async with judge(local=[tmp_path]) as served:
        player, interactor = await compiled(served, PLAYER), await compiled(served, INTERACTOR)
        user, told = await run(
            served,
            proc("/w/foo", copy_in=player, time=1000, memory=64),
            proc(
                "/w/foo /w/in /w/tout /w/out",
                copy_in={"in": {"src": f"{tmp_path}/in"}, "out": {"content": ""}, **interactor},
                time=2000,
                memory=128,
                copy_out=["/w/tout?"],
                copy_out_cached=["nextpass.in?", "state.txt?"],
                env=["HYDRO_TESTCASE=1"],
            ),
            pipes=[
                {"in": {"index": 0, "fd": 1}, "out": {"index": 1, "fd": 0}, "name": "toInteractor"},
                {"in": {"index": 1, "fd": 1}, "out": {"index": 0, "fd": 0}, "name": "toUser"},
            ],
        )
        assert (user["status"], told["status"], told["stderr"]) == ("AC", "AC", "ok\n"), told
        assert told["files"]["/w/tout"] == "42\n"
        assert (user["files"]["toInteractor"], told["files"]["toUser"]) == ("42\n", "21\n")
        assert told["fileIds"] == {}
