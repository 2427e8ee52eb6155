"""The size of a program's segments, from its file's head; and which file that is."""

from __future__ import annotations

import errno
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sandboxd.compile.build import Compiled, compile_policy
from sandboxd.job import File, Job
from sandboxd.messages import Ended
from sandboxd.policy import Limits, Mount, Policy
from sandboxd.result import Usage
from sandboxd.supervise import segments
from sandboxd.supervise.status import Facts
from tests.supervise.test_status import ended
from tests.supervise.variants import as_found
from tests.vm.programs import static_program

BIG = 1 << 40


def compiled(*mounts: Mount) -> Compiled:
    return compile_policy(Policy(mounts=mounts), as_found())


@given(st.binary(max_size=300), st.integers(0, 300))
def test_any_bytes_are_read_or_are_no_program(garbage: bytes, cut: int) -> None:
    """Whatever a file holds, the answer is a number or None, never an exception."""
    whole = static_program(BIG)
    for data in (garbage, whole[:cut], whole[:cut] + garbage, b"\x7fELF" + garbage):
        found = segments.loaded(data)
        assert found is None or found >= 0


def test_a_real_program_takes_at_least_its_code() -> None:
    with open(sys.executable, "rb") as file:
        found = segments.loaded(file.read(segments.HEAD))
    assert found is not None
    assert 1 << 10 < found < 1 << 30
    assert segments.loaded(static_program(BIG)) == BIG


@pytest.mark.parametrize(
    ("argv", "cwd"), [("./a", None), ("/box/a", None), ("../box/./a", None), ("../a", "sub")]
)
def test_the_programs_file_is_found_where_the_caller_has_it(
    argv: str, cwd: str | None, tmp_path: Path
) -> None:
    on_disk = tmp_path / "a"
    on_disk.write_bytes(static_program(BIG))
    for data in (static_program(BIG), on_disk, File(data=on_disk), File(data=static_program(BIG))):
        job = Job(argv=[argv], cwd=cwd, files={"./a": data})
        assert segments.of_program(job, compiled()) == BIG
    assert segments.of_program(Job(argv=[argv], cwd=cwd), compiled()) is None


def test_what_a_job_can_write_is_not_looked_at(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(static_program(BIG))
    for writable, found in ((False, BIG), (True, None)):
        mount = Mount(target="/opt/x", source=str(tmp_path), writable=writable)
        assert segments.of_program(Job(argv=["/opt/x/a"]), compiled(mount)) == found
    assert segments.of_program(Job(argv=["a"]), compiled()) is None
    assert segments.of_program(Job(argv=["/dev/zero"]), compiled()) is None


DIED: list[tuple[Ended | None, dict[str, object], bool]] = [
    (ended(9), {}, True),
    (ended(11), {}, True),
    (ended(6), {}, False),
    (ended(0), {}, False),
    (None, {}, False),
    (ended(9, cpu_user=1), {}, False),
    (ended(9), {"output": 1}, False),
    (ended(9), {"stopped_by": ("wall_time_limit", "x")}, False),
    (ended(127), {"start_error": (errno.ENOMEM, "x")}, True),
    (ended(127), {"start_error": (errno.ENOENT, "x")}, False),
]


@pytest.mark.parametrize(("end", "more", "asked"), DIED)
def test_only_who_died_at_once_is_asked(
    end: Ended | None, more: dict[str, object], asked: bool
) -> None:
    facts = Facts(**({"ended": end, "usage": Usage(), "output": 0} | more))  # type: ignore[arg-type]
    assert segments.are_in_question(facts, Limits(memory=1 << 20)) == asked
    assert segments.are_in_question(facts, Limits(address_space=1 << 20)) == asked
    assert not segments.are_in_question(facts, Limits())
