"""go-judge's WebSockets: many requests on one, and one that is fed and followed."""

from __future__ import annotations

import json
from contextlib import suppress
from typing import Any

import pytest
import trio

from sandboxd.serve.routes import Bounds
from tests.serve.gojudging import STDERR, STDOUT, Judge, Talk, cmd, judge, sh, talking

pytestmark = pytest.mark.needs("userns")

STREAMS = [{"streamIn": True}, {"streamOut": True}, {"streamOut": True}]
BOTH_WAYS = [
    {"in": {"index": 0, "fd": 1}, "out": {"index": 1, "fd": 0}},
    {"in": {"index": 1, "fd": 1}, "out": {"index": 0, "fd": 0}},
]


async def idle(served: Judge) -> None:
    """Returns when nothing runs and nothing waits."""
    book = served.daemon.book
    while book.guests or book.share.running or book.share.queued:
        await trio.testing.wait_all_tasks_blocked()


# -- /ws -------------------------------------------------------------------------------------


async def test_many_requests_on_one_connection() -> None:
    async with judge() as served, talking(served.socket, "/ws") as talk:
        for number in range(5):
            await talk.say({"requestId": f"r{number}", "cmd": [sh(f"echo {number}")]})
        found = {one["requestId"]: one for one in [await talk.hear_json() for _ in range(5)]}
        for number in range(5):
            one = found[f"r{number}"]
            assert one["results"][0]["files"]["stdout"] == f"{number}\n"
            assert "error" not in one


async def test_a_request_is_cancelled() -> None:
    async with judge() as served, talking(served.socket, "/ws") as talk:
        await talk.say({"requestId": "a", "cmd": [sh("sleep 60")]})
        while not any(one.runs for one in served.daemon.book.guests.values()):
            await trio.testing.wait_all_tasks_blocked()
        await talk.say({"cancelRequestId": "a"})
        found = await talk.hear_json()
        assert found["requestId"] == "a"
        assert found["results"][0]["status"] == "Signalled"
        await talk.say({"cancelRequestId": "unknown"})
        await talk.say({"requestId": "a", "cmd": [sh("true")]})  # the name is free again
        assert (await talk.hear_json())["results"][0]["status"] == "Accepted"


async def test_a_request_is_cancelled_while_it_waits() -> None:
    async with judge(slots=1) as served, talking(served.socket, "/ws") as talk:
        await talk.say({"requestId": "first", "cmd": [sh("sleep 60")]})
        while not served.daemon.book.share.running:
            await trio.testing.wait_all_tasks_blocked()
        await talk.say({"requestId": "second", "cmd": [sh("true")]})
        while not served.daemon.book.share.queued:
            await trio.testing.wait_all_tasks_blocked()
        await talk.say({"cancelRequestId": "second"})
        found = await talk.hear_json()
        assert found == {
            "requestId": "second", "results": [], "error": "request cancelled before execute",
        }  # fmt: skip


async def test_requests_that_are_not_answered_have_a_bound_together() -> None:
    large = "x" * 600_000
    async with judge(bounds=Bounds(body=1 << 20, bodies=1 << 20)) as served:
        async with talking(served.socket, "/ws") as talk:
            await talk.say({"requestId": "a", "cmd": [sh("sleep 60", stdin=large)]})
            await talk.say({"requestId": "b", "cmd": [sh("wc -c", stdin=large)]})
            refused = await talk.hear_json()
            assert (refused["requestId"], refused["error"]) == (
                "b", "too many large requests at once",
            )  # fmt: skip
            await talk.say({"cancelRequestId": "a"})
            assert (await talk.hear_json())["requestId"] == "a"
            await talk.say({"requestId": "b", "cmd": [sh("wc -c", stdin=large)]})
            found = await talk.hear_json()
            assert found["results"][0]["files"]["stdout"].strip() == "600000"


async def test_ids_are_needed_and_unique() -> None:
    async with judge() as served, talking(served.socket, "/ws") as talk:
        await talk.say({"cmd": [sh("true")]})
        assert (await talk.hear_json())["error"] == "empty request id"
        await talk.say({"requestId": "a", "cmd": [sh("sleep 60")]})
        await talk.say({"requestId": "a", "cmd": [sh("true")]})
        assert "duplicated" in (await talk.hear_json())["error"]


@pytest.mark.parametrize("said", ["{", '{"requestId":"a","cmd":[{"args":["a"],"files":[{}]}]}'])
async def test_what_is_no_request_ends_the_connection(said: str) -> None:
    async with judge() as served, talking(served.socket, "/ws") as talk:
        await talk.say(said)
        with pytest.raises(EOFError):
            await talk.hear()
        await idle(served)


@pytest.mark.parametrize("path", ["/ws", "/stream"])
async def test_with_the_connection_all_ends(path: str) -> None:
    asked: Any = {"requestId": "a", "cmd": [sh("sleep 60")]}
    async with judge() as served:
        async with talking(served.socket, path) as talk:
            await talk.say(b"\1" + json.dumps(asked).encode() if path == "/stream" else asked)
            while not any(one.runs for one in served.daemon.book.guests.values()):
                await trio.testing.wait_all_tasks_blocked()
        await idle(served)


async def test_no_websocket_is_told_so() -> None:
    async with judge() as served:
        status, _, body = await served.ask("GET", "/ws")
        assert status == 400
        assert b"WebSocket" in body


