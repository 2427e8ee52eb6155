"""The file system a job sees: a template built once per tenant, and what each sandbox adds.

Two shapes. A read-only root of the host's /usr is shared: the template *is* the root, and a
sandbox mounts its private /tmp, /box, /dev/shm and /proc over a copy of the mount tree. Any other
root (a directory, or a writable one) is put together per sandbox from the template's pieces, with
an overlay whose upper layer lies on the sandbox's own tmpfs, and becomes / by pivot_root(2).

All that a sandbox may write lies in one area, a tmpfs or a directory, so limits.disk and
limits.inodes hold for the sum.
"""

from __future__ import annotations

from sandboxd import plan
from sandboxd.compile import etc, proc
from sandboxd.compile.pieces import LOWER, MERGED, Piece, lower_places, lowers, of_host
from sandboxd.compile.pieces import pieces as pieces_of
from sandboxd.errors import HostError
from sandboxd.host import Host
from sandboxd.plan import SAFE, Attributes, Step
from sandboxd.policy import Mount, Policy

NEW = "/tmp"
"""Where the template is put together: hidden by then is only the host's /tmp, whose mounts were
taken before. In a sandbox the private tmpfs lies there until the end."""
WORK = "/box"
EMPTY = "/mnt"
PRIVATE = (WORK, "/tmp", "/dev/shm")
"""Places of a sandbox's own, which hide what the template has there."""
SHELF = "/.mounts"
"""Where binds below a private place wait in the template, by number, for each sandbox."""
STORE = f"{WORK}/builds"
"""Where the template has the store of builds: below what each sandbox hides at once."""
NOTHING = f"{SHELF}/nothing"
"""An empty directory, where the template has an image's own EMPTY."""
FILES = "files"
DIRS = ("usr", "etc", "dev", "dev/shm", "proc", "tmp", "box", "run", "var", "home", "root", "mnt")
LINKS = (
    ("fd", "/proc/self/fd"), ("stdin", "/proc/self/fd/0"), ("stdout", "/proc/self/fd/1"),
    ("stderr", "/proc/self/fd/2"), ("core", "/proc/kcore"),
)  # fmt: skip


def is_shared(policy: Policy, host: Host) -> bool:
    """Whether the template itself serves as every job's root.

    The layers of an image can be put together in the template as well, by one overlay for all. But
    then nothing can be made in it to mount on, so mounts outside of the private places want a root
    for each sandbox.
    """
    if policy.root.writable:
        return False
    if of_host(policy):
        return True
    on_top = any(not _is_private(mount.target) for mount in policy.mounts)
    wanted = policy.root.driver in ("auto", "kernel")
    return bool(policy.root.image) and not on_top and wanted and host.overlay


def driver(policy: Policy, host: Host) -> str:
    """How the root is layered: "shared", "kernel", "fuse" or "tmpfs"; HostError if impossible."""
    if is_shared(policy, host):
        return "shared"
    how = _layered_by(policy, host)
    if how == "tmpfs" and len(lowers(policy, host)) > 1:
        raise HostError("overlay", f"{policy.origin('root.image')}: its layers need an overlay: "
                        + host.fault_notes.get("overlay", "the policy wants none"),
                        hint="install fuse-overlayfs, or flatten the image")  # fmt: skip
    return how


def _layered_by(policy: Policy, host: Host) -> str:
    wanted = policy.root.driver
    where = policy.origin("root.driver")
    if wanted == "kernel" and not host.overlay:
        raise HostError("overlay", f"{where}: kernel overlayfs does not work here: "
                        + host.fault_notes.get("overlay", "not probed"),
                        hint='use driver = "auto"')  # fmt: skip
    if wanted == "fuse" and not host.fuse_overlayfs:
        raise HostError("fuse", f"{where}: fuse-overlayfs does not work here: "
                        + host.fault_notes.get("fuse_overlayfs", "not probed"),
                        hint="install fuse-overlayfs and make /dev/fuse readable")  # fmt: skip
    if wanted != "auto":
        return wanted
    return "kernel" if host.overlay else "fuse" if host.fuse_overlayfs else "tmpfs"


def is_received(policy: Policy, host: Host) -> bool:
    """Whether a sandbox's area must be made outside of it, by a sidecar: else it is its own tmpfs,
    which nobody can look into afterwards.
    """
    return policy.root.upper == "directory" or driver(policy, host) == "fuse"


def layered(policy: Policy) -> str:
    """Which part of the root the overlay is, as a path below it: "usr", or "" for all of it."""
    return "usr" if of_host(policy) else ""


