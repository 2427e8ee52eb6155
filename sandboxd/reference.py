"""What a build left, as something that other runs are given: by reference, never copied."""

from __future__ import annotations

import posixpath

import msgspec

from sandboxd.errors import JobError

_DIGITS = 64
_HEXADECIMAL = frozenset("0123456789abcdef")


class Reference(msgspec.Struct, frozen=True, kw_only=True):
    """The files of a build that is kept, or a part of them; a value of `Job.files`.

    Who uses it sees it read-only. As `{"prog": reference.at("a.out")}` it is one file, as
    `{"lib": reference}` a directory, and as `{".": reference}` each of its names lies in the
    working directory itself.
    """

    key: str
    """What the build was made of, as a digest: 64 hexadecimal digits."""
    names: tuple[str, ...]
    """Its files, relative."""
    path: str = ""
    """The part that is meant; "" is all."""

    def __post_init__(self) -> None:
        if len(self.key) != _DIGITS or not {*self.key} <= _HEXADECIMAL:
            raise JobError(f"{self.key[:80]!r} is no key of a build", hint="64 hexadecimal digits")
        if self.path and {"", ".", ".."} & {*self.path.split("/")}:
            raise JobError(f"build {self.key[:12]}: {self.path!r} is no plain path in it",
                           hint="use at()")  # fmt: skip

    def at(self, path: str) -> Reference:
        """A file or directory in it. JobError if there is none of this name."""
        inner = posixpath.normpath(posixpath.join(self.path, path))
        inner = "" if inner == "." else inner
        if not self._has(inner):
            few = ", ".join(self.names[:10])
            raise JobError(f"build {self.key[:12]}: nothing in it is called {path!r}",
                           hint=f"there are: {few}")  # fmt: skip
        return msgspec.structs.replace(self, path=inner)

    def _has(self, inner: str) -> bool:
        return not inner or any(f"{name}/".startswith(f"{inner}/") for name in self.names)

    @property
    def is_directory(self) -> bool:
        return self._has(self.path) and self.path not in self.names

    def entries(self) -> tuple[Reference, ...]:
        """What lies directly in it."""
        start = f"{self.path}/" if self.path else ""
        inner = (name[len(start) :] for name in self.names if name.startswith(start))
        tops = dict.fromkeys(name.partition("/")[0] for name in inner)
        return tuple(msgspec.structs.replace(self, path=start + top) for top in tops)


class Attachment(msgspec.Struct, frozen=True):
    """A path of the store that is to be seen at a place in the sandbox."""

    source: str
    """Below the store."""
    target: str
    directory: bool


class Inputs(msgspec.Struct, frozen=True):
    """What is attached to a sandbox before its job comes, and the directory it is taken from."""

    store: str
    attachments: tuple[Attachment, ...]
    identity: tuple[int, ...]
    """Of the files as they are now: who was made with others of the same names does not serve."""
