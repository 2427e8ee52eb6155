"""The benchmark measures everything it says, and leaves nothing; no time is asserted anywhere."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from tests.bench import command, files, report, serve
from tests.bench.measures import FLIGHTS, LIVE, MEASURES, Row

PROGRAMS = ("static program", "/bin/true")
TIMES = [f"{what}, {program}" for program in PROGRAMS for what in ("first byte", "result")]
CPU = [f"supervisor CPU per job, {what}" for what in PROGRAMS]
RATES = [
    f"{what}, {flight} in flight"
    for flight in FLIGHTS
    for what in ("rate", "supervisor CPU per job")
]
MEMORY = [
    f"memory per live job, {what} ({LIVE} live)" for what in ("its processes", "MemAvailable")
]
START = "new runner: tenant, first result, end"
FILES = {
    f"{files.count(1)} files in": {*files.WAYS, files.PEER},
    f"{files.count(1)} files in and out": {files.OUT},
}
OVERSHOOT = "CPU time beyond a limit of 1 s, four busy processes"


@pytest.mark.needs("gcc")
def test_every_row_is_there() -> None:
    only = [word for name in MEASURES for word in ("--only", name)]
    done = subprocess.run(
        [sys.executable, "-P", "-m", "tests.bench", "--rounds", "2", "--json", *only],
        capture_output=True, text=True, check=False, timeout=110,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    who: dict[str, set[str]] = {}
    for row in found["rows"]:
        assert row["count"] > 0
        assert row["min"] <= row["p50"] <= row["p95"] <= row["max"]
        assert row["unit"] in ("ms", "us", "jobs/s", "KB")
        who.setdefault(row["measure"], set()).add(row["who"])
    assert set(who) == {*TIMES, *CPU, *RATES, *MEMORY, *FILES, START, OVERSHOOT}
    for measure in (*TIMES, *CPU, *RATES):
        assert who[measure] >= everybody(found), measure
    for measure in MEMORY:
        assert who[measure] >= {name for name in everybody(found) if "spare" not in name}, measure
    assert who[START] == {"sandboxd"}
    assert {measure: who[measure] for measure in FILES} == FILES
    assert who[OVERSHOOT] == {"sandboxd", "sandboxd, no cgroup"}
    assert report.text(found).count("\n") > len(found["rows"])


@pytest.mark.needs("gcc")
def test_the_daemon_is_measured_beside_a_runner() -> None:
    words = ["serve", "--jobs", "80", "--callers", "4", "--rounds", "2"]
    command = [sys.executable, "-P", "-m", "tests.bench", *words]
    done = subprocess.run(
        [*command, "--json"], capture_output=True, text=True, check=False, timeout=100
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["jobs"], found["callers"], found["missing"]) == (80, 4, "")
    for name in ("runner", "daemon", "runner cpu", "daemon cpu", "p50", "p99"):
        assert len(found[name]) == 2
        assert min(found[name]) >= 0.0
    assert found["before"] > 0
    assert found["after"] > 0
    assert "ratio" in serve.text(found)


@pytest.mark.needs("gcc", "overlay", "userns")
@pytest.mark.parametrize("name", ["roots", "import"])
def test_rows_of_images(name: str) -> None:
    done = subprocess.run(
        [sys.executable, "-P", "-m", "tests.bench", "--rounds", "2", "--json", "--only", name],
        capture_output=True, text=True, check=False, timeout=110,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    who = {row["who"] for row in found["rows"]}
    if name == "roots":
        assert who >= {"host root", "image root", "image root, writable"}
    else:
        assert "sandboxd image import" in who
        assert ("umoci unpack" in who) == ("umoci" not in found["missing"])


@pytest.mark.needs("gcc", "userns")
def test_a_command_is_measured_beside_commands() -> None:
    done = subprocess.run(
        [sys.executable, "-P", "-m", "tests.bench", "--rounds", "2", "--json", "--only", "command"],
        capture_output=True, text=True, check=False, timeout=110,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    who: dict[str, set[str]] = {}
    for row in found["rows"]:
        assert row["min"] >= 0
        who.setdefault(row["measure"], set()).add(row["who"])
    assert set(who) == {"one command", "CPU time of one command"}
    peers = {"bwrap"} - found["missing"].keys()
    for names in who.values():
        assert names >= {"sandboxd run", "none (trio)", *command.PARTS, *peers}


def everybody(found: dict[str, Any]) -> set[str]:
    """Who has to be in a measure here: a peer that is missing has been named."""
    names = {"sandboxd", "sandboxd spare", "none (trio)", "none (Popen)"}
    if "cgroup" not in found["missing"]:
        names |= {"sandboxd, no cgroup", "sandboxd spare, no cgroup"}
    if "bwrap" not in found["missing"]:
        names.add("bwrap")
    return names


@pytest.mark.needs("subuid", "tun", "ip", "slirp4netns", "nft")
def test_the_cost_of_a_way_out() -> None:
    words = ["network", "--rounds", "2", "--streams", "1", "--size", "3000000", "--json"]
    done = subprocess.run(
        [sys.executable, "-P", "-m", "tests.bench", *words],
        capture_output=True, text=True, check=False, timeout=110,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert {"none", "slirp4netns"} <= set(found["first byte"])
    assert {len(samples) for samples in found["first byte"].values()} == {2}
    assert {"slirp4netns", "bare slirp4netns"} <= set(found["stream"])
    assert all(sample > 0 for samples in found["stream"].values() for sample in samples)


def test_only_what_is_asked_for() -> None:
    done = subprocess.run(
        [sys.executable, "-P", "-m", "tests.bench", "--rounds", "2", "--only", "start"],
        capture_output=True, text=True, check=False, timeout=110,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert START in done.stdout
    assert "rate" not in done.stdout


def test_a_ratio_above_one_is_better() -> None:
    rows = [
        Row("result", "sandboxd", "ms", [1.0, 1.0, 9.0]),
        Row("result", "bwrap", "ms", [4.0]),
        Row("rate", "sandboxd", "jobs/s", [2000.0], better="more"),
        Row("rate", "bwrap", "jobs/s", [500.0], better="more"),
    ]
    found = report.facts(rows, {}, {})
    ratios = [row["times_better"] for row in json.loads(json.dumps(found["rows"]))]
    assert ratios == [{"bwrap": 4.0}, {}, {"bwrap": 4.0}, {}]


def test_a_ratio_below_one_is_not_nought() -> None:
    assert [report.times(ratio) for ratio in (12.34, 1.0, 0.0231)] == ["12.3", "1.0", "0.023"]


def test_quantiles() -> None:
    row = Row("result", "x", "ms", [float(n) for n in range(100, 0, -1)])
    assert [row.at(share) for share in (0, 0.5, 0.95, 1)] == [1.0, 51.0, 96.0, 100.0]
