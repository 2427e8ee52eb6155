"""`sandboxd image`: images that programs can be run in: taken in, listed, looked after, removed."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from sandboxd.cli import subcommand
from sandboxd.cli.main import say
from sandboxd.cli.quantities import count, size
from sandboxd.errors import HostError, ImageError

if TYPE_CHECKING:
    from sandboxd.images.importing import Imported
    from sandboxd.images.records import ImageRecord
    from sandboxd.images.store import Store
    from sandboxd.images.unpacking import Limits
    from sandboxd.images.upkeep import Collected
    from sandboxd.plan import IdMap

_DESCRIPTION = """\
Images are root file systems made of layers: an OCI layout, what `docker save` writes, or a plain
tar archive. Each layer is checked, unpacked once and shared by all images that have it. No daemon
and no root is needed."""
_EXAMPLE = """\
examples:
  docker save debian:12 | sandboxd image import -
  sandboxd image import rootfs.tar.gz --name mine
  sandboxd run --image mine -- /bin/sh -c 'echo hello'

`sandboxd image COMMAND --help` says more about each."""
_IMPORT = """\
Takes an image in: an OCI layout (a directory or a tar archive), what `docker save` writes, or any
other tar archive as an image of one layer; plain or compressed by gzip, zstd, xz or bzip2; `-` is
stdin. Nothing is visible before every digest is right. Device nodes, set-user-id bits and foreign
attributes are left out and counted; archives that mean harm are refused."""
_PULL = """\
Fetches an image from the registry HOST, by skopeo if that is installed, else by sandboxd's own
client, and takes it in as `import` does. Layers that are there already are not fetched. Plain HTTP
is spoken with this machine only; credentials are those of `podman login` and `docker login`."""
_BUILD = """\
Makes an image of Debian packages by mmdebstrap, without root: from this machine's package sources
where SUITE is its own, else from Debian's. It takes a minute or two."""
_LS = "Lists images: name, id, layers, size, and when they were imported."
_INSPECT = "Prints all that is known about an image as one JSON object."
_RM = """\
Forgets images and removes the layers that no other has. A layer that a running sandbox uses stays
until `gc`."""
_GC = "Removes layers that no image has, and what interrupted imports left."
_VERIFY = """\
Reads every file of the images' layers and compares with what was unpacked: contents, owners, modes,
times, attributes. Exit status 1 if something differs. Without NAME all images."""
_MIB = 1 << 20


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command and its own commands to the command line."""
    parser = subparsers.add_parser(
        "image",
        help="import, list, check and remove images",
        description=_DESCRIPTION,
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    _add_sources(commands)
    _add_upkeep(commands)


def _add_sources(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    one = subcommand.add(
        commands, "image", "import", "take an image in", _IMPORT, "rootfs.tar.gz --name mine"
    )
    one.add_argument("path", metavar="PATH", help="a directory, an archive, or - for stdin")
    one.add_argument("--name", help="its name, NAME[:TAG] (default: the one it brings)")
    _add_limits(one)
    one.set_defaults(func=import_)
    one = subcommand.add(
        commands, "image", "pull", "fetch an image from a registry", _PULL, "HOST/debian:13"
    )
    one.add_argument("reference", metavar="HOST/NAME[:TAG]", help="or HOST/NAME@DIGEST")
    one.add_argument("--name", help="its name here (default: the reference)")
    one.add_argument(
        "--client", choices=("auto", "skopeo", "own"), default="auto",
        help="who fetches it: skopeo where it is installed (auto)",
    )  # fmt: skip
    _add_limits(one)
    one.set_defaults(func=pull)
    text = "c-lab --include gcc,libc6-dev,make"
    one = subcommand.add(
        commands, "image", "build-debian", "make an image of Debian packages", _BUILD, text
    )
    one.add_argument("name", metavar="NAME", help="its name")
    one.add_argument(
        "--include", action="append", default=[], metavar="PACKAGE,...",
        help="packages on top of the essential ones and apt",
    )  # fmt: skip
    one.add_argument(
        "--variant", default="minbase", metavar="VARIANT",
        help="what else, as mmdebstrap calls it: minbase (default), extract for nothing, ...",
    )  # fmt: skip
    one.add_argument("--suite", metavar="SUITE", help="e.g. trixie (default: the machine's own)")
    _add_limits(one)
    one.set_defaults(func=build_debian)


def _add_upkeep(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    one = subcommand.add(commands, "image", "ls", "list images", _LS, "--json")
    one.add_argument("--json", action="store_true", help="print one JSON object")
    one.set_defaults(func=ls)
    one = subcommand.add(commands, "image", "inspect", "say all about an image", _INSPECT, "mine")
    one.add_argument("name", metavar="NAME", help="a name, or 7 or more digits of the id")
    one.set_defaults(func=inspect)
    one = subcommand.add(commands, "image", "rm", "remove images", _RM, "mine")
    one.add_argument("names", metavar="NAME", nargs="+", help="a name, or digits of the id")
    one.set_defaults(func=rm)
    subcommand.add(
        commands, "image", "gc", "remove layers that no image has", _GC, ""
    ).set_defaults(func=gc)
    one = subcommand.add(
        commands, "image", "verify", "find layers that were changed", _VERIFY, "mine"
    )
    one.add_argument("names", metavar="NAME", nargs="*", help="a name, or digits of the id")
    one.set_defaults(func=verify)


def _add_limits(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--max-size", type=size, metavar="SIZE", help="of a layer when unpacked (default: 16G)"
    )
    parser.add_argument(
        "--max-entries", type=count, metavar="N", help="in a layer (default: 524288)"
    )


def _limits(args: argparse.Namespace) -> Limits:
    from sandboxd.images.unpacking import Limits

    given = {"bytes": args.max_size, "entries": args.max_entries}
    return Limits(**{name: int(value) for name, value in given.items() if value is not None})


def _store() -> tuple[Store, IdMap]:
    """The caller's own store, and the ids that sandboxes have here."""
    from sandboxd.compile.idmap import tenant_ids
    from sandboxd.images.store import Store, own_place
    from sandboxd.probe.host import probe

    return Store(own_place()), tenant_ids(probe())


