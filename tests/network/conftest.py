"""The world that tests of networks have, one for all of them."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests import leftovers
from tests.escape.attack import python

NAMESPACES = (
    *("unshare", "--user", "--map-root-user", "--map-auto", "--net", "--mount", "--pid"),
    *("--fork", "--kill-child", "--mount-proc"),
)
HELPERS = ("slirp4netns", "pasta")


@dataclass
class Outcome:
    """What a run showed: the result, and what an attack put into `found`."""

    result: dict[str, Any]

    @property
    def found(self) -> dict[str, Any]:
        lines = self.result["streams"]["stdout"]["data"].splitlines()
        assert lines, self.result
        answer: dict[str, Any] = json.loads(lines[-1])
        return answer

    @property
    def refused(self) -> dict[str | None, int]:
        return {
            one["name"]: one["count"]
            for one in self.result["violations"]
            if one["kind"] == "network"
        }


class World:
    """tests/network/host.py, to be asked."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self._numbers = itertools.count(1)
        self._answers: dict[int, dict[str, Any]] = {}

    def ask(self, do: str, **fields: Any) -> Any:
        return self.answer(self.begin(do, **fields))

    def begin(self, do: str, **fields: Any) -> int:
        """Ask, and go on; `answer` waits."""
        assert self._process.stdin is not None
        number = next(self._numbers)
        print(json.dumps({"id": number, "do": do, **fields}), file=self._process.stdin, flush=True)
        return number

    def answer(self, number: int) -> Any:
        assert self._process.stdout is not None
        while number not in self._answers:
            line = self._process.stdout.readline()
            assert line, "the world is gone"
            answer = json.loads(line)
            self._answers[answer["id"]] = answer
        answer = self._answers.pop(number)
        if "error" in answer:
            raise RuntimeError(answer["error"] + "\n" + answer["trace"])
        return answer["answer"]

    def run(self, body: str, **network: Any) -> Outcome:
        """A Python attack with this [network]."""
        network.setdefault("resolvers", ["203.0.113.53"])
        argv = python(TOOLS + body)
        return Outcome(self.ask("run", network=network, argv=argv))


TOOLS = """
def reach(address, port=443, kind="tcp", data=b"x", wait=5):
    "Who answered there, or the name of what went wrong."
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    one = socket.socket(family, socket.SOCK_STREAM if kind == "tcp" else socket.SOCK_DGRAM)
    one.settimeout(wait)
    try:
        one.connect((address, port))
        if kind == "udp":
            one.send(data)
        return one.recv(100).decode().strip()
    except TimeoutError:
        return "ETIMEDOUT"
    except OSError as error:
        return errno.errorcode.get(error.errno, str(error))

def resolve(name, family=socket.AF_INET):
    try:
        found = socket.getaddrinfo(name, 0, family, socket.SOCK_STREAM)
    except socket.gaierror as error:
        return {-2: "NONAME", -3: "AGAIN", -5: "NODATA", -4: "FAIL"}.get(error.errno, str(error))
    return sorted(one[4][0] for one in found)
"""


def is_inside(thing: tuple[str, ...]) -> bool:
    """A process of the world, which lasts, and has a PID namespace of its own (proc(5))."""
    if thing[0] != "process":
        return False
    try:
        status = Path(f"/proc/{thing[1]}/status").read_text(errors="replace")
    except OSError:
        return False
    return len(status.partition("NSpid:")[2].partition("\n")[0].split()) > 1


@pytest.fixture(autouse=True)
def nothing_left(world: World) -> Iterator[None]:
    """As everywhere, but for what is in the world: tests/network/test_life.py looks into it."""
    before = leftovers.now()
    yield
    if left := leftovers.since(before, is_inside):
        pytest.fail("left behind:\n  " + "\n  ".join(left), pytrace=False)


@contextmanager
def open_world() -> Iterator[World]:
    """It, and its end."""
    command = [*NAMESPACES, sys.executable, "-P", "-m", "tests.network.world"]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None
        print("{}", file=process.stdin, flush=True)
        yield World(process)
        process.stdin.close()
        assert process.wait(30) == 0


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with open_world() as found:
        yield found


@pytest.fixture(
    params=[pytest.param(name, marks=pytest.mark.needs(name, "subuid", "tun", "ip", "nft"))
            for name in HELPERS]
)  # fmt: skip
def helper(request: pytest.FixtureRequest) -> str:
    """Each of the programs that carry packets."""
    name: str = request.param
    return name
