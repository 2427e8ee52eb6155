"""Volumes, caches and allow_sources in a policy file: read, written, and every error told."""

from __future__ import annotations

import pytest

from sandboxd.compile.load import load
from sandboxd.compile.render import render
from sandboxd.errors import PolicyErrors
from sandboxd.policy import Policy

WRONG = {
    '[[mounts]]\ntype = "volume"\ntarget = "/a"': "p.toml:1: mounts[0]: a volume without a name"
    ' (write name = "...")',
    '[[mounts]]\ntype = "volume"\nname = "v"\ntarget = "/a"\nsize = 1': "p.toml:5: mounts[0].size"
    ": a volume has no size (it was said when the volume was made)",
    '[[mounts]]\ntype = "cache"\nname = "c"\ntarget = "/a"\nwritable = true': "p.toml:5:"
    " mounts[0].writable: a cache has no writable (lock says who may write)",
    '[[mounts]]\nsource = "/b"\ntarget = "/a"\nlock = "copy"': "p.toml:4: mounts[0].lock: a bind"
    ' has no lock (leave it out, or write type = "cache")',
    '[[mounts]]\nsource = "/b"\ntarget = "/a"\nname = "v"': "p.toml:4: mounts[0].name: a bind has"
    ' no name (leave it out, or write type = "volume")',
    'allow_sources = ["srv"]': "p.toml:1: allow_sources[0]: 'srv' is not absolute (a path starts"
    " with /)",
    'allow_sources = ["/srv/../etc"]': "p.toml:1: allow_sources[0]: '/srv/../etc' is not plain"
    " (no //, no . and .., no / at the end)",
}


def policy(text: str) -> Policy:
    return load("p", lambda _: ("p.toml", text))


@pytest.mark.parametrize("text", WRONG)
def test_every_error_names_its_place_and_the_way_out(text: str) -> None:
    with pytest.raises(PolicyErrors) as caught:
        policy(text)
    assert str(caught.value) == WRONG[text]


def test_they_are_read_and_written() -> None:
    found = policy(
        'allow_sources = ["/srv", "/opt/x"]\n'
        'mounts = [{type = "volume", name = "v", target = "/v", writable = true},'
        ' {type = "cache", name = "c", target = "/c", lock = "copy", wait = "2min", size = "1G"}]'
    )
    assert found.allow_sources == ("/srv", "/opt/x")
    volume, cache = found.mounts
    assert (volume.asked, volume.writes, volume.is_copy) == ("volume v", True, False)
    assert (cache.asked, cache.writes, cache.is_copy) == ("cache c", False, True)
    assert (cache.wait, cache.size) == (120.0, 1 << 30)
    again = policy(render(found))
    assert (again.mounts, again.allow_sources) == (found.mounts, found.allow_sources)


def test_who_extends_adds_to_what_is_allowed() -> None:
    files = {"base": 'allow_sources = ["/srv"]', "p": 'extends = "base"\nallow_sources = ["/opt"]'}
    found = load("p", lambda name: (f"{name}.toml", files[name]))
    assert found.allow_sources == ("/srv", "/opt")
    files["p"] = 'extends = "base"\nallow_sources = ["!reset", "/opt"]'
    assert load("p", lambda name: (f"{name}.toml", files[name])).allow_sources == ("/opt",)
    assert policy("").allow_sources == ("/",)
