"""What a job may do and use: one frozen value, read from a TOML file per job type.

Every section of a policy file is a class here and every key a field, so this file is the
reference; `sandboxd policy schema` and docs/reference/policy.md follow from it. Times are
seconds (float), sizes bytes (int); in TOML both may be written with a unit ("1.5s", "256M").
None means "no limit of ours".
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

Seconds = Annotated[float, Meta(gt=0, le=1e9, extra={"unit": "seconds"})]
Bytes = Annotated[int, Meta(ge=1, le=(1 << 63) - 1, extra={"unit": "bytes"})]
Count = Annotated[int, Meta(ge=1, le=(1 << 31) - 1)]
Path = Annotated[str, Meta(pattern="^/")]


class Section(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A table of a policy file: frozen, every key known."""


class Limits(Section, frozen=True):
    """[limits]: what a run may use before it is stopped. A job may lower them, never raise.

    Nothing is limited unless it is named, so that a job's Limits(memory=...) asks for nothing else;
    the limits that no policy should be without are the defaults of Policy.
    """

    cpu_time: Seconds | None = None
    """CPU seconds of the whole process tree."""
    wall_time: Seconds | None = None
    """Seconds from the start of the program to its end."""
    idle_time: Seconds | None = None
    """Seconds in a row during which the tree used almost no CPU."""
    memory: Bytes | None = None
    """Bytes of memory of the whole tree; with a cgroup tmpfs and page cache are in it."""
    processes: Count | None = None
    """Processes and threads alive at once."""
    output: Bytes | None = None
    """Bytes on stdout and stderr together."""
    disk: Bytes | None = None
    """Bytes in all writable places of the sandbox together."""
    inodes: Count | None = None
    """Files and directories in all writable places together."""
    open_files: Count | None = None
    """Descriptors per process (RLIMIT_NOFILE)."""
    file_size: Bytes | None = None
    """Bytes of one file (RLIMIT_FSIZE)."""
    stack: Bytes | None = None
    """Bytes of the main thread's stack (RLIMIT_STACK); None is unlimited."""
    address_space: Bytes | None = None
    """Virtual bytes per process (RLIMIT_AS); breaks JVM, Go and ASan, so never by default."""
    cpus: Annotated[float, Meta(gt=0, le=65536)] | None = None
    """CPU bandwidth: 1.5 is one and a half CPUs."""


class Artifacts(Section, frozen=True):
    """[artifacts]: how much of what a job left is copied out. A job may lower it, never raise.

    What is beyond is no file less in silence: it is an entry of the result's artifact_errors.
    """

    files: Count | None = None
    """Files, and as many errors."""
    bytes: Bytes | None = None
    """Of all files together, as long as they say they are: holes count."""
    depth: Count | None = None
    """Directories above a file, the working directory not counted."""
    path: Annotated[int, Meta(ge=1, le=16384, extra={"unit": "bytes"})] | None = None
    """Of a file's name, its directories included."""
    entries: Count | None = None
    """Names looked at in the search for files, whether collected or not."""


class Io(Section, frozen=True):
    """[[resources.io]]: how fast one disk may be used (io.max); the page cache is no disk."""

    device: Annotated[str, Meta(pattern="^[0-9]+:[0-9]+$")]
    """MAJOR:MINOR of a whole disk, as lsblk(8) has it."""
    read: Bytes | None = None
    """Bytes a second."""
    write: Bytes | None = None
    """Bytes a second."""
    reads: Count | None = None
    """Operations a second."""
    writes: Count | None = None
    """Operations a second."""


