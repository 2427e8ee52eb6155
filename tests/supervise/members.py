"""Members of groups, for tests: what they do, what they said, and reading along."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import trio

from sandboxd.group import Group
from sandboxd.job import Job
from sandboxd.result import Event, Result
from sandboxd.supervise.groups import GroupRun
from sandboxd.supervise.runner import open_runner
from tests.escape.attack import python
from tests.network.conftest import TOOLS
from tests.supervise.variants import policy, without

SERVE = """
server = socket.create_server(("0.0.0.0", 5432))
server.settimeout(30)
one, peer = server.accept()
one.sendall(b"hello " + peer[0].encode())
one.close()
found["peer"] = peer[0]
"""
ECHO = """
one = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
one.bind(("0.0.0.0", 5300)); one.settimeout(30)
data, peer = one.recvfrom(100)
one.sendto(b"echo " + data, peer)
found["peer"] = peer[0]
"""


def job(body: str, **fields: Any) -> Job:
    fields.setdefault("policy", policy())
    return Job(argv=python(TOOLS + body), **fields)


def said(result: Result) -> dict[str, Any]:
    assert result.status == "ok", (result.status, result.message, result.stderr.decode())
    answer: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return answer


async def run(group: Group, host: str = "nothing") -> dict[str, Result]:
    async with open_runner(slots=len(group.members), host=without(host)) as runner:
        return await runner.run_group(group)


async def read(live: GroupRun, until: Callable[[str, Event], bool]) -> None:
    """All events, up to the first that will do."""
    async with trio.open_nursery() as nursery:

        async def one(name: str) -> None:
            async for event in live.runs[name].events:
                if until(name, event):
                    nursery.cancel_scope.cancel()

        for name in live.runs:
            nursery.start_soon(one, name)


WAITS = ("sh", "-c", "echo up; exec sleep 60")


def waiting(*names: str) -> Group:
    return Group(members={name: Job(argv=WAITS, policy=policy()) for name in names})
