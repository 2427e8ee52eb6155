"""Networks with a way out begin and end with their runs, whatever ends."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from tests.escape.attack import python
from tests.network.conftest import TOOLS, World
from tests.network.places import PUBLIC

WAITING = (
    f"reach({PUBLIC!r})\n"
    "import subprocess\n"
    "subprocess.run(['/bin/sh', '-c', 'sleep 60; : ready-for-it'])\n"
)


def count(world: World, name: str) -> int:
    names: list[str] = world.ask("processes")
    return names.count(name)


def test_a_program_that_is_killed_ends_the_run(world: World, helper: str) -> None:
    """It is our failure and no result: nobody knows what the job would have done."""
    with pytest.raises(RuntimeError) as caught:
        world.ask(
            "run", argv=argv(WAITING), network={"helper": helper, "allow": ["*"]},
            kill=helper,
        )  # fmt: skip
    assert f"network: step 5 {helper} ended while the job ran (signal 9 (SIGKILL)" in str(
        caught.value
    )


def test_a_netkeeper_that_is_killed_ends_the_run(world: World, helper: str) -> None:
    with pytest.raises(RuntimeError) as caught:
        world.ask(
            "run", argv=argv(WAITING), network={"helper": helper, "allow": ["*"]},
            kill="netkeeper",
        )  # fmt: skip
    assert f"{helper} ended while the job ran" in str(caught.value)
    outcome = world.run(f"found['there'] = reach({PUBLIC!r})", helper=helper, allow=["*"])
    assert outcome.found == {"there": f"{PUBLIC} 443"}


@pytest.mark.parametrize("how", ["SIGKILL", "SIGTERM", "zygote"])
def test_nothing_outlives_the_supervisor(
    world: World, helper: str, how: str, tmp_path: Path
) -> None:
    """Killed with its job in full swing; or the tenant is, and the supervisor tells."""
    before = {name: count(world, name) for name in (helper, "sleep")}
    file = tmp_path / "policy.toml"
    file.write_text(f'extends = "base"\n[network]\nmode = "user"\nhelper = "{helper}"\n')
    tmp_path.chmod(0o755)
    words = ["-p", str(file), "--", "/bin/sleep", "61"]
    world.ask("start", argv=words)
    world.ask("until", names={name: many + 1 for name, many in before.items()})
    number = signal.SIGKILL if how == "zygote" else getattr(signal, how)
    code, said = world.ask("end", signal=number, tenant=how == "zygote")
    assert code == {"SIGKILL": -9, "SIGTERM": 143, "zygote": 125}[how], said
    left = world.ask("until", names=before)
    assert {name: left.count(name) for name in before} == before


def test_many_in_a_row_leave_nothing(world: World, helper: str) -> None:
    network = {"helper": helper, "allow": ["*"]}
    body = argv(f"found['there'] = reach({PUBLIC!r})")
    statuses, before, after = world.ask("many", network=network, argv=body, times=200)
    assert statuses == ["ok"] * 200
    assert after == before


def test_a_home_that_is_left_while_networks_are_made_ahead(world: World, helper: str) -> None:
    before, after = world.ask("leave", network={"helper": helper}, times=30)
    assert after == before


def test_many_policies_have_few_networks_ahead(world: World, helper: str) -> None:
    """Each is a process: those of policies that were used longest ago are given up."""
    before, after = world.ask("policies", network={"helper": helper}, many=12)
    assert 1 <= after - before <= 4


def argv(body: str) -> tuple[str, ...]:
    return python(TOOLS + body)
