"""Who waits awake for a report, for how long, and when not."""

from __future__ import annotations

import math
import socket
from collections.abc import Iterator

import pytest
import trio
from trio.testing import assert_checkpoints, assert_no_checkpoints

from sandboxd.supervise.vigil import LENGTH, Vigil


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield ours, theirs


async def test_what_is_there_ends_it(ends: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = ends
    theirs.send(b"x")
    vigil = Vigil()
    for _ in range(3):
        with assert_checkpoints():
            assert await vigil.keep([ours.fileno()], math.inf)
    assert ours.recv(1) == b"x"


async def test_in_vain_it_is_kept_ever_more_rarely(
    ends: tuple[socket.socket, socket.socket],
) -> None:
    ours, theirs = ends
    vigil = Vigil()
    for pause in (2, 4, 8):
        began = trio.current_time()
        with assert_checkpoints():
            assert not await vigil.keep([ours.fileno()], math.inf)
        assert trio.current_time() - began >= LENGTH
        for _ in range(pause):
            with assert_no_checkpoints():
                await vigil.keep([ours.fileno()], math.inf)
    theirs.send(b"x")
    await vigil.keep([ours.fileno()], math.inf)
    ours.recv(1)
    with assert_checkpoints():
        await vigil.keep([ours.fileno()], math.inf)
    for _ in range(2):  # and not sixteen: the last one was not in vain
        with assert_no_checkpoints():
            await vigil.keep([ours.fileno()], math.inf)


async def test_none_is_kept_when_something_is_due(
    ends: tuple[socket.socket, socket.socket],
) -> None:
    with assert_no_checkpoints():
        assert not await Vigil().keep([ends[0].fileno()], trio.current_time() - 1)
    with assert_no_checkpoints():
        await Vigil(kept=False).keep([ends[0].fileno()], math.inf)
