"""What an image is: directories that lie on one another, and how its maker meant it to be run."""

from __future__ import annotations

import msgspec


class Config(msgspec.Struct, frozen=True, kw_only=True):
    """The part of an image's configuration that is honoured (config.md of the OCI's)."""

    env: tuple[tuple[str, str], ...] = ()
    cwd: str | None = None
    entrypoint: tuple[str, ...] = ()
    cmd: tuple[str, ...] = ()
    user: str = ""
    """As the image says it: a name or a number, perhaps a colon and a group."""
    uid: int | None = None
    """What `user` comes to by the image's own /etc/passwd; None: unsaid or unknown."""
    gid: int | None = None

    @property
    def argv(self) -> tuple[str, ...]:
        """The program that runs when none is named."""
        return self.entrypoint + self.cmd


class Image(msgspec.Struct, frozen=True, kw_only=True):
    """An image of this machine's, ready to be a root."""

    name: str
    id: str
    """sha256 of its configuration, or of its one layer: the same image, whatever its name."""
    layers: tuple[str, ...]
    """Directories, the topmost first."""
    config: Config = Config()
    highest_id: int = 0
    """Nobody in it has a larger uid or gid (60000 and above apart)."""
    notes: tuple[str, ...] = ()
    """What is not as its maker meant it."""
