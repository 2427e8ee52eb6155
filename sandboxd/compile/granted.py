"""What a bundle gets of what it asks for: a policy's sections, changed in one direction only."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import msgspec

from sandboxd.compile.document import Node
from sandboxd.policy import Mount, Policy, Section

_MOST = MappingProxyType(
    {"open_files": (1 << 31) - 1, "processes": (1 << 31) - 1, "cpus": 65536, "cpu_time": 10**9}
)
"""What is more is as good as no limit, and too much for the kernel's own types."""
Resolve = Callable[[str], str | None]
"""A path that a bundle names -> the real one, if that is in the bundle; else None."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Around:
    """What there is around a bundle."""

    resolve: Resolve
    shown: Collection[str] = ()
    """Places where the operator mounts something, whatever the bundle says."""
    own_root: bool = True
    """Whether the root is the bundle's; else it is one that the operator names."""
    terminal: bool = True
    """Whether somebody is there to use a terminal."""


@dataclass
class Granted:
    """A policy, what a bundle changes in it, and what it asks for in vain."""

    policy: Policy
    around: Around
    changes: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Section -> key -> value."""
    mounts: list[Mount] = field(default_factory=list)
    origins: dict[str, str] = field(default_factory=dict)
    ignored: list[tuple[str, str]] = field(default_factory=list)

    def ignore(self, node: Node, why: str) -> None:
        self.ignored.append((node.where, why))

    def ignore_all(self, node: Node | None, whys: dict[str, str], *known: str) -> None:
        """Tells of the keys that have a value and that nothing is done about."""
        for key in node.present() if node is not None else ():
            if key not in known and node is not None and node.below(key).value not in ({}, [], ""):
                self.ignore(node.below(key), whys.get(key, "not known"))

    def set(self, section: str, key: str, value: object, node: Node) -> None:
        self.changes.setdefault(section, {})[key] = value
        self.origins[f"{section}.{key}"] = node.where

    def lower(self, name: str, value: float, node: Node) -> None:
        """A limit, if it is below what counts already."""
        if value <= 0:
            self.ignore(node, "a limit is above 0")
            return
        value = min(value, _MOST.get(name, value))
        most = getattr(self.policy.limits, name)
        if most is not None and value > most:
            self.ignore(node, f"{self.policy.name} allows {most:g}")
        elif value <= self.changes.get("limits", {}).get(name, value):
            self.set("limits", name, value, node)

    def result(self, **more: Section | tuple[Mount, ...]) -> Policy:
        """The policy with all that was granted."""
        sections: dict[str, Any] = {
            section: msgspec.structs.replace(getattr(self.policy, section), **changes)
            for section, changes in self.changes.items()
        }
        name, origins = f"{self.policy.name}+config.json", self.policy.origins | self.origins
        every = (*self.policy.mounts, *self.mounts)
        return msgspec.structs.replace(
            self.policy, name=name, origins=origins, mounts=every, **sections, **more
        )
