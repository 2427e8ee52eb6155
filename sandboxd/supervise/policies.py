"""Where policy files lie, and finding one by its name.

The places, first come first served: the directories of $SANDBOXD_POLICY_PATH, sandboxd/policies in
$XDG_CONFIG_HOME, /etc/sandboxd/policies.d, and the policies that come with sandboxd. A file that
extends its own name extends the one that it hides: that is how to change `base` for a machine.
"""

from __future__ import annotations

import os
from pathlib import Path

import msgspec

from sandboxd.compile.load import load
from sandboxd.errors import PolicyError
from sandboxd.policy import Policy

SYSTEM = Path("/etc/sandboxd/policies.d")
LONGEST = 1 << 16
"""Bytes of a policy file; one that is longer was named by mistake."""
LONGEST_PROFILE = 1 << 20
"""The same of a seccomp profile."""


class Available(msgspec.Struct, frozen=True):
    """A policy that can be named, and the file that counts for the name."""

    name: str
    file: Path
    description: str


def find(name: str) -> Policy:
    """The policy of this name, or in this file if it has a slash or ends in .toml.

    What such a file extends may lie beside it. PolicyErrors has all that is wrong.
    """
    files = _Files()
    return load(name, files, files.beside)


def is_path(name: str) -> bool:
    """Whether this is the path of a policy file rather than a policy's name."""
    return "/" in name or name.endswith(".toml")


def available() -> list[Available]:
    """Every name, with the file it stands for; a file that is wrong is described as such."""
    return [Available(name, file, _description(file)) for name, file in sorted(_files().items())]


def _files() -> dict[str, Path]:
    found: dict[str, Path] = {}
    for place in places():
        for file in _listed(place):
            found.setdefault(file.stem, file)
    return found


def places() -> list[Path]:
    """Where files are looked for, first come first served."""
    found = [Path(one) for one in os.environ.get("SANDBOXD_POLICY_PATH", "").split(":") if one]
    config = os.environ.get("XDG_CONFIG_HOME", "")
    # The specification wants relative ones ignored; without a home there is no ~.
    home = Path(config) if os.path.isabs(config) else Path(os.path.expanduser("~/.config"))
    if home.is_absolute():
        found.append(home / "sandboxd" / "policies")
    return [*found, SYSTEM, packaged()]


def packaged() -> Path:
    """The policies that come with sandboxd: in a wheel inside of the package, else beside it."""
    package = Path(__file__).resolve().parent.parent
    inside = package / "policies"
    return inside if inside.is_dir() else package.parent / "policies"


class _Files(msgspec.Struct):
    """`read` for load(): remembers the last file, because it is what the next name stands in."""

    last: Path | None = None
    folders: dict[str, Path] = msgspec.field(default_factory=dict)
    """Name of a file for messages -> where it lies."""

    def __call__(self, name: str) -> tuple[str, str]:
        if is_path(name):
            file = Path(name) if self.last is None else self.last.parent / name
        else:
            file = self._search(name)
        self.last = file
        label = file.name if file.parent == packaged() else os.path.normpath(file)
        self.folders[label] = file.parent
        return label, _text(file, LONGEST)

    def beside(self, label: str, path: str) -> tuple[str, str]:
        """A seccomp profile that the policy file of this name names."""
        file = Path(os.path.abspath(self.folders[label] / path))
        return str(file), _text(file, LONGEST_PROFILE)

    def _search(self, name: str) -> Path:
        for place in self._places(name):
            file = place / f"{name}.toml"
            if os.path.isfile(file):
                return file
        raise _missing(name)

    def _places(self, name: str) -> list[Path]:
        """Beside a file that lies elsewhere, too; after its own for one that extends its name."""
        found = places()
        if self.last is None:
            return found
        resolved = [os.path.realpath(place) for place in found]
        own = os.path.realpath(self.last.parent)
        if own not in resolved:
            found, resolved = [self.last.parent, *found], [own, *resolved]
        return found[resolved.index(own) + 1 :] if name == self.last.stem else found


def _missing(name: str) -> PolicyError:
    names = sorted(_files())
    import difflib

    close = difflib.get_close_matches(name, names, n=1)
    hint = f"did you mean {close[0]}? " if close else ""
    return PolicyError("", f"no policy {name!r}", hint=f"{hint}there are: {', '.join(names)}")


def _text(file: Path, longest: int) -> str:
    try:
        with file.open("rb") as stream:
            data = stream.read(longest + 1)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise PolicyError(str(file), f"cannot be read: {reason}") from None
    if len(data) > longest:
        what = "policy" if longest == LONGEST else "profile"
        raise PolicyError(str(file), f"more than {longest} bytes: this is no {what}")
    try:
        return data.decode("utf-8-sig")  # as some editors begin a file
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise PolicyError(f"{file}:{line}", "not UTF-8, which it must be") from None


def _listed(place: Path) -> list[Path]:
    try:
        return [one for one in place.glob("[!.]*.toml") if os.path.isfile(one)]
    except OSError:
        return []


def _description(file: Path) -> str:
    try:
        return find(str(file)).description
    except PolicyError as error:
        return f"(wrong: {str(error).splitlines()[0]})"
