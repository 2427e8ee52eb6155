"""The host of tests/network/world.py: carries out requests, one JSON object a line.

{"id", "do": "run", "network": {...}, "argv"}: the result's JSON. {"do": "processes"}: the names of
all processes of this little machine. {"do": "start"}: `sandboxd run`, in a process of its own.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import traceback
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec
import trio

from sandboxd.group import Group, Member
from sandboxd.job import Job
from sandboxd.policy import Network, Policy
from sandboxd.result import to_json
from sandboxd.supervise import policies
from sandboxd.supervise.runner import Runner, open_runner
from tests.escape.attack import python
from tests.network import measures
from tests.network.conftest import TOOLS
from tests.network.places import HOST, OUTSIDE, PUBLIC
from tests.network.world import answer_tcp, answer_udp, ip, name_server_udp, serve

PATIENCE = 50.0
LOCAL_PORT = 7777
"""What listens on the host's loopback, and on all its addresses."""


def policy(fields: dict[str, Any]) -> Policy:
    base = policies.find("base")
    root = msgspec.structs.replace(base.root, **fields.pop("root", {}))
    network = msgspec.convert({"mode": "user", **fields}, Network)
    return msgspec.structs.replace(base, network=network, root=root)


def everybody() -> list[tuple[int, int, str, str]]:
    """pid, parent, name and command line of all processes of this little machine."""
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            name, _, rest = Path(f"/proc/{pid}/stat").read_text().partition("(")[2].rpartition(")")
            line = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ")
        except OSError:
            continue
        if rest.split()[0] != "Z":
            # pasta executes the variant of itself that suits the CPU: passt.avx2
            short = "pasta" if name.startswith("passt") else name
            found.append((int(pid), int(rest.split()[1]), short, line.decode(errors="replace")))
    return found


def processes() -> list[str]:
    return sorted(name for _, _, name, _ in everybody())


def here() -> list[object]:
    """Processes, what we have open, interfaces, and what lies in our places."""
    places = [os.environ.get(name, "/nowhere") for name in ("XDG_RUNTIME_DIR", "TMPDIR")]
    return [
        processes(),
        len(os.listdir("/proc/self/fd")),
        sorted(os.listdir("/sys/class/net")),
        [sorted(os.listdir(place)) for place in places if os.path.isdir(place)],
    ]


