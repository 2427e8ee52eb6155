"""What will be done to build one sandbox, as data: typed steps that can be printed and compared.

A plan has three parts, in the order in which they happen and for as long as they last:

- tenant: once per trust domain and root: user namespace, template root, what all its jobs share;
- setup: once per sandbox, before its job is known: mounts, limits, identity, filter;
- exec: once per job: working directory, descriptors, program.

Each kind of step is a stage; `script/lower.py` has one function a kind, and a failure in the
kernel comes back as (stage, number of the step, errno). `why` names the line of the policy that
asked for the step, or the rule of sandboxd's own that did.
"""

from __future__ import annotations

import re
from functools import cache
from typing import ClassVar

import msgspec

from sandboxd.kernel import NAMESPACES as NAMESPACES
from sandboxd.kernel import READ_ONLY as READ_ONLY
from sandboxd.kernel import SAFE as SAFE
from sandboxd.kernel import Attributes as Attributes
from sandboxd.kernel import describe_namespaces as describe_namespaces
from sandboxd.kernel import namespaces as namespaces

TENANT_UID = 0
"""The tenant's own uid inside its user namespace; the caller's outside."""
FIRST_JOB_UID = 1000
"""Jobs with a uid of their own get FIRST_JOB_UID + n inside the tenant."""


class Step(msgspec.Struct, frozen=True, kw_only=True):
    """One thing to do. Subclasses are the stages."""

    why: str = ""
    words: ClassVar[str] = ""

    @property
    def stage(self) -> str:
        return _stage(type(self).__name__)

    def describe(self) -> str:
        """What it does, in a few words with the paths in it."""
        return self.words


@cache
def _stage(name: str) -> str:
    return re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower()


class IdMap(msgspec.Struct, frozen=True, kw_only=True):
    """Who is who: rows (inside, outside, count) as in user_namespaces(7).

    writer: "self" (the process writes a single id), "newuidmap" (the setuid helpers), or "direct"
    (the supervisor is root and writes ranges itself).
    """

    writer: str
    uids: tuple[tuple[int, int, int], ...]
    gids: tuple[tuple[int, int, int], ...]

    @property
    def job_uids(self) -> int:
        """How many uids jobs may have of their own; 0 in single-id mode."""
        return max((inside + count - FIRST_JOB_UID for inside, _, count in self.uids), default=0)


# -- the tenant ------------------------------------------------------------------------------


class UserNamespace(Step, frozen=True, kw_only=True):
    """The user namespace everything else belongs to (user_namespaces(7))."""

    ids: IdMap
    joined: bool = False
    """It is another tenant's, which came as descriptor 1."""

    def describe(self) -> str:
        ids = ", ".join(
            f"uid {outside}+{count} as {inside}+" for inside, outside, count in self.ids.uids
        )
        return f"{ids} (another tenant's)" if self.joined else ids


class Namespaces(Step, frozen=True, kw_only=True):
    """Enter new namespaces as PID 1 (namespaces(7)); `flags` are CLONE_NEW*."""

    flags: int

    def describe(self) -> str:
        return describe_namespaces(self.flags)


class PrivatePropagation(Step, frozen=True, kw_only=True):
    words: ClassVar[str] = "no mount event goes out or comes in"


class OpenTree(Step, frozen=True, kw_only=True):
    """Take hold of a host path as a detached mount, before anything hides it."""

    source: str
    slot: int
    optional: bool = False
    recursive: bool = True
    strict: bool = False
    """No part of the path may be a link: it is where it says, whoever changes links meanwhile."""

    def describe(self) -> str:
        return f"{self.source}{' (through no link)' if self.strict else ''}"


class Attach(Step, frozen=True, kw_only=True):
    """Put a mount taken by OpenTree at its place."""

    slot: int
    target: str
    source: str
    attributes: Attributes = READ_ONLY
    optional: bool = False
    recursive: bool = True
    root: str = ""
    """What `target` is looked up in, links and all (RESOLVE_IN_ROOT); "" is our own root."""

    def describe(self) -> str:
        return f"{self.source} -> {self.target} ({self.attributes.describe()})"


class MountPoint(Step, frozen=True, kw_only=True):
    """Make what lacks of a path to mount on, within a root whose links are a stranger's."""

    root: str
    path: str
    directory: bool

    def describe(self) -> str:
        return f"{self.path} in {self.root}"