async def test_a_message_has_a_bound() -> None:
    async with judge() as served, talking(served.socket, "/ws") as talk:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_flood, talk)
            with pytest.raises(EOFError) as ended:
                await talk.hear()
            nursery.cancel_scope.cancel()
        assert ended.value.args == (1009,)


async def _flood(talk: Talk) -> None:
    with suppress(trio.BrokenResourceError):
        await talk.say("x" * (17 << 20))


# -- /stream ---------------------------------------------------------------------------------


async def begin(talk: Talk, *cmds: dict[str, Any], **more: Any) -> None:
    await talk.say(b"\1" + json.dumps({"cmd": cmds, **more}).encode())


async def until(talk: Talk, wanted: bytes) -> bytes:
    """What comes, up to these bytes."""
    found = b""
    while wanted not in found:
        data = await talk.hear()
        assert data[0] == 2, data
        found += data[2:]
    return found


async def end(talk: Talk) -> list[dict[str, Any]]:
    """The results, and whatever output came before them is over."""
    while (data := await talk.hear())[0] == 2:
        pass
    assert data[0] == 1
    found = json.loads(data[1:])
    assert found["requestId"] == ""
    with pytest.raises(EOFError):
        await talk.hear()
    return list(found["results"])


async def test_a_program_is_fed_and_followed() -> None:
    script = "read a; echo got $a; read b; echo and $b >&2"
    async with judge() as served, talking(served.socket, "/stream") as talk:
        await begin(talk, sh(script, files=STREAMS))
        await talk.say(b"\3\0one\n")
        data = await talk.hear()
        assert data == b"\2\1got one\n"
        await talk.say(b"\3\0two\n")
        assert await talk.hear() == b"\2\2and two\n"
        (found,) = await end(talk)
        assert found["status"] == "Accepted"
        assert "files" not in found


async def test_a_terminal() -> None:
    async with judge() as served, talking(served.socket, "/stream") as talk:
        await begin(talk, sh("echo ready; read go; stty size; echo over", tty=True, files=STREAMS))
        await until(talk, b"ready\r\n")
        await talk.say(b"\2" + json.dumps({"rows": 33, "cols": 77}).encode())
        await talk.say(b"\3\0\n")
        assert b"33 77\r\n" in await until(talk, b"over")
        (found,) = await end(talk)
        assert found["status"] == "Accepted"


async def test_two_programs_one_of_them_followed() -> None:
    files = [None, None, {"streamOut": True}]
    talks = sh("echo question; read answer; echo $answer >&2", files=files)
    answers = cmd("sed", "-u", "s/question/answer/", files=[None, None, STDERR])
    async with judge() as served, talking(served.socket, "/stream") as talk:
        await begin(talk, talks, answers, pipeMapping=BOTH_WAYS)
        assert await talk.hear() == b"\2\2answer\n"
        first, second = await end(talk)
        assert (first["status"], second["status"]) == ("Accepted", "Accepted")


async def test_cancelling_ends_it_with_its_result() -> None:
    async with judge() as served, talking(served.socket, "/stream") as talk:
        await begin(talk, sh("echo ready; sleep 60", files=[{"content": ""}, *STREAMS[1:]]))
        await until(talk, b"ready\n")
        await talk.say(b"\4")
        (found,) = await end(talk)
        assert (found["status"], found["exitStatus"]) == ("Signalled", 9)


WRONG = {
    "nothing": [b""],
    "no request first": [b"\4"],
    "unknown": [b"\1{}", b"\x09"],
    "input without its head": [b"\3"],
    "no JSON": [b"\1{"],
}


@pytest.mark.parametrize("what", WRONG)
async def test_what_cannot_be_said_ends_the_connection(what: str) -> None:
    async with judge() as served, talking(served.socket, "/stream") as talk:
        with suppress(trio.BrokenResourceError):
            for data in WRONG[what]:
                await talk.say(data)
        with suppress(trio.BrokenResourceError):
            await _to_the_end(talk)
        await idle(served)


async def _to_the_end(talk: Talk) -> None:
    with suppress(EOFError):
        while True:
            await talk.hear()


@pytest.mark.parametrize("said", [b"\3\1x", b"\3\x10x", b"\2{}"])
async def test_input_for_nobody_ends_the_connection(said: bytes) -> None:
    async with judge() as served, talking(served.socket, "/stream") as talk:
        await begin(talk, sh("sleep 60", files=[{"streamIn": True}, STDOUT, STDERR]))
        await talk.say(said)
        await _to_the_end(talk)
        await idle(served)


async def test_a_slow_listener_slows_the_program_and_nobody_else() -> None:
    async with judge() as served, talking(served.socket, "/stream") as talk:
        await begin(talk, cmd("head", "-c", "3000000", "/dev/zero", files=STREAMS))
        (other,) = await served.run(sh("true"))
        assert other["status"] == "Accepted"
        count = 0
        while (data := await talk.hear())[0] == 2:
            count += len(data) - 2
        assert count == 3_000_000


async def test_who_hangs_up_while_the_program_takes_no_input() -> None:
    asked = {"cmd": [sh("sleep 60", files=STREAMS)]}
    async with judge() as served:
        async with talking(served.socket, "/stream") as talk:
            await talk.say(b"\1" + json.dumps(asked).encode())
            while not any(one.runs for one in served.daemon.book.guests.values()):
                await trio.testing.wait_all_tasks_blocked()
            for _ in range(8):  # more than a pipe holds
                await talk.say(b"\3\0" + bytes(32768))
            await trio.testing.wait_all_tasks_blocked(0.05)
        with trio.fail_after(20):
            await idle(served)