# -- the template ----------------------------------------------------------------------------


def template(policy: Policy, host: Host) -> tuple[Step, ...]:
    """The steps that build the root all sandboxes of a tenant start from."""
    if policy.root.image and is_shared(policy, host):
        return _image_template(policy, host)
    pieces = pieces_of(policy, host)
    why = policy.origin("root.source")
    steps = [_open(slot, piece) for slot, piece in enumerate(pieces)]
    steps += _open_store(host, len(pieces))
    steps.append(plan.Tmpfs(target=NEW, size=4 << 20, why=why))
    steps += [plan.MakeDir(path=f"{NEW}/{name}", why=why) for name in DIRS]
    if of_host(policy):
        steps += _host_links(NEW, policy, host, why)
    else:
        steps.append(plan.MakeDir(path=NEW + LOWER, why=why))
    network = etc.of_template(policy, host.place)
    steps += etc.files(NEW, policy, network, whole=of_host(policy))
    steps += [plan.Symlink(path=f"{NEW}/dev/{name}", to=to, why=why) for name, to in LINKS]
    for slot, piece in enumerate(pieces):
        steps += _placed(slot, piece, NEW)
    for mount in _tmpfs_mounts(policy):
        if not _is_private(mount.target):
            steps += _mount_point(NEW + mount.target, True, policy.origin("mounts"))
    if host.inputs is not None:
        steps += [plan.MakeDir(path=NEW + STORE, why=FILES), _attach_store(host, len(pieces), NEW)]
    steps += [
        plan.Proc(target=f"{NEW}/proc", why="needed to mount /proc in sandboxes"),
        plan.Pivot(root=NEW, why=why),
        plan.Restrict(path="/", why="a writable template would join the jobs"),
    ]
    return tuple(steps)


def _image_template(policy: Policy, host: Host) -> tuple[Step, ...]:
    """The same with the root put together of an image's layers, once for all sandboxes.

    One overlay, and all of it read-only: on top what must be ours, whatever the image has there;
    at the bottom the places that a root is expected to have. No link of the image's is followed:
    what is mounted on are directories of the top.
    """
    pieces = pieces_of(policy, host)
    why = policy.origin("root.image")
    top, bottom, root = f"{NEW}/top", f"{NEW}/bottom", f"{NEW}/root"
    steps = [_open(slot, piece) for slot, piece in enumerate(pieces)]
    steps += _open_store(host, len(pieces))
    steps.append(plan.Tmpfs(target=NEW, size=4 << 20, why=why))
    steps += [plan.MakeDir(path=path, why=why) for path in (top, bottom, root, NEW + LOWER)]
    ours = ["etc", "dev", "dev/shm", "proc", "tmp", "box", SHELF[1:], NOTHING[1:]]
    ours += [STORE[1:]] if host.inputs is not None else []
    steps += [plan.MakeDir(path=f"{top}/{name}", why=why) for name in ours]
    steps += [plan.MakeDir(path=f"{bottom}/{name}", why=why) for name in DIRS if name not in ours]
    steps += etc.files(top, policy, etc.of_template(policy, host.place), whole=False)
    steps += [plan.Symlink(path=f"{top}/dev/{name}", to=to, why=why) for name, to in LINKS]
    above = [(slot, piece) for slot, piece in enumerate(pieces) if not piece.layered]
    for slot, piece in enumerate(pieces):
        if piece.layered:
            steps.append(plan.MakeDir(path=NEW + piece.target, why=why))
            steps.append(_attach(slot, piece, NEW + piece.target))
    for slot, piece in above:
        steps += _mount_point(top + _template_place(piece, slot), piece.directory, piece.why)
    layers = tuple(NEW + place for place in lower_places(policy, host))
    steps.append(plan.Overlay(target=root, lowers=(top, *layers, bottom), why=why))
    for slot, piece in above:
        steps.append(_attach(slot, piece, root + _template_place(piece, slot)))
    if host.inputs is not None:
        steps.append(_attach_store(host, len(pieces), root))
    steps += [
        plan.Proc(target=f"{root}/proc", why="needed to mount /proc in sandboxes"),
        plan.Pivot(root=root, why=why),
        plan.Restrict(path="/", why="a writable template would join the jobs"),
    ]
    return tuple(steps)


def _open(slot: int, piece: Piece) -> Step:
    return plan.OpenTree(source=piece.source, slot=slot, optional=piece.optional,
                         recursive=piece.recursive, strict=piece.strict, why=piece.why)  # fmt: skip


