"""`sandboxd group`: what is shown, the exit status, and that nothing outlives it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import trio

from tests.serve.serving import Process, folder, process

COMMAND = (sys.executable, "-P", "-m", "sandboxd", "group")
SHOP = """
[group]
name = "shop"
main = "test"

[members.db]
argv = ["/usr/bin/python3", "-I", "db.py"]
files = ["db.py"]
ready = "tcp:5432"

[members.test]
argv = ["sh", "-c", "{test}"]
after = ["db"]
"""
SERVER = """
import socket, sys
server = socket.create_server(("0.0.0.0", 5432))
print("no end", end="", file=sys.stderr, flush=True)
while True:
    one, peer = server.accept()
    print("served", peer[0], flush=True)
    one.sendall(b"hello\\n"); one.close()
"""
CLIENT = (
    "import socket; print(socket.create_connection(('db.shop', 5432)).recv(9).decode(), end='')"
)


@pytest.fixture
def shop(tmp_path: Path) -> Path:
    (tmp_path / "db.py").write_text(SERVER)
    (tmp_path / "test.py").write_text(CLIENT)
    return tmp_path


def written(place: Path, test: str, more: str = "") -> str:
    file = place / "shop.toml"
    file.write_text(SHOP.replace("{test}", test) + more)
    return str(file)


def group(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, *words], capture_output=True, text=True, timeout=60)


def client(place: Path, then: str = "true") -> str:
    return written(place, f"python3 -I test.py; {then}", 'files = ["test.py"]\n')


def test_lines_have_their_members_in_front(shop: Path) -> None:
    done = group("run", client(shop, "echo bad >&2; exit 3"))
    assert done.returncode == 3, done.stderr
    assert sorted(done.stdout.splitlines()) == ["db   | served 192.168.100.3", "test | hello"]
    lines = done.stderr.splitlines()
    assert "test | bad" in lines
    assert "db   | no end" in lines
    assert any(line.startswith("sandboxd: test  nonzero_exit 3, cpu ") for line in lines)
    stopped = "sandboxd: db    cancelled (stopped: its group was stopped when test ended)"
    assert any(line.startswith(stopped) for line in lines)


def test_quiet(shop: Path) -> None:
    done = group("run", "-q", client(shop))
    assert done.returncode == 0
    assert "sandboxd:" not in done.stderr


def test_json(shop: Path) -> None:
    done = group("run", "--json", client(shop))
    assert (done.returncode, done.stderr) == (0, "")
    found = json.loads(done.stdout)
    members = found.pop("members")
    assert found == {
        "schema": "sandboxd.group/1", "group": "shop", "decisive": "test", "ended_by": "test",
        "exit_code": 0,
    }  # fmt: skip
    assert [members[name]["status"] for name in ("db", "test")] == ["cancelled", "ok"]
    assert members["test"]["streams"]["stdout"]["data"] == "hello\n"


def test_json_stream(shop: Path) -> None:
    done = group("run", "--json=stream", client(shop))
    *events, last = map(json.loads, done.stdout.splitlines())
    assert last["schema"] == "sandboxd.group/1"
    assert [event["seq"] for event in events] == list(range(len(events)))
    said = {(event["member"], event["type"], event.get("data")) for event in events}
    assert ("test", "stdout", "hello\n") in said
    assert {one[:2] for one in said} >= {("db", "start"), ("db", "exit"), ("test", "exit")}


def test_check(shop: Path) -> None:
    done = group("check", client(shop))
    assert done.returncode == 0
    assert done.stdout == "192.168.100.2\tdb\tdb.shop\n192.168.100.3\ttest\ttest.shop\n"


BAD = """\
[grup]
[group]
shar = "network"
stop = "x"
[members.db]
argv = "x"
limits = { memory = "1 G G" }
[members.web]
[members.ok]
argv = ["true"]
allow = ["nobody"]
publish = ["x"]
"""


def test_what_is_wrong_has_its_line(tmp_path: Path) -> None:
    file = tmp_path / "bad.toml"
    file.write_text(BAD)
    done = group("check", str(file))
    assert (done.returncode, done.stdout) == (1, "")
    for line in (
        f"{file}:1: grup: no such section", "did you mean group?",
        f"{file}:3: group.shar: [group] has no such key", "did you mean share?",
        f"{file}:4: group.stop: 'x' is not among the choices",
        f"{file}:6: members.db.argv: a string where a list belongs",
        f"{file}:7: members.db.limits.memory: ",
        f"{file}:8: members.web: argv is missing",
        f"{file}:11: members.ok.allow[0]: 'nobody' says no port",
        f"{file}:12: members.ok.publish[0]: 'x' is not [ADDRESS:]PORT:PORT_INSIDE",
    ):  # fmt: skip
        assert line in done.stderr, (line, done.stderr)
    assert group("run", str(file)).returncode == 125


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "no members"),
        ("[members]\nx = 1", "a number where a table belongs"),
        ("[members.A]\nargv = ['true']", "'A' is no name of a host"),
        ("[members.a]\nargv = []", "no program"),
        ("[members.a]\nargv = ['true']\nfiles = ['nothing-here']", "members.a.files[0]"),
        ("[members.a]\nargv = ['true']\npolicy = 'bse'", "did you mean base?"),
        ("[members.a]\nargv = ['true']\nafter = ['b']", "a: after: no member 'b'"),
        ("[group]\nmain = 'b'\n[members.a]\nargv = ['true']", "no member 'b'"),
        ("[group]\nsubnet = '1.2.3.0/24'\n[members.a]\nargv = ['true']", "not private"),
        ("[group", "not TOML"),
    ],
)
def test_what_cannot_be(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "bad.toml"
    file.write_text(text)
    done = group("check", str(file))
    assert done.returncode == 1, done.stderr
    assert said in done.stderr


def test_a_file_that_is_not_there() -> None:
    done = group("check", "/nowhere.toml")
    assert done.returncode == 1
    assert "/nowhere.toml: cannot be read: No such file or directory" in done.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_kills_all(shop: Path, number: signal.Signals) -> None:
    command = [*COMMAND, "run", written(shop, "echo up; exec sleep 60")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as running:
        assert running.stdout is not None
        assert running.stdout.readline() == b"test | up\n"
        running.send_signal(number)
        _, said = running.communicate(timeout=30)
    assert running.returncode == 128 + number
    assert b"test  cancelled" in said


def test_a_reader_who_goes(shop: Path) -> None:
    command = [*COMMAND, "run", written(shop, "while :; do echo more; done")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as running:
        assert running.stdout is not None
        assert running.stdout.readline() == b"test | more\n"
        running.stdout.close()
        assert running.wait(30) == 141


def test_what_a_member_may_reach_is_its_policy_and_more(tmp_path: Path) -> None:
    """allow and publish come on top of the policy's, and messages say where they are from."""
    from sandboxd.group import Group, Member
    from sandboxd.supervise.group_files import load_group

    (tmp_path / "mine.toml").write_text(
        'extends = "base"\n[network]\nmode = "user"\nallow = ["a.example.org:1"]\n'
    )
    file = tmp_path / "group.toml"
    file.write_text(
        '[members.a]\nargv = ["true"]\npolicy = "./mine.toml"\nallow = ["b.example.org:2"]\n'
        'publish = ["8080:80"]\nenv = { A = "1" }\ncwd = "/tmp"\nstdin = "group.toml"\n'
        'address = "10.8.0.9"\nlimits = { memory = "64M", wall_time = "2s" }\n'
        '[group]\nsubnet = "10.8.0.0/24"\n'
    )
    found = load_group(file)
    assert isinstance(found, Group)
    member: Member = found.every()["a"]
    policy: Any = member.job.policy
    assert policy.network.allow == ("a.example.org:1", "b.example.org:2")
    assert (policy.network.mode, policy.network.publish) == ("user", ("8080:80",))
    assert policy.origin("network.publish") == f"{file}: members.a.publish"
    assert (member.address, member.job.cwd, dict(member.job.env)) == (
        "10.8.0.9",
        "/tmp",
        {"A": "1"},
    )
    assert member.job.stdin == tmp_path / "group.toml"
    assert member.job.limits is not None
    assert (member.job.limits.memory, member.job.limits.wall_time) == (64 << 20, 2.0)


