"""The flags of `run` and `plan`: what they mean for policy and job, and what they refuse."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import pytest

from sandboxd.cli import flags, mounts
from sandboxd.errors import JobError, SandboxError
from sandboxd.job import Job, Terminal
from sandboxd.policy import Environment, Identity, Limits, Mount, Network, Policy, Root

BASE = Policy(
    name="small",
    limits=Limits(memory=64 << 20, cpu_time=1.0, processes=8),
    mounts=(Mount(target="/data", source="/usr", optional=True),),
    origins={"limits.memory": "small.toml: limits.memory"},
)


def parsed(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="sandboxd run", allow_abbrev=False)
    flags.add(parser)
    return parser.parse_args(words)


def policy_of(*words: str, base: Policy = BASE) -> Policy:
    return flags.policy(parsed(*words, "true"), base)


def job_of(*words: str) -> Job:
    args = parsed(*words)
    return flags.job(args, flags.policy(args, BASE))


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """What is said about flags that are wrong by themselves."""
    with pytest.raises(SystemExit) as caught:
        parsed(*words, "true")
    assert caught.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


# -- where the program begins ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "argv"),
    [
        (["true"], [b"true"]),
        (["--", "true"], [b"true"]),
        (["--", "--", "x"], [b"--", b"x"]),
        (["true", "--", "x"], [b"true", b"--", b"x"]),
        (["-m", "1G", "true", "-m", "x"], [b"true", b"-m", b"x"]),
        (["-m1G", "true", "--memory=2"], [b"true", b"--memory=2"]),
        (["--rm", "--init", "-it", "sh", "-c", "a b"], [b"sh", b"-c", b"a b"]),
        (["-it", "--", "-x"], [b"-x"]),
        (["--entrypoint", "python3", "-p", "x", "a.py"], [b"python3", b"a.py"]),
        (["--entrypoint", "python3"], [b"python3"]),
        (["printf", "\udce9\udcff"], [b"printf", b"\xe9\xff"]),
        (["echo", ""], [b"echo", b""]),
    ],
)
def test_the_first_word_that_is_no_flag_is_the_program(words: list[str], argv: list[bytes]) -> None:
    assert job_of(*words).argv == argv


def test_no_program() -> None:
    with pytest.raises(JobError, match="no program to run"):
        job_of("-m", "1G")
    with pytest.raises(JobError, match="no program to run"):
        job_of("--")


def test_nul_in_an_argument() -> None:
    with pytest.raises(JobError, match=r"argv\[1\] contains a NUL byte"):
        job_of("echo", "a\0b")


def test_flags_have_no_abbreviations(capsys: pytest.CaptureFixture[str]) -> None:
    assert "--mem" in refused(capsys, "--mem", "1G")


# -- limits ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "field", "value"),
    [
        (["-m", "256M"], "memory", 256 << 20),
        (["--memory", "1GiB"], "memory", 1 << 30),
        (["--memory=4096"], "memory", 4096),
        (["--memory", "unlimited"], "memory", None),
        (["--cpus", "1.5"], "cpus", 1.5),
        (["--cpus", ".5"], "cpus", 0.5),
        (["--pids-limit", "3"], "processes", 3),
        (["--pids-limit", "-1"], "processes", None),
        (["--cpu-time", "1.5s"], "cpu_time", 1.5),
        (["--wall-time", "500ms"], "wall_time", 0.5),
        (["--idle-time", "2"], "idle_time", 2.0),
        (["--output", "64K"], "output", 65536),
        (["--disk", "1M"], "disk", 1 << 20),
        (["--inodes", "10"], "inodes", 10),
        (["--open-files", "20"], "open_files", 20),
        (["--file-size", "1M"], "file_size", 1 << 20),
        (["--stack", "8M"], "stack", 8 << 20),
        (["--ulimit", "nofile=20:20"], "open_files", 20),
        (["--ulimit", "as=1G"], "address_space", 1 << 30),
        (["--ulimit", "cpu=3"], "cpu_time", 3.0),
        (["--ulimit", "stack=unlimited"], "stack", None),
        (["--ulimit", "nproc=7", "--pids-limit", "9"], "processes", 9),
    ],
)
def test_limits(words: list[str], field: str, value: Any) -> None:
    """They go in both directions: whoever types is the operator."""
    found = policy_of(*words)
    assert getattr(found.limits, field) == value
    assert found.name == "small+flags"
    assert found.origin(f"limits.{field}").startswith("command line: --")
    others = [name for name in Limits.__struct_fields__ if name != field]
    assert all(getattr(found.limits, name) == getattr(BASE.limits, name) for name in others)


def test_without_flags_it_is_the_policy_itself() -> None:
    assert policy_of() is BASE


def test_what_flags_did_not_set_keeps_its_origin() -> None:
    assert policy_of("--cpus", "1").origin("limits.memory") == "small.toml: limits.memory"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["-m", "lots"], "argument -m/--memory: 'lots' is not a size: write 256M"),
        (["-m", "-5"], "argument -m/--memory"),
        (["-m", "0"], "argument -m/--memory: '0' is less than one byte"),
        (["--cpu-time", "1 week"], "argument --cpu-time: '1 week' is not a time: write 1.5s"),
        (["--wall-time", "0"], "argument --wall-time: '0' is no time at all"),
        (["--wall-time", "nan"], "argument --wall-time: 'nan' is not a time"),
        (["--cpus", "inf"], "argument --cpus: 'inf' is not a number of CPUs such as 1.5"),
        (["--cpus", "nan"], "argument --cpus: 'nan' is not a number of CPUs such as 1.5"),
        (["--pids-limit", "0"], "argument --pids-limit: '0' is not a number from 1 to"),
        (["--inodes", "²"], "argument --inodes: '²' is not a number from 1 to"),
        (["--ulimit", "core=0"], "is not NAME=N, NAME being as, cpu, fsize, nofile, nproc, stack"),
        (["--ulimit", "nofile=5:9"], "soft and hard differ, and sandboxd has one value: write"),
        (["--network", "host"], "argument --network: 'host' is neither `none` nor `user`"),
        (["--network-connections", "1000001"], "'1000001' is not a number from 1 to 1000000"),
        (["--network-rate", "1000"], "argument --network-rate: '1000' is not from 1K to 8G"),
        (["--hostname", "-x"], "argument --hostname"),
        (["--hostname", "a b"], "letters, digits, dots and hyphens"),
        (["--name", "a/b"], "argument --name: 'a/b': letters, digits"),
        (["--read-only", "--writable-root"], "not allowed with argument"),
        (["-v", "/usr"], "argument -v/--volume: '/usr' is not SRC:DST[:ro]"),
        (["-v", "a:b:c:d"], "for a path with a colon there is --mount"),
        (["-v", "a:b"], "'b' is no place in the sandbox: it must be absolute"),
        (["-v", "a:/b/../c"], "it must be absolute and without .., e.g. /box/c"),
        (["-v", "a:/"], "nothing can be mounted on /"),
        (["--tmpfs", "/dev"], "nothing can be mounted on /dev"),
        (["-v", "a:/proc/sys"], "nothing can be mounted on /proc/sys"),
        (["-v", "a:/b:shared"], "no such option of a mount: shared (there are:"),
        (["-v", "./\udcff:/b"], "is not UTF-8: name it through a link"),
        (["-v", "a+b:/b"], "'a+b' is no name of a volume: for the directory write ./a+b"),
        (["-v", "a:/b:size=1M"], "a volume mount has no size"),
        (["--mount", "type=image,target=/x"], "type=image: there are type=bind, type=tmpfs"),
        (["--mount", "type=volume,target=/x"], "is not type=bind|volume,source=SRC,target=DST"),
        (["--mount", "type=bind,target=/x"], "is not type=bind|volume,source=SRC,target=DST"),
        (["--mount", "type=bind,src=/a,dst=/x,lock=copy"], "a bind mount has no lock"),
        (["--mount", "type=cache,src=a,dst=/x,lock=all"], "lock is one of exclusive, shared-ro"),
        (["--mount", "type=cache,src=a,dst=/x,ro"], "a cache mount has no writable"),
        (["--mount", "type=bind,src=/a,dst=/x,size=1M"], "a bind mount has no size"),
        (["--mount", "type=tmpfs,dst=/x,ro"], "a read-only tmpfs would be empty for ever"),
        (["--tmpfs", "/x:size=much"], "'much' is not a size"),
        (["--tmpfs", "x"], "'x' is no place in the sandbox"),
        (["--file", "a:/etc/b"], "argument --file: 'a:/etc/b' is not SRC[:NAME]"),
        (["--file", "a:../b"], "NAME is relative to /box and without .."),
        (["--file", "/"], "is not SRC[:NAME]"),
    ],
)
def test_what_is_wrong_by_itself(
    capsys: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    assert said in refused(capsys, *words)


# -- mounts and root -------------------------------------------------------------------------


def test_volumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "src").mkdir()
    found = policy_of(
        "-v",
        "./src:/src:ro",
        "-v",
        f"{tmp_path}:/out//deep/:noexec",
        "-v",
        "src/:/w",
        "-v",
        "x:/v:ro",
    )
    assert found.mounts[1:] == (
        Mount(target="/src", source=f"{tmp_path}/src", writable=False),
        Mount(target="/out/deep", source=str(tmp_path), writable=True, exec=False),
        Mount(target="/w", source=f"{tmp_path}/src", writable=True),
        Mount(target="/v", type="volume", name="x"),
    )
    assert found.origin("mounts[1].source") == "command line: the mount on /src"


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("type=bind,source=/usr,target=/u,readonly", Mount(target="/u", source="/usr")),
        ("source=/usr,dst=/u,readonly=false", Mount(target="/u", source="/usr", writable=True)),
        ('"src=/a,b:c",dst=/u,ro', Mount(target="/u", source="/a,b:c")),
        (
            "type=tmpfs,destination=/t,tmpfs-size=1M,inodes=9,noexec",
            Mount(target="/t", type="tmpfs", size=1 << 20, inodes=9, exec=False, writable=True),
        ),
        ("type=volume,src=v,dst=/u", Mount(target="/u", type="volume", name="v", writable=True)),
        (
            "type=cache,src=c,dst=/u,lock=copy,wait=2s,size=1M",
            Mount(target="/u", type="cache", name="c", lock="copy", wait=2.0, size=1 << 20),
        ),
    ],
)
def test_mount(text: str, wanted: Mount) -> None:
    assert mounts.mount(text) == wanted


def test_tmpfs_takes_what_docker_writes() -> None:
    found = mounts.tmpfs("/run:rw,noexec,nosuid,size=65536k")
    assert found == Mount(target="/run", type="tmpfs", size=64 << 20, exec=False, writable=True)


def test_the_last_mount_on_a_target_counts() -> None:
    found = policy_of("--tmpfs", "/data", "-v", "/usr:/x:ro", "-v", "/etc:/x:ro")
    assert [(one.target, one.type, one.source) for one in found.mounts] == [
        ("/data", "tmpfs", None),
        ("/x", "bind", "/etc"),
    ]


def test_a_source_must_be_there() -> None:
    with pytest.raises(JobError, match="cannot show /nowhere on /x: no such file") as caught:
        policy_of("-v", "/nowhere:/x:ro")
    assert "makes no directory for it as docker does" in caught.value.hint
    assert policy_of("-v", "/nowhere:/x:ro,optional").mounts[-1].optional


@pytest.mark.parametrize(
    ("words", "user"),
    [
        (["-v", "/usr:/x:ro"], "isolated"),
        (["-v", "/usr:/x"], "caller"),
        (["-v", "/usr:/x", "-u", "isolated"], "isolated"),
        (["-v", "x:/x:ro"], "isolated"),
        (["-v", "x:/x"], "caller"),
        (["--mount", "type=cache,src=c,dst=/x,lock=shared-ro"], "isolated"),
        (["--mount", "type=cache,src=c,dst=/x,lock=copy"], "caller"),
        (["-u", "caller"], "caller"),
        (["--tmpfs", "/x"], "isolated"),
    ],
)
def test_who_writes_to_a_volume(words: list[str], user: str) -> None:
    assert policy_of(*words).identity.user == user


def test_roots(tmp_path: Path) -> None:
    assert policy_of("--root", str(tmp_path)).root.source == str(tmp_path)
    assert policy_of("--writable-root").root.writable
    assert policy_of("--upper", "directory").root.upper == "directory"
    wide = Policy(root=Root(writable=True))
    assert not policy_of("--read-only", base=wide).root.writable
    assert policy_of("--root", "host", base=wide).root == wide.root
    with pytest.raises(JobError, match="--root /nowhere: no such directory"):
        policy_of("--root", "/nowhere")


# -- who -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("5", (5, 5)),
        ("5:7", (5, 7)),
        ("0", (0, 0)),
        ("root", (0, 0)),
        ("nobody", (65534, 65534)),
        ("sandbox", (1000, 1000)),
    ],
)
def test_user(text: str, ids: tuple[int, int]) -> None:
    base = Policy(identity=Identity(uid=1000, gid=1000))
    found = policy_of("-u", text, base=base).identity
    assert (found.uid, found.gid) == ids
    assert found.user == "isolated"


def test_user_of_a_root_directory(tmp_path: Path) -> None:
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc/passwd").write_bytes(b"app:x:33:44::/:\nhuge:x:99999:1::/:\nbroken\n\xff\n")
    found = policy_of("-u", "app", "--root", str(tmp_path)).identity
    assert (found.uid, found.gid) == (33, 44)
    with pytest.raises(JobError, match="no such user in the sandbox"):
        policy_of("-u", "huge", "--root", str(tmp_path))


@pytest.mark.parametrize(
    "text", ["", "joe", "1:", ":1", "joe:1", "-1", "1:joe", "70000", "1:70000"]
)
def test_user_that_is_not_there(text: str) -> None:
    with pytest.raises(JobError, match="--user"):
        policy_of(f"--user={text}")


# -- the job ---------------------------------------------------------------------------------


def test_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HERE", "yes")
    monkeypatch.delenv("ABSENT", raising=False)
    listed = tmp_path / "env"
    listed.write_bytes(b"# no\n\n  A=1\nB=two words\nC=\xff\nHERE\nABSENT\nD=x=y\n")
    env = job_of("--env-file", str(listed), "-e", "A=2", "-e", "E=", "-e", "ABSENT", "x").env
    assert env == {
        b"A": b"2", b"B": b"two words", b"C": b"\xff", b"HERE": b"yes", b"D": b"x=y", b"E": b"",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"A=1\n=2\n", ":2: no variable"),
        (b"A=\0\n", ":1: no variable"),
        (b"=\n", ":1: no"),
        (b"export A=1\n", ":1: no variable"),
    ],
)
def test_environment_file_that_is_wrong(tmp_path: Path, content: bytes, said: str) -> None:
    listed = tmp_path / "env"
    listed.write_bytes(content)
    with pytest.raises(JobError, match=f"--env-file {listed}{said}"):
        job_of("--env-file", str(listed), "x")


def test_environment_that_is_wrong() -> None:
    with pytest.raises(JobError, match="-e =x: no variable can be called that"):
        job_of("-e", "=x", "true")
    with pytest.raises(JobError, match="--env-file /nowhere: No such file"):
        job_of("--env-file", "/nowhere", "true")


def test_large_environment(tmp_path: Path) -> None:
    listed = tmp_path / "env"
    listed.write_bytes(b"".join(b"V%d=%s\n" % (n, b"x" * 1000) for n in range(2000)))
    assert len(job_of("--env-file", str(listed), "true").env) == 2000


@pytest.mark.parametrize(
    ("words", "cwd"),
    [
        ([], None),
        (["-w", "/tmp"], b"/tmp"),
        (["-w", "a"], b"/box/a"),
        (["-w", "\udcff"], b"/box/\xff"),
    ],
)
def test_working_directory(words: list[str], cwd: bytes | None) -> None:
    assert job_of(*words, "true").cwd == cwd


def test_stdin(tmp_path: Path) -> None:
    assert job_of("true").stdin == b""
    assert job_of("-i", "true").stdin is None
    assert job_of("--stdin", "x", "true").stdin == Path("x")
    with pytest.raises(JobError, match="--stdin and --interactive exclude each other"):
        job_of("-i", "--stdin", "x", "true")


def test_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    found = job_of("-t", "true")
    assert isinstance(found.terminal, Terminal)
    assert found.env == {b"TERM": b"dumb"}
    assert job_of("-t", "-e", "TERM=vt100", "true").env == {b"TERM": b"vt100"}
    assert job_of("true").terminal is None


def test_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.c").touch()
    (tmp_path / "dir").mkdir()
    found = job_of("--file", "a.c", "--file", "a.c:x/b.c", "--file", "dir/", "--file", ".", "cc")
    assert found.files == {
        "a.c": Path("a.c"), "x/b.c": Path("a.c"), "dir": Path("dir"), ".": Path(),
    }  # fmt: skip
    os.mkfifo("pipe")
    with pytest.raises(JobError, match="--file pipe: neither a file nor a directory"):
        job_of("--file", "pipe", "cc")
    with pytest.raises(JobError, match="--file nowhere: No such file"):
        job_of("--file", "nowhere", "cc")


def test_who_may_be_reached() -> None:
    base = Policy(network=Network(mode="user", allow=("a.example:443",)))
    words = ("--allow", "*.b.example:80", "--allow", "10.1.0.0/16:22", "--publish", "8080:80")
    found = policy_of(*words, base=base)
    assert found.network.allow == ("a.example:443", "*.b.example:80", "10.1.0.0/16:22")
    assert found.network.publish == ("8080:80",)
    assert found.origin("network.allow") == "command line: --allow"
    alone = policy_of("--allow", "a.example:443")
    assert (alone.network.mode, alone.network.allow) == ("user", ("a.example:443",))
    assert policy_of("--network", "user").network == Network(mode="user")
    assert policy_of("--network", "none", base=base).network.mode == "none"
    assert policy_of("--network", "user", base=base) is base


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--allow", "a.example"), "network.allow[0]: 'a.example' says no port"),
        (("--publish", "80"), "network.publish[0]: '80' is not [ADDRESS:]PORT:PORT_INSIDE"),
        (("--network", "none", "--allow", "*"), "--network none lets nobody be reached"),
        (("--network-bytes", "1M"), "--network-bytes without a way out"),
        (("--network", "none", "--network-rate", "1M"), "--network-rate without a way out"),
    ],
)
def test_who_cannot_be_meant(words: tuple[str, ...], said: str) -> None:
    with pytest.raises(SandboxError) as caught:
        policy_of(*words)
    assert said in str(caught.value)


def test_how_much_may_go_out() -> None:
    base = Policy(network=Network(mode="user", connections=5, bytes=100))
    words = ("--network-connections", "9", "--network-bytes", "unlimited", "--network-rate", "1M")
    found = policy_of(*words, base=base)
    assert found.network == Network(mode="user", connections=9, bytes=None, rate=1 << 20)
    assert found.origin("network.rate") == "command line: --network-rate"
    alone = policy_of("--allow", "*:443", "--network-bytes", "1M")
    assert alone.network == Network(mode="user", allow=("*:443",), bytes=1 << 20)


def test_the_rest_of_a_policy_stays() -> None:
    base = Policy(environment=Environment(set={"A": "b"}), description="x")
    found = policy_of("-m", "1M", "--hostname", "h", base=base)
    assert (found.environment, found.description) == (base.environment, "x")
    assert found.identity.hostname == "h"
    assert found.syscalls == base.syscalls
