"""A policy made ready for this host, and the scripts that are made of it."""

from __future__ import annotations

import msgspec

from sandboxd.compile.build import Compiled
from sandboxd.host import Host
from sandboxd.plan import ExecPlan
from sandboxd.script.init import setup_image
from sandboxd.script.record import Image

Script = tuple[ExecPlan, Image, bytes]
"""A job's plan, the image of its records, and the message that starts it."""


class Prepared(msgspec.Struct, frozen=True, eq=False):
    """A policy made ready for this host: compiled and lowered, once."""

    compiled: Compiled
    host: Host
    image: Image
    scripts: dict[tuple[object, ...], Script] = msgspec.field(default_factory=dict)
    """Exec scripts of the last jobs, by what they depend on."""

    @classmethod
    def of(cls, compiled: Compiled, host: Host) -> Prepared:
        return cls(compiled, host, setup_image(host.arch, compiled.setup))


def sandbox_script(image: Image, uid: int) -> bytes:
    """The setup script with the run's own uid put in."""
    if not image.marks:
        return image.content
    digits = int.from_bytes(b"%8d" % uid, "little")
    values = {name: digits if name.startswith("digits") else uid for name in image.marks}
    return image.patched(values)