def _placed(slot: int, piece: Piece, root: str) -> list[Step]:
    """A piece at its place in the template, and what is needed to mount it on."""
    place = _template_place(piece, slot)
    steps: list[Step] = []
    if piece.mounted and not _is_private(piece.target):
        steps.append(plan.MountPoint(root=root, path=piece.target, directory=piece.directory,
                                     why=piece.why))  # fmt: skip
        if place == piece.target:
            return [*steps, _attach(slot, piece, place, root)]
    steps += _mount_point(root + place, piece.directory, piece.why)
    return [*steps, _attach(slot, piece, root + place)]


def _attach(slot: int, piece: Piece, target: str, root: str = "") -> Step:
    return plan.Attach(
        slot=slot, source=piece.source, target=target, why=piece.why, root=root,
        attributes=piece.attributes, optional=piece.optional, recursive=piece.recursive,
    )  # fmt: skip


def _open_store(host: Host, slot: int) -> list[Step]:
    if host.inputs is None:
        return []
    return [plan.OpenTree(source=host.inputs.store, slot=slot, recursive=False, why=FILES)]


def _attach_store(host: Host, slot: int, root: str) -> Step:
    assert host.inputs is not None
    return plan.Attach(slot=slot, source=host.inputs.store, target=root + STORE, why=FILES,
                       recursive=False)  # fmt: skip


def _is_private(target: str) -> bool:
    return target.startswith(tuple(f"{place}/" for place in PRIVATE)) or target in PRIVATE


def _template_place(piece: Piece, slot: int) -> str:
    on_shelf = _is_private(piece.target) or piece.copied
    return f"{SHELF}/{slot}" if on_shelf else piece.target


def _host_links(root: str, policy: Policy, host: Host, why: str) -> list[Step]:
    links = [(name, host.root_links[name]) for name in MERGED if name in host.root_links]
    links += [(name, WORK) for name in policy.root.aliases]
    return [plan.Symlink(path=f"{root}/{name}", to=to.lstrip("/"), why=why) for name, to in links]


def _mount_point(path: str, directory: bool, why: str) -> list[Step]:
    """Whatever is missing of a path to mount on; what is there already stays as it is."""
    parents = path.split("/")
    above = ["/".join(parents[:count]) for count in range(3, len(parents))]
    steps: list[Step] = [plan.MakeDir(path=parent, why=why) for parent in above]
    last = plan.MakeDir(path=path, why=why) if directory else plan.MakeFile(path=path, why=why)
    return [*steps, last]


# -- a sandbox -------------------------------------------------------------------------------


def sandbox(policy: Policy, host: Host, received: tuple[str, ...]) -> tuple[Step, ...]:
    """The steps each sandbox adds: its own writable places, its /proc, its layered root.

    `received` names the descriptors that init gets, in their order.
    """
    own = not is_shared(policy, host)
    root = f"{NEW}/root" if own else ""
    steps = _private_area(policy, own, received)
    if own:
        steps += _layers(policy, host, root, received)
    elif host.place is not None:
        steps += etc.over(policy, host.place, f"{NEW}/etc")
    steps += [*_copies(policy, host, root), *_inputs(host)]
    shared = policy.origin("limits.disk")
    within = host.inputs is not None or any(mount.is_copy for mount in policy.mounts)
    steps += [
        plan.Bind(source=f"{NEW}/box", target=f"{root}{WORK}", attributes=SAFE, why=shared,
                  recursive=within),
        plan.Bind(source=f"{NEW}/shm", target=f"{root}/dev/shm", why=shared, recursive=within,
                  attributes=SAFE | Attributes.NOEXEC),
    ]  # fmt: skip
    for number, mount in enumerate(_tmpfs_mounts(policy)):
        if not _is_private(mount.target):
            steps += _tmpfs_mount(root, number, mount, policy)
    empty = NOTHING if policy.root.image and not own else EMPTY
    steps += proc.steps(policy, host, root, empty)
    steps.append(plan.Bind(source=f"{NEW}/tmp", target=f"{root}/tmp", attributes=SAFE, why=shared,
                           recursive=within))  # fmt: skip
    steps += _mounts_in_private(policy, host, root)
    if own:
        if not policy.root.writable:
            steps.append(plan.Restrict(path=root, why=policy.origin("root.writable")))
        steps.append(plan.Pivot(root=root, why=policy.origin("root")))
    return tuple(steps)