class Host:
    """What is asked of it."""

    def __init__(self, runner: Runner) -> None:
        self.runner = runner
        self.started: dict[str, subprocess.Popen[bytes]] = {}

    async def run(self, request: dict[str, Any]) -> Any:
        job = Job(argv=tuple(request["argv"]), policy=policy(request["network"]))
        if "kill" in request:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._kill, request["kill"])
                result = await self.runner.run(job)
                nursery.cancel_scope.cancel()
        else:
            result = await self.runner.run(job)
        return to_json(result)

    async def group(self, request: dict[str, Any]) -> Any:
        """Members, each with a program and a [network]; the result's JSON of each, by name."""
        members = {
            name: Member(job=Job(argv=tuple(one["argv"]), policy=policy(one["network"])),
                         after=one.get("after", ()), ready=one.get("ready", "started"))
            for name, one in request["members"].items()
        }  # fmt: skip
        group = Group(members=members, **request["group"])
        async with open_runner(slots=len(members), cgroup="none") as runner:
            async with trio.open_nursery() as nursery:
                if "kill" in request:
                    nursery.start_soon(self._kill, request["kill"])
                found = await runner.run_group(group)
                nursery.cancel_scope.cancel()
        return {name: to_json(result) for name, result in found.items()}

    async def many(self, request: dict[str, Any]) -> Any:
        """The same job many times in a runner of its own; what is there before and after that."""
        job = Job(argv=tuple(request["argv"]), policy=policy(request["network"]))
        before = here()
        async with open_runner(slots=2, cgroup="none") as runner:
            statuses = [(await runner.run(job)).status for _ in range(request["times"])]
        with trio.move_on_after(10):
            while here() != before:  # noqa: ASYNC110  nobody tells when the kernel is through
                await trio.sleep(0.01)
        return [statuses, before, here()]

    async def measure(self, request: dict[str, Any]) -> Any:
        return await measures.measure(request)

    async def policies(self, request: dict[str, Any]) -> Any:
        """One job under each of many policies; how many carry packets for nobody afterwards."""
        while any(kept.refilling for kept in self.runner._known.all()):  # noqa: ASYNC110
            await trio.sleep(0.005)  # of an earlier test
        names, helper = [processes()], request["network"]["helper"]
        async with open_runner(slots=2, cgroup="none") as runner:
            for number in range(request["many"]):
                fields = {**request["network"], "allow": [f"*:{number + 1}"]}
                await runner.run(Job(argv=("/bin/true",), policy=policy(fields)))
                while any(kept.refilling for kept in runner._known.all()):  # noqa: ASYNC110
                    await trio.sleep(0.005)
            with trio.move_on_after(10):  # the last ones end beside the next run
                while processes().count(helper) > names[0].count(helper) + 4:  # noqa: ASYNC110
                    await trio.sleep(0.01)
            names.append(processes())
        return [found.count(helper) for found in names]

    async def leave(self, request: dict[str, Any]) -> Any:
        """A home is left while its next networks are made, at each time a bit later."""
        job = Job(argv=("/bin/true",), policy=policy(request["network"]))
        before = here()
        async with open_runner(slots=3, cgroup="none") as runner:
            for number in range(request["times"]):
                await runner.run(job)
                (home,) = runner._known.homes
                await trio.sleep(number * 0.001)
                await home.leave()
                with trio.fail_after(20):
                    while any(kept.refilling for kept in runner._known.all()):  # noqa: ASYNC110
                        await trio.sleep(0.001)
        with trio.move_on_after(10):
            while here() != before:  # noqa: ASYNC110  nobody tells when the kernel is through
                await trio.sleep(0.01)
        return [before, here()]

    async def spares(self, request: dict[str, Any]) -> Any:
        """Two jobs at a time, twice, with sandboxes made ahead."""
        argv = python(f"{TOOLS}\nfound = reach({PUBLIC!r})")
        job = Job(argv=argv, policy=policy(request["network"]))
        told: list[list[str]] = []

        async def one(runner: Runner) -> None:
            result = await runner.run(job)
            told.append([result.status, json.loads(result.stdout)])

        async with open_runner(slots=2, spares=2, cgroup="none") as runner:
            for _ in range(2):
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(one, runner)
                    nursery.start_soon(one, runner)
                with trio.fail_after(10):
                    while runner.statistics().spares < 2:  # noqa: ASYNC110  nobody tells
                        await trio.sleep(0.01)
        return told

    async def _kill(self, what: str) -> None:
        """End all who are called so, or are part of it, once the job says by a name: now."""
        while not any(  # noqa: ASYNC110  nobody tells who has executed what
            "ready-for-it" in line and name == "sh" for _, _, name, line in everybody()
        ):
            await trio.sleep(0.01)
        for pid, _, name, line in everybody():
            if name == what or f"sandboxd.launch.{what} " in line:
                os.kill(pid, signal.SIGKILL)

    async def memory(self, _: dict[str, Any]) -> Any:
        """Bytes that the supervisor has now, and has had at most (proc_pid_status(5))."""
        return memory()

    async def processes(self, _: dict[str, Any]) -> Any:
        return processes()

    async def start(self, request: dict[str, Any]) -> Any:
        command = [
            sys.executable,
            "-P",
            "-m",
            "sandboxd",
            *request.get("command", ("run",)),
            "--cgroup",
            "none",
            *request["argv"],
        ]
        self.started["it"] = started(command)
        return self.started["it"].pid

    async def end(self, request: dict[str, Any]) -> Any:
        """Send a signal to what was started, or to its tenant; its exit status and output."""
        process = self.started.pop("it")
        victims = [process.pid]
        if request["tenant"]:
            victims = [
                pid for pid, parent, _, line in everybody()
                if parent == process.pid and line.startswith("sandboxd-tenant")
            ]  # fmt: skip
        for pid in victims:
            os.kill(pid, request["signal"])
        said, _ = await trio.to_thread.run_sync(process.communicate)
        return [process.returncode, said.decode()]

    async def until(self, request: dict[str, Any]) -> Any:
        """Wait until there are so many processes of each name."""
        wanted: dict[str, int] = request["names"]
        with trio.move_on_after(20):
            while any(  # noqa: ASYNC110  nobody tells who is there
                processes().count(name) != many for name, many in wanted.items()
            ):
                await trio.sleep(0.005)
        return processes()

    async def connect(self, request: dict[str, Any]) -> Any:
        """As somebody on the host."""
        if request.get("kind") == "udp":
            return await ask_datagram(request["address"], request["port"])
        with trio.move_on_after(20):
            while True:
                try:
                    stream = await trio.open_tcp_stream(request["address"], request["port"])
                except OSError as error:
                    if request.get("must_fail"):
                        return str(error)
                    await trio.sleep(0.01)
                    continue
                async with stream:
                    # Who carries packets may accept before anybody listens inside.
                    with suppress(trio.BrokenResourceError):
                        await stream.send_all(b"hello")
                        if said := await stream.receive_some():
                            return said.decode()
        return "nobody"


