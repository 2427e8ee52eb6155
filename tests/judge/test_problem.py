"""Problem packages: what is read from them, and what every wrong one is told."""

from __future__ import annotations

import contextlib
import os
import re
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
NEW = "problem_format_version: 2025-09\n"


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
        ("validation: custom score", "validation", "'score' is not supported"),
        ("validation: custom interactive multi-pass", "validation", "'multi-pass' is not support"),
        ("validation: own", "validation", "'own' is neither default nor custom"),
        ("type: scoring", "type", "'scoring' is not supported"),
        ("type: [pass-fail, interactive]", "type", "(the words of legacy are in validation)"),
        (f"{NEW}type: scoring", "type", "'scoring' is not supported"),
        (f"{NEW}type: [interactive, multi-pass]", "type", "'multi-pass' is not supported"),
        (f"{NEW}type: submit-answer", "type", "'submit-answer' is not supported"),
        (f"{NEW}type: interactive", "type", "an interactive problem without a validator"),
        (f"{NEW}validation: custom", "validation", "a key of the version legacy"),
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
        ("limits: 5", "limits", "not a map of keys and values"),
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
        ("- 1", "not a map of keys and values"),
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
        (
            {"data/secret/3.in/x": "", "data/secret/3.ans": ""},
            "data/secret/3.in",
            "not an ordinary file",
        ),
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


@pytest.mark.parametrize("name", ["output_validators", "static_validator"])
def test_validators_that_newer_packages_do_not_have(package: Path, name: str) -> None:
    put(package, {f"{name}/check.py": ""})
    assert load(package).validators == ()  # legacy: validation decides
    put(package, {"problem.yaml": NEW})
    refuse(package, f"{name}/", "is not supported")


# --- validators of its own ------------------------------------------------------------------------


def names(package: Path) -> list[tuple[str, list[str]]]:
    return [(one.name, [*one.files]) for one in load(package).validators]


def test_validators_of_a_legacy_package(package: Path) -> None:
    limits = "{validation_time: 3, validation_memory: 64, validation_output: 1}"
    text = f"validation: custom\nvalidator_flags: -a\nlimits: {limits}"
    put(package, {"problem.yaml": text})
    refuse(package, "output_validators/", "there is no program in it")
    put(package, {f"output_validators/{name}": "" for name in ("b.py", "a/x.cpp", "a/lib/x.h")})
    put(package, {"output_validators/.b.py.swp": "", "output_validators/a/.hidden": ""})
    put(package, {"data/secret/testdata.yaml": "output_validator_flags: -b  2"})
    problem = load(package)
    assert names(package) == [
        ("output_validators/a", ["lib/x.h", "x.cpp"]),
        ("output_validators/b.py", ["b.py"]),
    ]
    assert not problem.interactive
    assert [case.validator_args for case in problem.cases] == [("-a",), ("-a", "-b", "2")]
    assert (problem.limits.validation_time, problem.limits.validation_memory) == (3, 64 * MIB)
    assert problem.limits.validation_output == MIB


def test_an_interactive_legacy_package(package: Path) -> None:
    put(package, {"problem.yaml": "validation: custom interactive", "output_validators/a.py": ""})
    assert load(package).interactive
    put(package, {"output_validators/b.py": ""})
    refuse(package, "problem.yaml: validation", "only one validator can be interactive, not")


@pytest.mark.parametrize("inner", ["", "check/"])
def test_the_validator_of_a_newer_package(package: Path, inner: str) -> None:
    put(package, {"problem.yaml": NEW + "type: [pass-fail, interactive]"})
    put(package, {f"output_validator/{inner}{name}": "" for name in ("__main__.py", "lib.py")})
    put(package, {"data/secret/test_group.yaml": "output_validator_args: [float, '1e-3 x']"})
    problem = load(package)
    place = f"output_validator/{inner}".rstrip("/")
    assert names(package) == [(place, ["__main__.py", "lib.py"])]
    assert problem.interactive
    assert [case.validator_args for case in problem.cases] == [(), ("float", "1e-3 x")]


def test_scripts_of_a_validator(package: Path) -> None:
    put(package, {"problem.yaml": NEW, "output_validator/build": "", "output_validator/x.ml": ""})
    refuse(package, "output_validator/build", "a script that is not executable (chmod +x build)")
    (package / "output_validator/build").chmod(0o755)
    (sources,) = load(package).validators
    assert sources.scripted
    assert sources.files["build"].mode == 0o755


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["notes.txt"], "notes.txt: no source file of a known language"),
        (["check.cpp", "testlib.h"], "testlib.h: no source file"),
        (["check/a.cpp", "check/b.py"], "check: source files of several languages: C++, Python 3"),
        (["check/testlib.h"], "check: no source file of a known language"),
    ],
)
def test_validators_that_are_no_programs(package: Path, files: list[str], message: str) -> None:
    put(package, {"problem.yaml": "validation: custom"})
    put(package, {f"output_validators/{name}": "" for name in files})
    with pytest.raises(ProblemError, match=f"^output_validators/{re.escape(message)}") as raised:
        load(package)
    assert raised.value.hint


def test_a_validator_that_a_group_names(package: Path) -> None:
    put(package, {"problem.yaml": "validation: custom", "output_validators/check.py": ""})
    for name in ("check", "check.py"):
        flags = f"output_validator_flags: {{name: {name}, flags: -x 1}}"
        put(package, {"data/secret/testdata.yaml": flags})
        assert load(package).cases[1].validator_args == ("-x", "1")
    put(package, {"output_validators/other.py": ""})
    refuse(
        package,
        "data/secret/testdata.yaml: output_validator_flags",
        "'check.py' alone is not supported: all validators are run (check.py, other.py)",
    )


def test_a_validator_that_is_a_link_out_of_the_package(package: Path, tmp_path: Path) -> None:
    (tmp_path / "outside.py").write_text("secret")
    put(package, {"problem.yaml": NEW, "output_validator/check.py": ""})
    (package / "output_validator/lib.py").symlink_to(tmp_path / "outside.py")
    refuse(package, "output_validator/lib.py", "a link that leads out of the package")


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
    refuse(package, "problem.yaml", "not an ordinary file")


def test_directories_without_end(package: Path) -> None:
    (package / "data/secret/loop").symlink_to(".")
    refuse(package, "data/secret" + "/loop" * 21, "nested too deeply")