class Resources(Section, frozen=True):
    """[resources]: how a run shares the machine with others. Each key needs its controller."""

    memory_high: Bytes | None = None
    """Above it the run is slowed and its pages reclaimed; it is not killed (memory.high)."""
    swap: Annotated[int, Meta(ge=0, le=(1 << 63) - 1, extra={"unit": "bytes"})] = 0
    """Bytes that may be swapped out on top of limits.memory (memory.swap.max)."""
    oom: Literal["run", "process"] = "run"
    """What the kernel kills at limits.memory: the whole run, or its largest process alone."""
    cpu_weight: Annotated[int, Meta(ge=1, le=10000)] | None = None
    """Share of busy CPUs against other runs; the kernel's default is 100 (cpu.weight)."""
    cpuset: Annotated[str, Meta(pattern="^[0-9]+(-[0-9]+)?(,[0-9]+(-[0-9]+)?)*$")] | None = None
    """The CPUs that runs are on: "0-3,8" (cpuset.cpus); None: all that are sandboxd's."""
    cores: Annotated[int, Meta(ge=1, le=65536)] | None = None
    """Cores that each run has for itself, as long as there are no more runs than that."""
    siblings: bool = True
    """Whether a run also gets the other hyper-threads of its cores; false leaves them idle."""
    io: tuple[Io, ...] = ()
    """Bandwidth of disks."""


class Root(Section, frozen=True):
    """[root]: the file system the job sees."""

    source: str = "host"
    """"host" (the machine's /usr and a minimal /etc) or the path of a directory."""
    image: str = ""
    """An image of `sandboxd image ls`, instead of `source`; "" is none."""
    config: tuple[Literal["env", "workdir", "user"], ...] = ("env", "workdir", "user")
    """What counts of how the image says it is to be run."""
    writable: bool = False
    """Whether the job sees a private writable copy of its root (overlay)."""
    driver: Literal["auto", "kernel", "fuse", "tmpfs"] = "auto"
    """How a writable root is made: overlayfs of the kernel, fuse-overlayfs, or binds on tmpfs."""
    upper: Literal["tmpfs", "directory"] = "tmpfs"
    """Where all that a job writes lies: in memory, or in a directory on disk."""
    proc: Literal["pid", "masked", "none"] = "pid"
    """/proc with processes only (subset=pid), whole with the dangerous parts masked, or absent."""
    etc: tuple[str, ...] = ()
    """Entries of the host's /etc that are shown read-only where they exist (source "host")."""
    aliases: tuple[str, ...] = ()
    """Names at the top of the root that lead to /box, as symbolic links (source "host")."""


class Mount(Section, frozen=True):
    """[[mounts]]: one more place in the job's file system."""

    target: Path
    """Where the job sees it."""
    type: Literal["bind", "tmpfs", "volume", "cache"] = "bind"
    """A path of the host, an empty directory in memory, a named volume, or a cache of many jobs."""
    source: str | None = None
    """Host path, for a bind."""
    name: Annotated[str, Meta(pattern="^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$")] | None = None
    """For a volume or a cache: which one."""
    writable: bool = False
    """For a bind or a volume: whether the job may write to it. A tmpfs always is."""
    lock: Literal["exclusive", "shared-ro", "copy"] = "exclusive"
    """For a cache: one run at a time may write to it, many may read it, or each has a copy."""
    wait: Annotated[float, Meta(ge=0, le=1e9, extra={"unit": "seconds"})] = 60.0
    """For a cache: seconds that a run waits for others who have it, before it is refused."""
    optional: bool = False
    """A missing source is skipped instead of refused."""
    exec: bool = True
    """Whether programs there may be executed."""
    size: Bytes | None = None
    """For a tmpfs: a size of its own; None shares limits.disk. For a cache: what it may grow to."""
    inodes: Count | None = None
    """For a tmpfs with a size: files and directories in it."""

    @property
    def asked(self) -> str:
        """What is to be looked for on the host."""
        return self.source or "" if self.type == "bind" else f"{self.type} {self.name}"

    @property
    def writes(self) -> bool:
        """Whether the job may write to what others see, too."""
        return self.lock == "exclusive" if self.type == "cache" else self.writable

    @property
    def is_copy(self) -> bool:
        """Whether the job writes to a copy of its own."""
        return self.type == "cache" and self.lock == "copy"


