"""`sandboxd policy` as a user sees it."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import pytest

from sandboxd.cli import policy as module
from sandboxd.cli.main import main
from sandboxd.compile.load import digest, load
from sandboxd.supervise import policies
from sandboxd.supervise.policies import find

pytestmark = pytest.mark.root_ok

ROOT = Path(__file__).resolve().parent.parent.parent
COMMANDS = ("list", "show", "check", "explain", "schema")


@pytest.fixture(autouse=True)
def no_policies_of_this_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.delenv("SANDBOXD_POLICY_PATH", raising=False)
    monkeypatch.setattr(policies, "SYSTEM", tmp_path)


def policy(*argv: str) -> int:
    return main(["policy", *argv])


def test_help_has_an_example_each(capsys: pytest.CaptureFixture[str]) -> None:
    for argv in ((), *((name,) for name in COMMANDS)):
        with pytest.raises(SystemExit) as caught:
            policy(*argv, "--help")
        assert caught.value.code == 0
        assert "  sandboxd policy " in capsys.readouterr().out


def test_a_command_is_needed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        policy()
    assert caught.value.code == 2
    assert "COMMAND" in capsys.readouterr().err


# -- list and show


def test_list(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "mine.toml"
    file.write_text('description = "mine"')
    monkeypatch.setenv("SANDBOXD_POLICY_PATH", str(tmp_path))
    assert policy("list") == 0
    lines = capsys.readouterr().out.splitlines()
    assert "judge-native  a compiled submission of an online judge: C, C++, Rust, Go" in lines
    assert f"mine          mine ({file})" in lines


def test_show_prints_a_policy_file(capsys: pytest.CaptureFixture[str]) -> None:
    assert policy("show", "judge-native") == 0
    text = capsys.readouterr().out
    assert 'cpu_time = "2s"\n' in text
    again = load("judge-native", lambda _: ("shown", text))
    assert digest(again) == digest(find("judge-native"))


def test_show_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert policy("show", "ci", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["schema"], found["name"]) == ("sandboxd.policy/1", "ci")
    assert found["sha256"] == digest(find("ci"))
    assert found["limits"]["wall_time"] == 3600
    assert found["limits"]["cpu_time"] is None
    assert found["origins"]["limits.wall_time"] == "ci.toml: limits.wall_time"


def test_show_what_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert policy("show", "bse") == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("sandboxd: no policy 'bse'\nsandboxd:   did you mean base?")


# -- check


def test_check_of_what_is_right(capsys: pytest.CaptureFixture[str]) -> None:
    files = sorted(str(one) for one in policies.packaged().glob("*.toml"))
    assert policy("check", *files) == 0
    assert capsys.readouterr().out == f"{len(files)} policies: no errors\n"


def test_check_prints_every_error_of_every_file(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("one.toml").write_text('extends = "base"\nmemory = 1\nlimits.disk = 0\n')
    Path("two.toml").write_text("a =\n\n")
    Path("three.toml").write_text('syscalls.allow = ["raed"]')
    assert policy("check", "one.toml", "./two.toml", "three.toml", "four.toml") == 1
    out, err = capsys.readouterr()
    assert out == ""
    lines = err.splitlines()
    assert lines[:3] == [
        "one.toml:2: memory: no such section or key (it belongs into [limits])",
        'one.toml:3: limits.disk: 0: expected int >= 1 ("unlimited" is allowed, too)',
        "two.toml:1:4: not TOML: invalid value",
    ]
    assert lines[3].startswith("three.toml:1: syscalls.allow[0]: unknown system call 'raed' (did")
    assert lines[4:] == ["four.toml: cannot be read: No such file or directory"]


def test_check_takes_a_word_for_a_file(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert policy("check", "base") == 1
    assert "base: cannot be read" in capsys.readouterr().err


def test_an_error_stays_on_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "x.toml"
    file.write_text('"a\\nb\\u001b" = 1')
    assert policy("check", str(file)) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert r"a\nb\x1b: no such section or key" in line


def test_check_against_libseccomp(capsys: pytest.CaptureFixture[str]) -> None:
    file = policies.packaged() / "judge-native.toml"
    assert policy("check", "--verify", str(file)) == 0
    assert capsys.readouterr().out == "1 policy: no errors\n"


def test_a_difference_to_libseccomp_is_an_error(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from sandboxd.compile import seccomp

    found = seccomp.Difference(arch="i386", number=5, args=(1, 16), ours="allow", theirs="errno 1")
    monkeypatch.setattr(seccomp, "verify", lambda *_: [found])
    file = str(policies.packaged() / "base.toml")
    assert policy("check", "--verify", file) == 1
    line = capsys.readouterr().err.splitlines()[0]
    assert line == (
        f"{file}: syscalls: call 5(0x1, 0x10) on i386: allow, but libseccomp says errno 1"
    )


def test_verifying_says_that_a_profile_is_not_compared(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "p.json").write_text('{"defaultAction": "SCMP_ACT_ALLOW"}')
    (tmp_path / "one.toml").write_text('syscalls.oci = "p.json"\n')
    assert policy("check", "--verify", str(tmp_path / "one.toml")) == 0
    assert "syscalls.oci: profiles are not compared with libseccomp" in capsys.readouterr().err


def test_verifying_without_libseccomp_says_what_to_install(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from sandboxd.compile import seccomp

    def gone(*_: object) -> list[seccomp.Difference]:
        raise ImportError("no libseccomp")

    monkeypatch.setattr(seccomp, "verify", gone)
    assert policy("check", "--verify", str(policies.packaged() / "base.toml")) == 1
    assert "cannot be verified: no libseccomp (install libseccomp2)" in capsys.readouterr().err


# -- explain and schema


def test_explain_says_what_why_and_how(capsys: pytest.CaptureFixture[str]) -> None:
    assert policy("explain", "judge-python") == 0
    text = capsys.readouterr().out
    assert 'limits.memory = "512M"  # judge-python.toml\n    memory.max, ' in text
    assert 'limits.disk = "64M"  # judge-native.toml\n' in text
    assert 'syscalls.allow[0] = "@base"  # judge-native.toml: syscalls.allow[1]\n' in text


def test_explain_lists_groups(capsys: pytest.CaptureFixture[str]) -> None:
    assert policy("explain") == 0
    text = capsys.readouterr().out
    assert "  @base " in text
    assert "  @no-locks " in text


def test_explain_a_group(capsys: pytest.CaptureFixture[str]) -> None:
    assert policy("explain", "@splice") == 0
    assert capsys.readouterr().out.splitlines()[1:] == ["  splice", "  tee", "  vmsplice"]
    assert policy("explain", "@no-locks") == 0
    assert '{calls = ["flock"], action = "success"}' in capsys.readouterr().out
    assert policy("explain", "@splcie") == 1
    assert "did you mean @splice" in capsys.readouterr().err


def test_schema(capsys: pytest.CaptureFixture[str]) -> None:
    assert policy("schema") == 0
    assert capsys.readouterr().out == (ROOT / "policies" / "schema.json").read_text()


# -- the module


def test_importing_it_costs_little() -> None:
    program = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); import sandboxd.cli.policy\n"
        "heavy = {'trio', 'sandboxd.supervise', 'pyroute2'}\nprint(*heavy & sys.modules.keys())\n"
    )
    done = subprocess.run(
        [sys.executable, "-B", "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == ""


def test_it_registers_one_command() -> None:
    commands = argparse.ArgumentParser().add_subparsers()
    module.register(commands)
    assert list(commands.choices) == ["policy"]