def memory() -> list[int]:
    lines = Path("/proc/self/status").read_text().splitlines()
    found = dict(line.split(":") for line in lines if line.startswith(("VmRSS", "VmHWM")))
    return [int(found[name].split()[0]) << 10 for name in ("VmRSS", "VmHWM")]


async def ask_datagram(address: str, port: int) -> str:
    """Ask until somebody answers; what he says."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with trio.move_on_after(20), trio.socket.socket(family, socket.SOCK_DGRAM) as one:
        await one.connect((address, port))
        while True:
            with trio.move_on_after(0.2), suppress(ConnectionRefusedError):
                await one.send(b"hello")
                return (await one.recv(100)).decode()
            await trio.sleep(0.01)
    return "nobody"


def started(command: list[str]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


async def serve_requests(runner: Runner) -> None:
    host = Host(runner)
    async with trio.open_nursery() as nursery:
        read = sys.stdin.buffer.readline
        while line := await trio.to_thread.run_sync(read, abandon_on_cancel=True):
            nursery.start_soon(carry_out, host, json.loads(line))


async def carry_out(host: Host, request: dict[str, Any]) -> None:
    does: Callable[[dict[str, Any]], Awaitable[Any]] = getattr(host, request["do"])
    try:
        with trio.fail_after(PATIENCE if request["do"] != "measure" else 600):
            answer = {"answer": await does(request)}
    except Exception as error:
        answer = {"error": f"{type(error).__name__}: {error}", "trace": traceback.format_exc()}
    sys.stdout.write(json.dumps({"id": request["id"], **answer}) + "\n")
    sys.stdout.flush()


async def main() -> None:
    async with open_runner(slots=2, cgroup="none") as runner:
        await serve_requests(runner)


def configure() -> None:
    ip("link", "set", "lo", "up")
    for address, bits in HOST:
        where = "eth0" if bits in (24, 64) else "lo"
        six = ["nodad"] if ":" in address else []
        ip("addr", "add", f"{address}/{bits}", "dev", where, *six)
    ip("link", "set", "eth0", "up")
    for gateway, _ in OUTSIDE:
        ip("-6" if ":" in gateway else "-4", "route", "add", "default", "via", gateway)
    serve("0.0.0.0", LOCAL_PORT, socket.SOCK_STREAM, answer_tcp)
    serve("::1", LOCAL_PORT, socket.SOCK_STREAM, answer_tcp)
    serve("0.0.0.0", LOCAL_PORT, socket.SOCK_DGRAM, answer_udp)
    serve("127.0.0.1", 53, socket.SOCK_DGRAM, name_server_udp)


if __name__ == "__main__":
    assert threading.active_count() == 1
    first = sys.stdin.buffer.readline()  # the world is there
    configure()
    trio.run(main)
