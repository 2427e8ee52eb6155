"""Who is where in the world of tests/network/world.py."""

from __future__ import annotations

OUTSIDE = (("198.51.100.1", 24), ("2001:db8:1::1", 64))
"""The Internet's end of the cable."""
HOST = (("198.51.100.2", 24), ("2001:db8:1::2", 64), ("203.0.113.200", 32), ("192.168.5.5", 32))
"""The host's own addresses: where its cable ends, another public one, and one at home."""
NAME_SERVER = ("203.0.113.53", "8.8.8.8")
PORTS = (22, 80, 443, 8443)

PUBLIC, OTHER, PUBLIC6 = "203.0.113.10", "203.0.113.11", "2001:db8:2::10"
PRIVATE, METADATA, METADATA6 = "10.1.0.5", "169.254.169.254", "fd00:ec2::254"
CLOSED = (
    *(PRIVATE, "172.16.9.9", "192.168.7.7", "100.64.3.3", METADATA, "198.18.0.1"),
    *(METADATA6, "fc00::5", "64:ff9b::a01:5", "2002:a01:5::1"),
)
"""Listening, and no part of the public Internet."""
ADDRESSES = (PUBLIC, OTHER, PUBLIC6, "1.1.1.1", *NAME_SERVER, *CLOSED)

NAMES: dict[str, list[str]] = {
    "packages.example.org": [PUBLIC, PUBLIC6],
    "alias.example.org": ["@packages.example.org"],
    "other.example.org": [OTHER],
    "a.mirror.example.net": [OTHER],
    "mirror.example.net": [OTHER],
    "evil.example.com": [OTHER],
    "inside.example.org": [PRIVATE, "192.168.7.7", METADATA, METADATA6, "127.0.0.1", "::1"],
    "to-metadata.example.org": ["@inside.example.org"],
    "mixed.example.org": [PRIVATE, PUBLIC],
    "mapped.example.org": ["::ffff:10.1.0.5", "64:ff9b::a01:5", "2002:a01:5::1"],
    "host.example.org": ["198.51.100.2", "203.0.113.200", "192.168.5.5"],
    "to-evil.example.org": ["@evil.example.com"],
    "loop.example.org": ["@loop.example.org"],
    "many.example.org": [f"203.0.113.{number}" for number in range(1, 200)],
    "silent.example.org": [],
    "torn.example.org": [f"203.0.113.{number}" for number in range(1, 200)],
    "broken.example.org": [],
    "forged.example.org": [PUBLIC],
    "short.example.org": [f"1 {OTHER}"],
}
