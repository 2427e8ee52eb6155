"""Problem packages: what is read from them, and what every wrong one is told."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sandboxd.judge.compare import Options
from sandboxd.judge.languages import table
from sandboxd.judge.metadata import ProblemError
from sandboxd.judge.problem import load

MIB = 1 << 20
EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "different"


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """The smallest package: two cases, no metadata that matters."""
    root = tmp_path / "small"
    put(root, {"problem.yaml": "name: small\n"})
    put(root, {f"data/{name}.{end}": "1\n" for name in ("sample/1", "secret/2") for end in ENDS})
    return root


ENDS = ("in", "ans")


def put(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


def refuse(package: Path, where: str, message: str) -> None:
    with pytest.raises(ProblemError) as raised:
        load(package)
    assert raised.value.where == where
    assert message in str(raised.value)


# --- what is read ---------------------------------------------------------------------------------


def test_the_defaults(package: Path) -> None:
    problem = load(package)
    assert (problem.name, problem.version) == ("small", "legacy")
    assert (problem.limits.time, problem.time_limit_from) == (5.0, "default")
    assert (problem.limits.memory, problem.limits.output) == (2048 * MIB, 8 * MIB)
    assert problem.limits.code == 128 << 10
    assert (problem.limits.compile_time, problem.limits.compile_memory) == (60, 2048 * MIB)
    assert [case.name for case in problem.cases] == ["sample/1", "secret/2"]
    assert problem.cases[0].input == package / "data/sample/1.in"
    assert problem.cases[0].options == Options()
    assert problem.languages is None


def test_every_limit(package: Path) -> None:
    lines = ["time_limit: 1.5", "memory: 256", "output: 1", "code: 64"]
    lines += ["compilation_time: 10", "compilation_memory: 512", "validation_time: 9"]
    put(package, {"problem.yaml": "limits:\n" + "".join(f"  {line}\n" for line in lines)})
    limits = load(package).limits
    assert (limits.time, limits.memory, limits.output) == (1.5, 256 * MIB, MIB)
    assert (limits.code, limits.compile_time) == (64 << 10, 10)
    assert limits.compile_memory == 512 * MIB


def test_where_the_time_limit_comes_from(package: Path) -> None:
    put(package, {"domjudge-problem.ini": "name='x'\ntimelimit = '7'\n"})
    assert load(package).time_limit_from == "domjudge-problem.ini: timelimit"
    assert load(package).limits.time == 7
    put(package, {".timelimit": "2.5\n"})
    assert (load(package).limits.time, load(package).time_limit_from) == (2.5, ".timelimit")
    put(package, {"problem.yaml": "limits: {time_limit: 3}"})
    assert load(package).time_limit_from == "problem.yaml: limits.time_limit"
    assert load(package).with_limits(time=9, memory=MIB).limits.time == 9
    assert load(package).with_limits(time=9).time_limit_from == "the caller"
    assert load(package).with_limits() == load(package)


def test_cases_and_groups_are_in_the_order_of_their_names(package: Path) -> None:
    names = ["10", "9", "b/z", "b/a", "a", "c/d/e"]
    put(package, {f"data/secret/{name}.{end}": "" for name in names for end in ENDS})
    put(package, {"data/secret/1.desc": "?", "data/secret/.x.in": "", "data/other/1.in": ""})
    assert [case.name for case in load(package).cases] == [
        *("sample/1", "secret/10", "secret/2", "secret/9", "secret/a"),
        *("secret/b/a", "secret/b/z", "secret/c/d/e"),
    ]


def test_flags_of_a_legacy_package(package: Path) -> None:
    put(
        package,
        {
            "problem.yaml": "validator_flags: case_sensitive",
            "data/testdata.yaml": "output_validator_flags: float_tolerance 1e-3",
            "data/secret/testdata.yaml": "on_reject: continue\ngrading: default",
            "data/secret/g/testdata.yaml": "output_validator_flags: space_change_sensitive",
            "data/secret/g/1.in": "",
            "data/secret/g/1.ans": "",
        },
    )
    tolerant = Options(
        case_sensitive=True, float_absolute_tolerance=1e-3, float_relative_tolerance=1e-3
    )
    strict = Options(case_sensitive=True, space_change_sensitive=True)
    assert [case.options for case in load(package).cases] == [tolerant, tolerant, strict]


def test_settings_of_newer_packages(package: Path) -> None:
    put(
        package,
        {
            "problem.yaml": "problem_format_version: 2025-09\nname: {sv: Liten, en: Small}\n"
            "type: [pass-fail]\nlanguages: [c, python3]\nconstants: {k: 5}\n",
            "data/secret/test_group.yaml": "output_validator_args: [float_tolerance, '1e-3']\n"
            "args: [-x]",
            "data/secret/2.yaml": "args: []\nhint: think",
            "data/secret/3.in": "",
            "data/secret/3.ans": "",
            "data/secret/3.files/in/a.txt": "a",
            "data/secret/3.files/.no": "",
            "include/c/lib.h": "// h",
            "include/default/data.txt": "d",
        },
    )
    problem = load(package)
    assert problem.name == "Small"
    assert problem.languages == frozenset({"c", "python3"})
    sample, second, third = problem.cases
    assert (sample.options, sample.args) == (Options(), ())
    assert second.options.float_absolute_tolerance == 1e-3
    assert (second.args, third.args) == ((), ("-x",))
    assert third.files == {"in/a.txt": package / "data/secret/3.files/in/a.txt"}
    assert problem.include == {"c": {"lib.h": b"// h"}, "default": {"data.txt": b"d"}}


def test_links_inside_the_package_are_followed(package: Path) -> None:
    (package / "data/secret/3.in").symlink_to("../sample/1.in")
    (package / "data/secret/3.ans").symlink_to("../sample/1.ans")
    assert len(load(package).cases) == 3


@pytest.mark.parametrize(
    ("folder", "verdicts"),
    [
        ("submissions/accepted", {"AC"}),
        ("submissions/wrong_answer", {"WA", "PE"}),
        ("submissions/time_limit_exceeded", {"TLE"}),
        ("submissions/run_time_error", {"RTE", "MLE", "OLE", "SV"}),
        ("submissions/partially_accepted", {"AC"}),
        ("submissions/wrong_answer/inner", {"AC"}),
        ("other", {"AC"}),
    ],
)
def test_expected_verdicts(package: Path, folder: str, verdicts: set[str]) -> None:
    problem = load(package)
    assert problem.expected(package / folder / "a.c") == verdicts
    assert problem.expected(Path("/elsewhere") / folder / "a.c") == {"AC"}


def test_the_example_package() -> None:
    problem = load(EXAMPLE)
    assert problem.limits.time == 2
    assert [case.name for case in problem.cases] == [
        "sample/1",
        *(f"secret/{name}" for name in ("01-one-line", "02-near-zero", "03-edges")),
        *("secret/04-wide", "secret/05-long"),
    ]
    assert sum(path.stat().st_size for path in (EXAMPLE / "data").rglob("*")) < 2_000_000
    written = {path.suffix for path in (EXAMPLE / "submissions/accepted").iterdir()}
    assert {source.removeprefix("*") for lang in table().values() for source in lang.sources} >= (
        written - {""}
    )
    assert len(written - {""}) == len(table())


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "where", "message"),
    [
        ("problem_format_version: '2019'", "problem_format_version", "'2019' is not one of legacy"),
        ("validation: custom", "validation", "'custom' is not supported yet"),
        ("validation: custom interactive", "validation", "'custom interactive' is not supported"),
        ("type: scoring", "type", "'scoring' is not supported yet"),
        ("type: [pass-fail, interactive]", "type", "'interactive' is not supported yet"),
        ("nmae: x", "nmae", "there is no such key (did you mean name?)"),
        ("limits: {memroy: 1}", "limits.memroy", "no such key (did you mean memory?)"),
        ("limits: {memory: lots}", "limits.memory", "expected `int`, got `str`"),
        ("limits: {memory: 0}", "limits.memory", ">= 1"),
        ("limits: {memory: 010.5}", "limits.memory", "expected `int`"),
        ("limits: {time_limit: 0}", "limits.time_limit", "> 0"),
        ("limits: {time_limit: .inf}", "limits.time_limit", "expected `float"),
        ("limits: {time_limit: inf}", "limits.time_limit", "86400"),
        ("limits: {time_limit: nan}", "limits.time_limit", "expected `float`"),
        ("limits: {time_limit: 1:30}", "limits.time_limit", "expected `float"),
        ("limits: 5", "limits", "expected `object`, got `"),
        ("validator_flags: float_tolerance x", "validator_flags", "needs a number, not 'x'"),
        ("validator_flags: [a]", "validator_flags", "expected `str`"),
    ],
)
def test_wrong_metadata(package: Path, text: str, where: str, message: str) -> None:
    put(package, {"problem.yaml": text})
    refuse(package, f"problem.yaml: {where}", message)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: b: c", "not YAML: mapping values are not allowed here (line 1)"),
        ("\nname: [", "not YAML"),
        ("name: a\nname: b", "the key name is given twice (line 2)"),
        ("name: &x a\nauthor: *x", "aliases are not supported (line 1)"),
        ("? [a]\n: b", "a key is no text (line 1)"),
        ("a: 1\n---\nb: 2", "not YAML: but found another document"),
        ("- 1", "expected `object`, got `array`"),
        ("[" * 100_000, "nested too deeply"),
        ("x" * (1 << 18) + ": 1", "larger than 262144 bytes"),
        ("name: \x07", "not YAML in UTF-8"),
    ],
)
def test_wrong_yaml(package: Path, text: str, message: str) -> None:
    put(package, {"problem.yaml": text})
    refuse(package, "problem.yaml", message)


def test_bytes_that_are_no_text(package: Path) -> None:
    (package / "problem.yaml").write_bytes(b"name: \xff")
    refuse(package, "problem.yaml", "not YAML in UTF-8")


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=300)
@given(
    st.one_of(
        st.binary(max_size=60),
        st.text("{}[]:-,&*!?|>'\"#\n \t~019.eabtrufls", max_size=60).map(str.encode),
    )
)
def test_any_bytes_are_read_or_refused(package: Path, data: bytes) -> None:
    (package / "problem.yaml").write_bytes(data)
    with contextlib.suppress(ProblemError):
        load(package)


def test_not_a_directory(tmp_path: Path) -> None:
    refuse(tmp_path / "none", str(tmp_path / "none"), "name a package directory")
    (tmp_path / "a.zip").touch()
    refuse(tmp_path / "a.zip", str(tmp_path / "a.zip"), "unpack it first")
    refuse(tmp_path, "problem.yaml", "there is no such file")


@pytest.mark.parametrize(
    ("files", "where", "message"),
    [
        ({"data/secret/3.in": ""}, "data/secret/3.ans", "there is no such file"),
        ({"data/secret/3.ans": ""}, "data/secret/3.ans", "there is no 3.in"),
        ({"data/secret/3.in/x": "", "data/secret/3.ans": ""}, "data/secret/3.in", "no such file"),
        ({".timelimit": "fast"}, ".timelimit", "'fast' is not a number of seconds"),
        ({".timelimit": "0"}, ".timelimit", "'0' is not a number of seconds"),
        (
            {"domjudge-problem.ini": "timelimit=1e9"},
            "domjudge-problem.ini: timelimit",
            "'1e9' is not a number",
        ),
        (
            {"data/secret/testdata.yaml": "output_validator_flags: fuzzy"},
            "data/secret/testdata.yaml: output_validator_flags",
            "the default validator has no flag 'fuzzy'",
        ),
        (
            {"data/secret/2.yaml": "output_validator_args: [float_tolerance]"},
            "data/secret/2.yaml: output_validator_args",
            "float_tolerance needs a number",
        ),
        (
            {"data/secret/test_group.yaml": "agrs: []"},
            "data/secret/test_group.yaml: agrs",
            "did you mean args?",
        ),
        (
            {"data/secret/test_group.yaml": "", "data/secret/testdata.yaml": ""},
            "data/secret",
            "both testdata.yaml and test_group.yaml",
        ),
    ],
)
def test_wrong_files(package: Path, files: dict[str, str], where: str, message: str) -> None:
    put(package, files)
    refuse(package, where, message)


@pytest.mark.parametrize("name", ["output_validator", "output_validators", "static_validator"])
def test_validators_of_newer_packages(package: Path, name: str) -> None:
    put(package, {f"{name}/check.py": ""})
    load(package)  # legacy: validation decides
    put(package, {"problem.yaml": "problem_format_version: 2025-09"})
    refuse(package, f"{name}/", "a validator of its own is not supported yet")


def test_no_secret_data(package: Path) -> None:
    for path in (package / "data/secret").iterdir():
        path.unlink()
    refuse(package, "data/secret/", "there is no test case")
    (package / "data/secret").rmdir()
    refuse(package, "data/secret/", "there is no such directory")


def test_links_out_of_the_package(package: Path, tmp_path: Path) -> None:
    (tmp_path / "outside").write_text("secret")
    (package / "data/secret/2.ans").unlink()
    (package / "data/secret/2.ans").symlink_to(tmp_path / "outside")
    refuse(package, "data/secret/2.ans", "a link that leads out of the package")


def test_a_pipe_instead_of_a_file_does_not_block(package: Path) -> None:
    (package / "problem.yaml").unlink()
    os.mkfifo(package / "problem.yaml")
    refuse(package, "problem.yaml", "there is no such file")


def test_directories_without_end(package: Path) -> None:
    (package / "data/secret/loop").symlink_to(".")
    refuse(package, "data/secret" + "/loop" * 21, "nested too deeply")
