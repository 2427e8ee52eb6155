"""A member's seat in its group: what its sandbox gets from there."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

import msgspec

from sandboxd.host import Place
from sandboxd.supervise.homes import Home

if TYPE_CHECKING:
    from sandboxd.supervise.netkeeper import UserNetwork


class Seat(msgspec.Struct, eq=False):
    """For one run. It has its slot already: a group has all of them or none."""

    place: Place
    ground: Home | None
    """Whose tenant's user namespace the network belongs to; None for that home itself."""
    gate: Callable[[], Awaitable[object]]
    """Returns when those are ready that come before it."""
    network: UserNetwork | None = None