class Tmpfs(Step, frozen=True, kw_only=True):
    target: str
    size: int | None = None
    inodes: int | None = None
    mode: int = 0o755
    attributes: Attributes = SAFE

    def describe(self) -> str:
        size = "" if self.size is None else f", {self.size} bytes"
        inodes = "" if self.inodes is None else f", {self.inodes} inodes"
        return f"{self.target} (mode {self.mode:o}{size}{inodes})"


class MakeDir(Step, frozen=True, kw_only=True):
    path: str
    mode: int = 0o755
    for_job: bool = False
    """Owned by the job's uid."""

    def describe(self) -> str:
        return f"{self.path} (mode {self.mode:o}{', of the job' if self.for_job else ''})"


class MakeFile(Step, frozen=True, kw_only=True):
    path: str
    content: bytes = b""
    mode: int = 0o644
    anew: bool = False
    """In the place of what an image has there, be it longer, or a link."""

    def describe(self) -> str:
        return f"{self.path} ({len(self.content)} bytes)"


class Symlink(Step, frozen=True, kw_only=True):
    path: str
    to: str

    def describe(self) -> str:
        return f"{self.path} -> {self.to}"


class Proc(Step, frozen=True, kw_only=True):
    target: str = "/proc"
    subset: bool = False
    """subset=pid: processes only (proc(5))."""

    def describe(self) -> str:
        return f"{self.target}{' (processes only)' if self.subset else ''}"


class Bind(Step, frozen=True, kw_only=True):
    """Show a path that exists in the template at another place."""

    source: str
    target: str
    attributes: Attributes = READ_ONLY
    recursive: bool = False
    root: str = ""
    """As of Attach."""

    def describe(self) -> str:
        return f"{self.source} -> {self.target} ({self.attributes.describe()})"


class Overlay(Step, frozen=True, kw_only=True):
    """Kernel overlayfs with userxattr: lower directories below a private upper, if there is one."""

    target: str
    lowers: tuple[str, ...]
    upper: str = ""
    work: str = ""

    def describe(self) -> str:
        below = self.upper and f" below {self.upper}"
        return f"{':'.join(self.lowers)}{below} -> {self.target}"


class AttachReceived(Step, frozen=True, kw_only=True):
    """Put a mount made by a sidecar at its place; it came as a descriptor."""

    descriptor: int
    target: str
    source: str

    def describe(self) -> str:
        return f"{self.source} -> {self.target} (made by a sidecar)"


class Pivot(Step, frozen=True, kw_only=True):
    """Make `root` the root directory and let go of the old one."""

    root: str

    def describe(self) -> str:
        return f"{self.root} becomes /"


class Restrict(Step, frozen=True, kw_only=True):
    """Set attributes on a mount that is there already."""

    path: str
    attributes: Attributes = READ_ONLY
    recursive: bool = False

    def describe(self) -> str:
        return f"{self.path} ({self.attributes.describe()})"


class WriteFile(Step, frozen=True, kw_only=True):
    """Write to a file that is there already: a sysctl."""

    path: str
    content: bytes
    optional: bool = False

    def describe(self) -> str:
        return f"{self.content.decode('ascii', 'replace').strip()} > {self.path}"


class LoopbackUp(Step, frozen=True, kw_only=True):
    words: ClassVar[str] = "lo"


class DropBounding(Step, frozen=True, kw_only=True):
    words: ClassVar[str] = "no exec can give a capability again"


class NoNewPrivileges(Step, frozen=True, kw_only=True):
    words: ClassVar[str] = "set-user-id programs and file capabilities have no effect"


# -- a sandbox -------------------------------------------------------------------------------


class JoinNetwork(Step, frozen=True, kw_only=True):
    """Enter a pooled network namespace that came as a descriptor."""

    descriptor: int

    def describe(self) -> str:
        return "a network namespace of its own, made ahead"


class NewTimeNamespace(Step, frozen=True, kw_only=True):
    monotonic: int
    boottime: int

    def describe(self) -> str:
        return f"monotonic {self.monotonic:+d} s, boottime {self.boottime:+d} s"


class NewCgroupNamespace(Step, frozen=True, kw_only=True):
    words: ClassVar[str] = "its own cgroup is the root of what it sees"


class Hostname(Step, frozen=True, kw_only=True):
    name: str

    def describe(self) -> str:
        return self.name


