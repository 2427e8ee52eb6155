"""What a way out costs, measured on the host of tests/network/world.py; nothing is judged here."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from typing import Any

import msgspec
import trio

from sandboxd.job import Job
from sandboxd.policy import Network, Policy
from sandboxd.supervise import policies
from sandboxd.supervise.runner import Runner, open_runner
from tests.network.places import PUBLIC

CLIENT = f"""
import json, socket, sys, time
one = socket.create_connection(({PUBLIC!r}, 443))
one.recv(100)
size, buffer = 0, bytearray(1 << 20)
one.sendall(b"flood " + sys.argv[1].encode())
start = time.perf_counter()
while count := one.recv_into(buffer):
    size += count
assert size == int(sys.argv[1]), size
print(json.dumps(size / (time.perf_counter() - start)))
"""
KINDS = ("slirp4netns", "pasta")


def policy(kind: str) -> Policy:
    network = Network(mode="none")
    if kind != "none":
        network = Network(mode="user", helper=kind, allow=("*",))  # type: ignore[arg-type]
    return msgspec.structs.replace(policies.find("base"), network=network)


async def first_bytes(rounds: int) -> dict[str, list[float]]:
    """Seconds until a program's first byte, a round each, each with its network made ahead.

    Who comes first changes from round to round: what it finds cold the next one finds warm.
    """
    kinds = ["none", *(kind for kind in KINDS if shutil.which(kind))]
    found: dict[str, list[float]] = {kind: [] for kind in kinds}
    async with open_runner(slots=2, cgroup="none") as runner:
        ours = {kind: policy(kind) for kind in kinds}
        for number in range(rounds + 2):
            for kind in turned(kinds, number):
                job = Job(argv=("/bin/echo", "x"), policy=ours[kind])
                if number:
                    await made_ahead(runner, ours[kind])
                start = trio.current_time()
                async with runner.start(job) as run:
                    async for event in run.events:
                        if event.type == "stdout" and number > 1:
                            found[kind].append(trio.current_time() - start)
    return found


async def made_ahead(runner: Runner, wanted: Policy) -> None:
    """Until there are as many networks as there are going to be."""
    kept = runner._known.ready(Job(argv=["true"], policy=wanted))
    while runner._maker.lacks(kept) or kept.refilling or runner._undertaker.is_busy:  # noqa: ASYNC110  nobody tells
        await trio.sleep(0.005)


def turned(kinds: list[str], number: int) -> list[str]:
    """The same from another one on."""
    at = number % len(kinds)
    return kinds[at:] + kinds[:at]


async def streams(rounds: int, size: int) -> dict[str, list[float]]:
    """Bytes a second of one TCP connection from outside, a round each with the bare program."""
    kinds = [kind for kind in KINDS if shutil.which(kind)]
    found: dict[str, list[float]] = {}
    async with open_runner(slots=1, cgroup="none") as runner:
        for number in range(rounds):
            for kind in turned([*kinds, *(f"bare {kind}" for kind in kinds)], number):
                found.setdefault(kind, []).append(await stream(runner, kind, size))
    return found


async def stream(runner: Runner, kind: str, size: int) -> float:
    argv = ("/usr/bin/python3", "-I", "-S", "-c", CLIENT, str(size))
    if not kind.startswith("bare "):
        result = await runner.run(Job(argv=argv, policy=policy(kind)))
        return float(json.loads(result.stdout))
    name = kind.removeprefix("bare ")
    said = await trio.to_thread.run_sync(BARE[name], shutil.which(name) or name, list(argv))
    return float(json.loads(said))


def bare_slirp4netns(path: str, argv: list[str]) -> bytes:
    """As its manual shows it, with the same MTU.

    Job and carrier have a session each, as they have with sandboxd: on a busy machine sessions
    share the CPUs (autogroup, sched(7)), and within one a stream has both ends to itself.
    """
    waiting = ["unshare", "--user", "--map-root-user", "--net", "sh", "-c", 'echo; read x; "$@"']
    with subprocess.Popen(
        [*waiting, "sh", *argv],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
    ) as job:
        assert job.stdin is not None
        assert job.stdout is not None
        job.stdout.readline()
        words = [path, "--configure", "--mtu=65520", "--ready-fd=1", str(job.pid), "tap0"]
        with subprocess.Popen(
            words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True
        ) as carrier:
            assert carrier.stdout is not None
            carrier.stdout.read(1)
            job.stdin.write(b"\n")
            job.stdin.close()
            said = job.stdout.read()
            carrier.kill()
    return said


def bare_pasta(path: str, argv: list[str]) -> bytes:
    words = [path, "--config-net", "--quiet", "--mtu", "65520", "--", "setsid", "--wait", *argv]
    done = subprocess.run(
        words,
        check=True,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        start_new_session=True,
    )
    return done.stdout


BARE = {"slirp4netns": bare_slirp4netns, "pasta": bare_pasta}


async def measure(request: dict[str, Any]) -> Any:
    began = time.time()
    return {
        "first byte": await first_bytes(request["rounds"]),
        "stream": await streams(request["streams"], request["size"]),
        "seconds": time.time() - began,
        "python": sys.version.split()[0],
    }
