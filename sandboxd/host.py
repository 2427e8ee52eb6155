"""What this machine offers: one snapshot, taken by probe/host.py; the plan is made from it."""

from __future__ import annotations

import msgspec

from sandboxd.image import Image
from sandboxd.reference import Inputs


class IdRange(msgspec.Struct, frozen=True, kw_only=True):
    """Subordinate ids of the caller: `count` host ids from `start` on (/etc/subuid)."""

    start: int
    count: int


class CgroupSubtree(msgspec.Struct, frozen=True, kw_only=True):
    """A cgroup v2 directory in which we may make leaves. `controllers` are usable in leaves."""

    path: str
    controllers: frozenset[str] = frozenset()
    has_kill: bool = True
    has_memory_peak: bool = False
    has_pids_peak: bool = False
    room: int | None = None
    """How many cgroups may still be made in it (cgroup.max.descendants); None: no cap is seen."""
    scope: str = ""
    """The systemd scope that it is: gone when nobody holds it, so each runner opens its own, and
    systemd lets the tenants in (cgroup/systemd.py). "" where it is just a directory."""


class Place(msgspec.Struct, frozen=True, kw_only=True):
    """Where a sandbox is in its group: what it is called, and who is at which address."""

    name: str
    domain: str
    hosts: tuple[tuple[str, str], ...]
    shared: bool = False
    """All are in one network namespace."""


class Host(msgspec.Struct, frozen=True, kw_only=True):
    """A snapshot. Everything here was found by doing, or is a plain fact read from the kernel."""

    arch: str
    """"x86_64" or "aarch64"."""
    kernel: str
    uid: int
    gid: int
    cpus: int
    cores: tuple[tuple[int, ...], ...] = ()
    """The CPUs we may use, those of one core together (its hyper-threads), lowest first."""
    page_size: int = 4096
    huge_pages: dict[str, int] = msgspec.field(default_factory=dict)
    """Sizes of huge pages as the hugetlb controller writes them ("2MB") -> pages in the pool."""
    user_namespaces: bool = True
    subuid: IdRange | None = None
    """None: no range, or newuidmap does not work here: single-id mode."""
    subgid: IdRange | None = None
    other_groups: bool = False
    """The caller is in groups besides `gid`; in single-id mode its jobs stay in them."""
    direct_maps: bool = False
    """We may write uid_map with ranges ourselves (root): newuidmap is not needed."""
    overlay: bool = False
    """Kernel overlayfs mounts in a user namespace, with userxattr, on a tmpfs upper."""
    fuse_overlayfs: str | None = None
    """Path of a working fuse-overlayfs."""
    memfd_exec: bool = True
    """A program in a memfd may be executed (vm.memfd_noexec < 2)."""
    landlock: int = 0
    """Landlock ABI; 0 is none."""
    seccomp: bool = True
    time_namespaces: bool = True
    slirp4netns: str | None = None
    """Path of slirp4netns."""
    pasta: str | None = None
    """Path of pasta."""
    tun: bool = False
    """A TAP device can be made in a network namespace of ours (/dev/net/tun)."""
    nftables: bool = False
    """A filter of nftables can be loaded in a network namespace of ours."""
    bridge: bool = False
    """A bridge and pairs of interfaces can be made in network namespaces of ours."""
    net_bytes: bool = False
    """It can have a quota (network.bytes)."""
    net_rate: bool = False
    """It can have a limit of bytes a second, and an interface can be shaped (network.rate)."""
    proc_whole: bool = True
    """A new proc mounts in a user namespace; False where the visible one is partly masked."""
    proc_subset: bool = True
    """The same for a proc with subset=pid."""
    hides_processes: bool = False
    """/proc shows nothing of processes that we may not trace (hidepid): no run can be sampled."""
    cgroup: CgroupSubtree | None = None
    cgroup_why_not: str = ""
    root_links: dict[str, str] = msgspec.field(default_factory=dict)
    """Symbolic links directly below / (bin -> usr/bin ...)."""
    root_dirs: frozenset[str] = frozenset()
    """Directories directly below /."""
    etc_entries: dict[str, str] = msgspec.field(default_factory=dict)
    """Entries of /etc: name -> "file" | "dir" (links followed)."""
    files: frozenset[str] = frozenset()
    """Those bind sources of a policy that are not directories."""
    sources: dict[str, str] = msgspec.field(default_factory=dict)
    """What a policy's mounts ask for (Mount.asked), and root.source -> the path, links resolved."""
    quotas: dict[str, int] = msgspec.field(default_factory=dict)
    """Those a job may write to -> bytes that may lie in them."""
    allow_sources: tuple[str, ...] = ("/",)
    """Those of the policy, links resolved."""
    image: Image | None = None
    """The image a policy's root is."""
    inputs: Inputs | None = None
    """The files of builds that a job refers to."""
    place: Place | None = None
    """Of a job that is a member of a group."""
    proc_entries: frozenset[str] = frozenset()
    """Names below /proc that are not processes."""
    hard_limits: dict[str, int] = msgspec.field(default_factory=dict)
    """Our own hard resource limits where they are finite: RLIMIT name without prefix -> value."""
    fault_notes: dict[str, str] = msgspec.field(default_factory=dict)
    """Capability -> why it is missing, for the result's `degraded` and for doctor."""