class NewSession(Step, frozen=True, kw_only=True):
    words: ClassVar[str] = "no terminal, no process group of ours"


class SetLimit(Step, frozen=True, kw_only=True):
    """One resource limit (getrlimit(2)); None is unlimited as far as we may."""

    resource: str
    soft: int | None
    hard: int | None

    def describe(self) -> str:
        return f"{self.resource} {'unlimited' if self.soft is None else self.soft}"


class KeepProc(Step, frozen=True, kw_only=True):
    """Keep what LeafUserNamespace needs reachable after /proc was restricted, or covered."""

    words: ClassVar[str] = "/proc/sys/user, /proc/self"


class BecomeUser(Step, frozen=True, kw_only=True):
    """Change to the job's ids; None is the run's own uid."""

    uid: int | None
    gid: int | None

    def describe(self) -> str:
        return "a uid of the run's own" if self.uid is None else f"uid {self.uid} of the tenant"


class LeafUserNamespace(Step, frozen=True, kw_only=True):
    """A last user namespace that owns nothing and gives the ids seen inside."""

    uid: int
    gid: int
    outer: int | None
    """The tenant's id that is mapped; None is the run's own."""
    quotas: tuple[tuple[str, int], ...]

    def describe(self) -> str:
        return f"seen as {self.uid}:{self.gid}; no further ones"


class DropCapabilities(Step, frozen=True, kw_only=True):
    words: ClassVar[str] = "all sets empty"


class Hide(Step, frozen=True, kw_only=True):
    """init is not dumpable: no ptrace, no /proc/1/mem; and it ends with its parent."""

    words: ClassVar[str] = "init cannot be traced; it ends with the zygote"


class Landlock(Step, frozen=True, kw_only=True):
    """A Landlock ruleset the workload enters before its program starts (landlock(7)).

    rules: (path, access mask); scoped: what may not leave the domain (ABI 6).
    """

    abi: int
    handled: int
    scoped: int
    rules: tuple[tuple[str, int], ...]

    def describe(self) -> str:
        return f"ABI {self.abi}, {len(self.rules)} rules, {'scoped' if self.scoped else 'unscoped'}"


class Filter(Step, frozen=True, kw_only=True):
    """One seccomp program, in the kernel's form (struct sock_filter[])."""

    program: bytes

    def describe(self) -> str:
        return f"{len(self.program) // 8} instructions"


# -- a job -----------------------------------------------------------------------------------


class ShareFiles(Step, frozen=True, kw_only=True):
    """Hand the working directory's descriptor to the supervisor; wait while it copies in."""

    directory: str
    wait: bool

    def describe(self) -> str:
        return f"{self.directory}{' (wait for the input files)' if self.wait else ''}"


class ChangeDir(Step, frozen=True, kw_only=True):
    path: bytes

    def describe(self) -> str:
        return repr(self.path)[1:]


class Exec(Step, frozen=True, kw_only=True):
    """Start the program: the first of `programs` that can be executed."""

    programs: tuple[bytes, ...]
    argv: tuple[bytes, ...]
    env: tuple[bytes, ...]
    landlock: bool
    terminal: bool
    time_namespace: bool

    def describe(self) -> str:
        shown = " ".join(repr(word)[2:-1] for word in self.argv[:8])
        return shown + (" ..." if len(self.argv) > 8 else "")


# -- the whole -------------------------------------------------------------------------------


class TenantPlan(msgspec.Struct, frozen=True, kw_only=True):
    ids: IdMap
    steps: tuple[Step, ...]


class SetupPlan(msgspec.Struct, frozen=True, kw_only=True):
    """`namespaces` are CLONE_NEW* flags; `descriptors` what is handed to init, in order."""

    steps: tuple[Step, ...]
    namespaces: int
    descriptors: tuple[str, ...]
    cgroup: bool
    own_uid: bool
    landlock: bool


class ExecPlan(msgspec.Struct, frozen=True, kw_only=True):
    steps: tuple[Step, ...]


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that will be done for one job, and what will not be in force."""

    tenant: TenantPlan
    setup: SetupPlan
    exec: ExecPlan
    cgroup_files: dict[str, str] = msgspec.field(default_factory=dict)
    cpu_sets: tuple[str, ...] = ()
    enforcement: dict[str, str] = msgspec.field(default_factory=dict)
    degraded: tuple[tuple[str, str], ...] = ()