def test_every_key_is_in_the_reference() -> None:
    """docs/reference/group.md, and no other."""
    import re

    from sandboxd.compile.group_file import Entry, Settings

    page = (Path(__file__).parents[2] / "docs/reference/group.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE)
    assert rows == [*Settings.__struct_fields__, *Entry.__struct_fields__]


def test_it_starts_from_any_directory(shop: Path) -> None:
    """Files are looked for beside the group file."""
    file = client(shop)
    done = subprocess.run(
        [*COMMAND, "check", os.path.relpath(file, "/")], cwd="/", capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_the_files_of_the_guide() -> None:
    """docs/howto/groups.md: each block is a group file, or a part of one."""
    import re

    from sandboxd.compile.group_file import read

    page = (Path(__file__).parents[2] / "docs/howto/groups.md").read_text()
    blocks = re.findall(r"^```toml\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    assert len(blocks) == 3
    for block in blocks:
        assert read("groups.md", block).members


def test_a_daemon_runs_it(shop: Path) -> None:
    """The same output, object and exit status; a member's policy by its name."""
    file = client(shop)
    with folder() as place, process(place) as one:
        trio.run(_wait_for, one)
        where = f"unix://{place}/s"
        for words in ((), ("--json",)):
            there, here = group("run", *words, "-H", where, file), group("run", *words, file)
            assert (there.returncode, here.returncode) == (0, 0), there.stderr
            if not words:
                assert there.stdout == here.stdout
                continue
            found, own = json.loads(there.stdout), json.loads(here.stdout)
            assert {**found, "members": 0} == {**own, "members": 0}
            assert [one["status"] for one in found["members"].values()] == ["cancelled", "ok"]
            assert found["members"]["db"]["message"] == own["members"]["db"]["message"]
        refused = group("run", "--cgroup", "none", "-H", where, file)
        assert refused.returncode == 125
        assert "--cgroup: not by a daemon" in refused.stderr


def test_ctrl_c_ends_it_at_a_daemon(shop: Path) -> None:
    with folder() as place, process(place) as one:
        trio.run(_wait_for, one)
        environ = {**os.environ, "SANDBOXD_HOST": f"unix://{place}/s"}
        command = [*COMMAND, "run", written(shop, "echo up; sleep 1000")]
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environ
        ) as running:
            assert running.stdout is not None
            assert running.stdout.readline() == b"test | up\n"
            running.send_signal(signal.SIGINT)
            _, said = running.communicate(timeout=30)
            assert running.returncode == 130
        assert b"test  cancelled" in said


async def _wait_for(one: Process) -> None:
    await (await one.links()).close()