def _inputs(host: Host) -> list[Step]:
    """What is given by reference, in the working directory that is about to take its place.

    It hides the store then. The directories on the way are the job's own, as those of files that
    are copied in.
    """
    steps: list[Step] = []
    made: set[str] = set()
    for one in host.inputs.attachments if host.inputs is not None else ():
        parts = one.target.split("/")
        above = ["/".join(parts[:count]) for count in range(1, len(parts))]
        folders = [folder for folder in above if folder not in made]
        made |= {*folders}
        steps += [plan.MakeDir(path=f"{NEW}{WORK}/{folder}", for_job=True, why=FILES)
                  for folder in folders]  # fmt: skip
        place = f"{NEW}{WORK}/{one.target}"
        steps += [
            plan.MakeDir(path=place, why=FILES) if one.directory
            else plan.MakeFile(path=place, why=FILES),
            plan.Bind(source=f"{STORE}/{one.source}", target=place, why=FILES),
        ]  # fmt: skip
    return steps


def _copies(policy: Policy, host: Host, root: str) -> list[Step]:
    """Caches of which each sandbox has a copy: an overlay whose changes lie on its own tmpfs.

    Below a private place it is mounted in the area that is about to be shown there.
    """
    steps: list[Step] = []
    for slot, piece in enumerate(pieces_of(policy, host)):
        if not piece.copied:
            continue
        why, area = piece.why, f"{NEW}/copy{slot}"
        merged = f"{area}/merged"
        steps += [plan.MakeDir(path=path, why=why) for path in (area, f"{area}/work")]
        steps.append(plan.MakeDir(path=f"{area}/upper", for_job=True, why=why))
        private = next(
            (place for place in PRIVATE if f"{piece.target}/".startswith(f"{place}/")), ""
        )
        if private:
            inner = piece.target.removeprefix(private)
            merged = f"{NEW}/{private.rpartition('/')[2]}{inner}"
            steps += _mount_point(merged, True, why)
        else:
            steps.append(plan.MakeDir(path=merged, why=why))
        steps.append(plan.Overlay(target=merged, lowers=(f"{SHELF}/{slot}",), why=why,
                                  upper=f"{area}/upper", work=f"{area}/work"))  # fmt: skip
        if Attributes.NOEXEC in piece.attributes:
            steps.append(plan.Restrict(path=merged, attributes=SAFE | Attributes.NOEXEC, why=why))
        if not private:
            steps.append(plan.Bind(source=merged, target=piece.target, root=root or "/", why=why,
                                   attributes=Attributes.NONE))  # fmt: skip
    return steps


def _mounts_in_private(policy: Policy, host: Host, root: str) -> list[Step]:
    """Mounts of the policy below a private place: last, or it would hide them."""
    steps: list[Step] = []
    for mount in _tmpfs_mounts(policy):
        if _is_private(mount.target):
            target, why = root + mount.target, policy.origin("mounts")
            attributes = SAFE if mount.exec else SAFE | Attributes.NOEXEC
            *above, _ = _mount_point(target, True, why)
            steps += [*above, plan.MakeDir(path=target, mode=0o1777, why=why)]
            if mount.size is None:  # the private place is a tmpfs already
                step = plan.Bind(source=target, target=target, attributes=attributes, why=why)
                steps.append(step)
            else:
                steps.append(
                    plan.Tmpfs(target=target, size=mount.size, mode=0o1777, inodes=mount.inodes,
                               attributes=attributes, why=why)
                )  # fmt: skip
    for slot, piece in enumerate(pieces_of(policy, host)):
        if _is_private(piece.target) and not piece.copied:
            steps += _mount_point(root + piece.target, piece.directory, piece.why)
            steps.append(
                plan.Bind(source=f"{SHELF}/{slot}", target=root + piece.target, recursive=True,
                          attributes=Attributes.NONE, why=piece.why)
            )  # fmt: skip
    return steps


def _private_area(policy: Policy, layered: bool, received: tuple[str, ...]) -> list[Step]:
    limits, why = policy.limits, policy.origin("limits.disk")
    area: Step = plan.Tmpfs(target=NEW, size=limits.disk, inodes=limits.inodes, why=why)
    if "area" in received:
        what = "a directory" if policy.root.upper == "directory" else "a tmpfs"
        area = plan.AttachReceived(descriptor=received.index("area"), target=NEW, source=what,
                                   why=policy.origin("root.upper"))  # fmt: skip
    steps: list[Step] = [
        area,
        plan.MakeDir(path=f"{NEW}/box", for_job=True, why=why),
        plan.MakeDir(path=f"{NEW}/tmp", mode=0o1777, why=why),
        plan.MakeDir(path=f"{NEW}/shm", mode=0o1777, why=why),
    ]
    if layered:
        steps.append(plan.MakeDir(path=f"{NEW}/root", for_job=policy.root.writable, why=why))
        names = ("upper", "work", "upper/usr", "work/usr")
        steps += [plan.MakeDir(path=f"{NEW}/{name}", why=why) for name in names]
    return steps