class Network(Section, frozen=True):
    """[network]: what the job can reach."""

    mode: Literal["none", "user"] = "none"
    """"none": a network namespace of its own with loopback and nothing else; "user": in it a way
    out through a program of the caller's, to what `allow` names and nothing else."""
    helper: Literal["auto", "slirp4netns", "pasta"] = "auto"
    """That program; "auto" is the first of the two that is there."""
    allow: tuple[str, ...] = ()
    """Who may be reached: "NAME:PORT", "*.NAME:PORT", "ADDRESS/BITS:PORT", "*:PORT" or "*"."""
    resolvers: tuple[str, ...] = ()
    """Addresses of name servers for allowed names; none: the host's (/etc/resolv.conf)."""
    publish: tuple[str, ...] = ()
    """Ports of the host's that lead into the sandbox: "[ADDRESS:]PORT:PORT_INSIDE[/udp]"."""
    connections: Annotated[int, Meta(ge=1, le=1_000_000)] | None = None
    """TCP connections that may be opened in all, and UDP flows: a port inside with one outside."""
    bytes: Bytes | None = None
    """Bytes that may be sent and received in all, headers of IP included."""
    rate: Annotated[int, Meta(ge=1024, le=1 << 33, extra={"unit": "bytes"})] | None = None
    """Bytes a second, each way; those of a second may go at once, and at least 256 KiB."""


class Argument(Section, frozen=True):
    """One comparison in a syscall rule: (argument[index] & mask) op value, all unsigned."""

    index: Annotated[int, Meta(ge=0, le=5)]
    """Which argument, from 0."""
    op: Literal["eq", "ne", "lt", "le", "gt", "ge", "any_bits", "no_bits"]
    """any_bits: argument & value != 0; no_bits: argument & value == 0."""
    value: int
    """A negative one means its two's complement."""
    mask: int | None = None
    """Bits that count; None: all of them."""
    width: Literal[32, 64] = 32
    """32: the kernel sees an int, so the upper half is masked off before comparing."""


class Rule(Section, frozen=True):
    """[[syscalls.rules]]: for these calls, when all comparisons hold, this action.

    Rules are tried in order, before the call's entry in allow/deny; the first that holds wins.
    """

    calls: tuple[str, ...]
    """System calls and groups of them."""
    args: tuple[Argument, ...] = ()
    """Comparisons, all of which must hold."""
    action: Literal["allow", "eperm", "enosys", "eafnosupport", "success", "kill"] = "allow"


class Syscalls(Section, frozen=True):
    """[syscalls]: an allowlist; what is not named gets the default answer.

    Names may be groups ("@base"; `sandboxd policy explain` lists them). Precedence per call:
    rules, kill, deny, enosys, eafnosupport, allow, default.
    """

    default: Literal["enosys", "eperm", "kill"] = "enosys"
    """The answer to what no list and no rule names."""
    allow: tuple[str, ...] = ("@base", "@locks")
    """Allowed."""
    deny: tuple[str, ...] = ("@dangerous", "@ptrace", "@numa", "@ldt")
    """Answered with EPERM."""
    enosys: tuple[str, ...] = ()
    """Answered with ENOSYS, so that libc falls back to an older call."""
    eafnosupport: tuple[str, ...] = ("@socket-create",)
    """Answered with EAFNOSUPPORT: the sockets that no rule admits."""
    kill: tuple[str, ...] = ()
    """The process is killed with SIGSYS: status syscall_denied."""
    rules: tuple[Rule | str, ...] = ("@sockets", "@no-namespaces", "@guards")
    """Rules and names of groups of rules, tried in this order."""
    abi32: Literal["kill", "allow"] = "kill"
    """32-bit programs on x86-64 (i386): killed, or held by the same lists and rules. x32, and
    32-bit programs on aarch64, are always killed."""
    oci: str = ""
    """A seccomp profile of the OCI's, relative to the policy file, instead of all the lists and
    rules above; "" is none."""


class Attached(Syscalls, frozen=True):
    """[syscalls] with the profiles themselves, which a policy file only names."""

    profile: str = ""
    """The JSON text of `oci`."""
    on_top: str = ""
    """The JSON text of a further profile: what either refuses is refused."""
    on_top_name: str = ""
    """The file that it is from, for messages."""