# -- what comes in -----------------------------------------------------------------------------


def import_(args: argparse.Namespace) -> int:
    from sandboxd.images.importing import import_image

    store, ids = _store()
    source = sys.stdin.buffer if args.path == "-" else args.path
    for one in import_image(store, source, args.name, ids, _limits(args)):
        tell(one)
    return 0


def pull(args: argparse.Namespace) -> int:
    import shutil

    from sandboxd.images import registry

    store, ids = _store()
    skopeo = shutil.which("skopeo") if args.client != "own" else None
    if args.client == "skopeo" and skopeo is None:
        raise HostError("skopeo", "skopeo is not installed", hint="--client own does without it")
    what = (store, args.reference, args.name, ids, _limits(args))
    tell(registry.pull_by_skopeo(skopeo, *what) if skopeo else registry.pull(*what))
    return 0


def build_debian(args: argparse.Namespace) -> int:
    from sandboxd.images.debian import VARIANTS, Recipe, build

    store, ids = _store()
    packages = [one for words in args.include for one in words.split(",") if one]
    if args.variant not in VARIANTS:
        raise ImageError(f"--variant {args.variant}: no such variant", hint=", ".join(VARIANTS))
    recipe = Recipe(packages, args.suite, args.variant)
    tell(build(store, args.name, recipe, ids, _limits(args)))
    return 0


def tell(imported: Imported) -> None:
    """A line on stdout about an image that is there now, and on stderr what is not as it was."""
    from sandboxd.judge.text import one_line

    record, layers = imported.record, imported.layers
    total = sum(layer.bytes for layer in layers) / _MIB
    many = f"{len(layers)} layer{'' if len(layers) == 1 else 's'} ({imported.new} new)"
    print(one_line(f"{record.name}  {record.id[7:19]}  {many}, {total:.1f} MiB", 1000))
    for line in left_out(imported):
        say(line)