def _layers(policy: Policy, host: Host, root: str, received: tuple[str, ...]) -> list[Step]:
    """Put the layered root together below `root`, which becomes a mount of its own."""
    why = policy.origin("root")
    how = driver(policy, host)
    steps: list[Step] = []
    lower = lower_places(policy, host)
    if of_host(policy):
        steps.append(plan.Bind(source=root, target=root, attributes=SAFE, why=why))
        for name in DIRS:
            own = policy.root.writable and name not in ("usr", "dev", "dev/shm", "proc")
            steps.append(plan.MakeDir(path=f"{root}/{name}", for_job=own, why=why))
        # First: the sidecar's descriptor is closed with the strays of the next file written.
        steps += _layer(how, lower, root, received, policy)
        steps += _host_links(root, policy, host, why)
        network = etc.network_files(policy, host.place)
        steps += etc.files(root, policy, network, whole=of_host(policy))
    else:
        steps += _layer(how, lower, root, received, policy)
        if how != "tmpfs":
            steps += [plan.MakeDir(path=f"{root}/{name}", why=why) for name in DIRS]
            network = etc.network_files(policy, host.place)
            steps += etc.files(root, policy, network, whole=of_host(policy), anew=True)
    steps.append(plan.Bind(source="/dev", target=f"{root}/dev", recursive=True, why=why,
                           attributes=Attributes.NONE))  # fmt: skip
    for piece in pieces_of(policy, host):
        if piece.layered or piece.target.startswith("/dev/") or _is_private(piece.target):
            continue
        steps += _shown(piece, root)
    return steps


def _shown(piece: Piece, root: str) -> list[Step]:
    """A piece of the template's in the root that was put together for one sandbox."""
    place, why = piece.target, piece.why
    if not piece.mounted:
        return [
            *_mount_point(root + place, piece.directory, why),
            plan.Bind(source=place, target=root + place, recursive=True, why=why,
                      attributes=Attributes.NONE),
        ]  # fmt: skip
    steps: list[Step] = [plan.MountPoint(root=root, path=place, directory=piece.directory, why=why)]
    if not piece.copied:
        steps.append(plan.Bind(source=place, target=place, root=root, recursive=True, why=why,
                               attributes=Attributes.NONE))  # fmt: skip
    return steps


def _layer(
    how: str, lower: tuple[str, ...], root: str, received: tuple[str, ...], policy: Policy
) -> list[Step]:
    why = policy.origin("root")
    if policy.root.upper == "directory":
        why += "; not every file system can have an upper: SANDBOXD_UPPERS=DIR names another place"
    suffix = f"/{name}" if (name := layered(policy)) else ""
    target = root + suffix
    if how == "kernel":
        return [
            plan.Overlay(target=target, lowers=lower, upper=f"{NEW}/upper{suffix}",
                         work=f"{NEW}/work{suffix}", why=why)
        ]  # fmt: skip
    if how == "fuse":
        source = f"fuse-overlayfs over {':'.join(lower)}"
        return [plan.AttachReceived(descriptor=received.index("fuse"), target=target,
                                    source=source, why=why)]  # fmt: skip
    return [plan.Bind(source=lower[0], target=target, recursive=True, why=why)]


def _tmpfs_mounts(policy: Policy) -> list[Mount]:
    return [mount for mount in policy.mounts if mount.type == "tmpfs"]


def _tmpfs_mount(root: str, number: int, mount: Mount, policy: Policy) -> list[Step]:
    why = policy.origin("mounts")
    attributes = SAFE if mount.exec else SAFE | Attributes.NOEXEC
    if mount.size is not None and not root:
        return [plan.Tmpfs(target=mount.target, size=mount.size, mode=0o1777, inodes=mount.inodes,
                           attributes=attributes, why=why)]  # fmt: skip
    area = f"{NEW}/mount{number}"
    steps: list[Step] = [plan.MakeDir(path=area, mode=0o1777, why=why)]
    if mount.size is not None:
        steps.append(plan.Tmpfs(target=area, size=mount.size, mode=0o1777, inodes=mount.inodes,
                                attributes=attributes, why=why))  # fmt: skip
    if root:
        steps.append(plan.MountPoint(root=root, path=mount.target, directory=True, why=why))
    steps.append(plan.Bind(source=area, target=mount.target, root=root, attributes=attributes,
                           why=why))  # fmt: skip
    return steps