class Identity(Section, frozen=True):
    """[identity]: who the job is."""

    user: Literal["isolated", "caller"] = "isolated"
    """isolated: a uid of its own per run where subordinate ids exist; caller: files written
    through a writable bind belong to the caller."""
    uid: Annotated[int, Meta(ge=0, lt=65536)] | None = None
    """The uid seen inside; None: the run's own."""
    gid: Annotated[int, Meta(ge=0, lt=65536)] | None = None
    """The gid seen inside; None: the run's own."""
    name: Annotated[str, Meta(pattern="^[a-z_][a-z0-9_-]{0,31}$")] = "sandbox"
    """The user's name in /etc/passwd."""
    home: Path = "/box"
    """The home directory in /etc/passwd."""
    hostname: Annotated[str, Meta(pattern="^[A-Za-z0-9][A-Za-z0-9.-]{0,62}$")] = "sandbox"


class Environment(Section, frozen=True):
    """[environment]: nothing of the caller's is inherited unless named here."""

    set: dict[str, str] = msgspec.field(default_factory=dict)
    """Variables and their values."""
    inherit: tuple[str, ...] = ()
    """Names taken from the caller's environment where set there."""


class Devices(Section, frozen=True):
    """[devices]: nodes of /dev, bound from the host."""

    allow: tuple[str, ...] = ("null", "zero", "full", "random", "urandom", "tty")
    """Names below /dev."""


class Clock(Section, frozen=True):
    """[clock]: a time namespace with offsets in seconds; both 0 means no time namespace."""

    boottime: Annotated[int, Meta(ge=-(10**9), le=10**9)] = 0
    monotonic: Annotated[int, Meta(ge=-(10**9), le=10**9)] = 0


class Require(Section, frozen=True):
    """[require]: what must be in force, else the job is refused before it starts."""

    memory: Literal["enforced", "any"] = "any"
    cpu_time: Literal["enforced", "any"] = "any"
    processes: Literal["enforced", "any"] = "any"
    cpus: Literal["enforced", "any"] = "any"
    syscalls: Literal["enforced", "any"] = "any"
    network: Literal["enforced", "any"] = "any"
    """The caps of [network]: connections, bytes, rate."""
    user_namespace: Literal["subuid", "any"] = "any"
    landlock: Annotated[int, Meta(ge=0)] = 0
    """Lowest Landlock ABI; 6 adds the scopes for signals and abstract sockets."""


class Policy(Section, frozen=True):
    """A whole policy. `name` is the file's name without .toml."""

    name: str = "custom"
    description: str = ""
    limits: Limits = Limits(disk=64 << 20, inodes=16384, open_files=256)
    artifacts: Artifacts = Artifacts(
        files=1000, bytes=64 << 20, depth=64, path=4096, entries=1_000_000
    )
    resources: Resources = Resources()
    root: Root = Root()
    mounts: tuple[Mount, ...] = ()
    allow_sources: tuple[Path, ...] = ("/",)
    """Where sources of binds and root.source may lie, links resolved; "/" is anywhere."""
    network: Network = Network()
    syscalls: Syscalls = Syscalls()
    identity: Identity = Identity()
    environment: Environment = Environment()
    devices: Devices = Devices()
    clock: Clock = Clock()
    require: Require = Require()
    origins: dict[str, str] = msgspec.field(default_factory=dict)
    """Dotted key -> "file: key" that set it; for messages and `explain`, not part of the policy."""

    def origin(self, key: str) -> str:
        """The place a message should name for this dotted key; for a section, all its files."""
        place = key
        while place:
            if place in self.origins:
                return self.origins[place]
            place = place.rpartition(".")[0]
        files = (
            where.partition(": ")[0]
            for inner, where in self.origins.items()
            if inner.startswith(f"{key}.")
        )
        return f"{', '.join(dict.fromkeys(files)) or self.name}: {key}"