def left_out(imported: Imported) -> Iterator[str]:
    """What the image has, and its layers here have not."""
    what = {
        "devices": "device nodes were left out",
        "setid": "files lost their set-user-id or set-group-id bit",
        "xattrs": "attributes were left out",
        "owners": "entries have an owner that has no id here: they belong to root instead",
    }
    for name, text in what.items():
        if number := sum(getattr(layer, name) for layer in imported.layers):
            yield f"{number} {text}"
    config = imported.record.config
    if config.user and config.uid is None:
        yield f"its user {config.user!r} is none that can be had: the policy's counts"


# -- what is there -----------------------------------------------------------------------------


def ls(args: argparse.Namespace) -> int:
    from sandboxd.images.store import Store, places
    from sandboxd.judge.text import one_line

    rows = [(store, record) for store in map(Store, places()) for record in store.images()]
    if args.json:
        images = [_json(store, record) for store, record in rows]
        print(json.dumps({"schema": "sandboxd.images/1", "images": images}))
        return 0
    width = max((len(record.name) for _, record in rows), default=0)
    for store, record in rows:
        total = sum(layer["bytes"] for layer in _layers(store, record)) / _MIB
        many = f"{len(record.layers)} layer{'s' if len(record.layers) > 1 else ''}"
        line = f"{record.name:<{width}}  {record.id[7:19]}  {many:>10}"
        print(one_line(f"{line}  {total:9.1f} MiB  {_when(record.imported)}", 1000))
    return 0


def inspect(args: argparse.Namespace) -> int:
    from sandboxd.images.store import Store, places

    for store in map(Store, places()):
        if (record := store.find(args.name)) is not None:
            print(json.dumps(_json(store, record), indent=2))
            return 0
    raise ImageError(f"no image {args.name!r}", hint="`sandboxd image ls` lists them")


def _json(store: Store, record: ImageRecord) -> dict[str, Any]:
    import msgspec

    found: dict[str, Any] = msgspec.to_builtins(record)
    return found | {"store": str(store.place), "layers": _layers(store, record)}


def _layers(store: Store, record: ImageRecord) -> list[dict[str, Any]]:
    """The lowest first; of one that is missing only the digest."""
    import msgspec

    found = []
    for diff_id in record.layers:
        layer = store.layer(diff_id, "")
        known: dict[str, Any] = {"diff_id": diff_id, "bytes": 0, "path": None}
        if layer is not None:
            known = msgspec.to_builtins(layer[1]) | {"path": str(layer[0] / "root")}
        found.append(known)
    return found


def _when(seconds: float) -> str:
    import datetime

    return datetime.datetime.fromtimestamp(seconds).astimezone().isoformat(" ", "minutes")


# -- upkeep ------------------------------------------------------------------------------------


def rm(args: argparse.Namespace) -> int:
    from sandboxd.images.upkeep import remove

    store, ids = _store()
    return _collected(remove(store, args.names, ids))


def gc(args: argparse.Namespace) -> int:
    from sandboxd.images.upkeep import remove

    del args
    store, ids = _store()
    return _collected(remove(store, (), ids))


def _collected(found: Collected) -> int:
    layers = len(found.gone)
    print(f"{layers} layer{'' if layers == 1 else 's'} removed")
    if found.used:
        say(f"{len(found.used)} more in use by running sandboxes: `sandboxd image gc` afterwards")
    return 0


def verify(args: argparse.Namespace) -> int:
    from sandboxd.images import upkeep

    store, ids = _store()
    wrong = 0
    for one in upkeep.verify(store, args.names, ids):
        print(f"{one.image}  {one.layer[7:19]}  {one.problem or 'ok'}")
        wrong += bool(one.problem)
    return 1 if wrong else 0
