"""`sandboxd plan`: what would be done to run a program, step by step, and nothing is."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from sandboxd.cli import flags

if TYPE_CHECKING:
    from sandboxd.plan import Step
    from sandboxd.policy import Policy
    from sandboxd.supervise.planning import Planned

SCHEMA = "sandboxd.plan/1"

_DESCRIPTION = """\
Shows the steps that would build the sandbox and start the program on this machine, each with the
line of the policy that asks for it; then what would be enforced, and what would not. The tenant's
steps are done once for all jobs with the same root, those of setup once for each sandbox, those of
exec once for each job. It takes the flags of `sandboxd run`."""
_EPILOG = """\
example:
  sandboxd plan -p judge-native -m 64M -- ./a.out
  sandboxd plan --script -- true                 # the system calls, in order"""


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command to the command line."""
    parser = subparsers.add_parser(
        "plan",
        help="show what would be done to run a program",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        usage="sandboxd plan [-p POLICY] [--script] [--json] [flags of run] [--] CMD...",
    )
    parser.add_argument("--script", action="store_true", help="with the system calls of each step")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    flags.add(parser)
    parser.set_defaults(func=show)


def show(args: argparse.Namespace) -> int:
    """Prints the plan; returns the exit status."""
    from sandboxd.supervise.planning import planned

    base, meant = flags.described(args)
    policy = flags.policy(args, base)
    found = planned(flags.job(args, policy, meant=meant), policy, args.cgroup)
    if args.json:
        print(json.dumps(to_json(policy, found, script=args.script)))
        return 0
    for line in render(policy, found, script=args.script):
        print(line)
    return 0


def _parts(found: Planned) -> Iterator[tuple[str, Sequence[Step]]]:
    yield "tenant", found.plan.tenant.steps
    yield "setup", found.plan.setup.steps
    yield "exec", found.plan.exec.steps


def to_json(policy: Policy, found: Planned, *, script: bool) -> dict[str, Any]:
    """The plan as JSON types."""
    record: dict[str, Any] = {"schema": SCHEMA, "policy": policy.name}
    for name, steps in _parts(found):
        record[name] = [
            {"step": number, "stage": step.stage, "what": step.describe(), "why": step.why}
            for number, step in enumerate(steps)
        ]
    record["cgroup_files"] = found.plan.cgroup_files
    record["cpu_sets"] = found.plan.cpu_sets
    record["enforcement"] = found.plan.enforcement
    record["degraded"] = [{"what": what, "why": why} for what, why in found.plan.degraded]
    if script:
        record["script"] = {
            name: [{"step": None if tag < 0 else tag, "call": line} for tag, line in lines]
            for name, lines in found.scripts()
        }
    return record


def render(policy: Policy, found: Planned, *, script: bool) -> Iterator[str]:
    """The plan as lines: each step with what it does, and on the right why."""
    scripts = dict(found.scripts()) if script else {}
    headings = {
        "tenant": "tenant: once for all jobs with this root",
        "setup": "setup: once for each sandbox, before its job is known",
        "exec": "exec: once for each job",
    }
    yield f"policy {policy.name} on Linux {found.host.kernel} ({found.host.arch})"
    for name, steps in _parts(found):
        yield ""
        yield headings[name]
        yield from _script(steps, scripts[name]) if script else _steps(steps)
    yield ""
    yield from _table("files of the run's cgroup", found.plan.cgroup_files)
    if found.plan.cpu_sets:
        yield f"pinned to the CPUs {' or '.join(found.plan.cpu_sets)}"
    yield from _table("enforcement", found.plan.enforcement)
    yield from _table("not enforced", dict(found.plan.degraded))


def _steps(steps: Sequence[Step]) -> Iterator[str]:
    for number, step in enumerate(steps):
        yield _step(number, step)


def _step(number: int, step: Step) -> str:
    what = f"{number:4}  {step.stage:<20} {step.describe()}"
    return f"{what:<80}  # {step.why}" if step.why else what


def _script(steps: Sequence[Step], lines: Sequence[tuple[int, str]]) -> Iterator[str]:
    """The system calls, below the step they carry out; those of none are sandboxd's own frame."""
    last = -1
    for tag, line in lines:
        if tag != last and tag >= 0:
            yield _step(tag, steps[tag])
        elif tag != last:
            yield "      (the frame of the script)"
        last = tag
        yield f"        {line}"


def _table(title: str, rows: dict[str, str]) -> Iterator[str]:
    if rows:
        yield f"{title}:"
        width = max(map(len, rows))
        yield from (f"  {name:<{width}}  {value}" for name, value in rows.items())
