"""What of the host is shown in a root: its own directories, an image's layers, devices, mounts."""

from __future__ import annotations

import msgspec

from sandboxd.compile import sources
from sandboxd.errors import HostError
from sandboxd.host import Host
from sandboxd.plan import READ_ONLY, SAFE, Attributes
from sandboxd.policy import Policy

LOWER = "/lower"
MERGED = ("bin", "sbin", "lib", "lib64", "lib32", "libx32")


class Piece(msgspec.Struct, frozen=True):
    """A host path that is shown in the root."""

    source: str
    target: str
    attributes: Attributes
    directory: bool
    why: str
    optional: bool = False
    recursive: bool = True
    layered: bool = False
    """Shown through the overlay, where there is one."""
    strict: bool = False
    """Opened through no link."""
    mounted: bool = False
    """A mount of the policy's: its place is looked up in the root, whose links may be anybody's."""
    copied: bool = False
    """Seen by each sandbox through an overlay of its own."""


def of_host(policy: Policy) -> bool:
    """Whether the root is made of the host's own directories."""
    return policy.root.source == "host" and not policy.root.image


def lowers(policy: Policy, host: Host) -> tuple[str, ...]:
    """The directories of the host that a layered root overlays, the topmost first."""
    if policy.root.image:
        if host.image is None:
            raise HostError("image", f"{policy.origin('root.image')}: image {policy.root.image!r} "
                            "was not looked up")  # fmt: skip
        return host.image.layers
    if policy.root.source == "host":
        return ("/usr",)
    return (host.sources.get(policy.root.source, policy.root.source),)


def lower_places(policy: Policy, host: Host) -> tuple[str, ...]:
    """Where they are in the template."""
    if policy.root.image:
        return tuple(f"{LOWER}/{number}" for number in range(len(lowers(policy, host))))
    return ("/usr",) if policy.root.source == "host" else (LOWER,)


def pieces(policy: Policy, host: Host) -> list[Piece]:
    why = policy.origin("root.source")
    found: list[Piece] = []
    if of_host(policy):
        roots = ["usr", *(name for name in MERGED if name in host.root_dirs)]
        found += [
            Piece(f"/{name}", f"/{name}", READ_ONLY, True, why, layered=name == "usr")
            for name in roots
        ]
        found += [
            Piece(f"/etc/{name}", f"/etc/{name}", READ_ONLY, host.etc_entries[name] == "dir",
                   policy.origin("root.etc"))
            for name in policy.root.etc
            if name in host.etc_entries
        ]  # fmt: skip
    else:
        whole = not policy.root.image  # a layer is one directory, a root may be several mounts
        strict = whole and sources.restricted(host)
        found += [
            Piece(source, place, READ_ONLY, True, why, recursive=whole, layered=True,
                   strict=strict)
            for source, place in zip(lowers(policy, host), lower_places(policy, host), strict=True)
        ]  # fmt: skip
    # Read-only: a device can be written through all the same, but its times are the host's.
    device = Attributes.RDONLY | Attributes.NOSUID | Attributes.NOEXEC
    found += [
        Piece(f"/dev/{name}", f"/dev/{name}", device, False, policy.origin("devices.allow"),
               recursive=False)
        for name in policy.devices.allow
    ]  # fmt: skip
    for number, mount in enumerate(policy.mounts):
        if mount.type != "tmpfs":
            attributes = SAFE if mount.writes else READ_ONLY
            attributes |= Attributes.NONE if mount.exec else Attributes.NOEXEC
            found.append(
                Piece(sources.real(mount, host), mount.target, attributes,
                       mount.source not in host.files, policy.origin(f"mounts[{number}]"),
                       mount.optional, mounted=True, copied=mount.is_copy,
                       strict=mount.type != "bind" or sources.restricted(host))
            )  # fmt: skip
    return found
