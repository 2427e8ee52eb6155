"""The Landlock ruleset of a job (landlock(7)): what its domain may do with files.

The mount namespace already decides what there is; the domain is the second layer. It forbids
every mount, ptrace of init, and from ABI 6 on signals and abstract sockets to the outside.
"""

from __future__ import annotations

from sandboxd import plan
from sandboxd.host import Host
from sandboxd.policy import Policy

EXECUTE, WRITE_FILE, READ_FILE, READ_DIR = 1 << 0, 1 << 1, 1 << 2, 1 << 3
MAKE_CHAR, MAKE_BLOCK = 1 << 6, 1 << 11
TRUNCATE, IOCTL_DEV = 1 << 14, 1 << 15
# Rights up to and including each ABI (include/uapi/linux/landlock.h): REFER came with 2,
# TRUNCATE with 3, IOCTL_DEV with 5.
RIGHTS = {1: (1 << 13) - 1, 2: (1 << 14) - 1, 3: (1 << 15) - 1, 4: (1 << 15) - 1}
ALL_RIGHTS = (1 << 16) - 1
OF_FILES = EXECUTE | WRITE_FILE | READ_FILE | TRUNCATE | IOCTL_DEV
"""Rights that a rule about a file may have (ACCESS_FILE in security/landlock/fs.c), else EINVAL."""
SCOPED_FROM = 6
ABSTRACT_UNIX_SOCKET, SIGNAL = 1 << 0, 1 << 1


def step(policy: Policy, host: Host) -> plan.Landlock:
    """The ruleset, in the rights this kernel's ABI knows."""
    handled = RIGHTS.get(host.landlock, ALL_RIGHTS)
    read = (EXECUTE | READ_FILE | READ_DIR) & handled
    write = handled & ~(MAKE_CHAR | MAKE_BLOCK)
    use = (READ_FILE | READ_DIR | WRITE_FILE | TRUNCATE | IOCTL_DEV) & handled
    rules = [
        ("/", write if policy.root.writable else read),
        ("/dev", use),
        ("/proc", use | read),
        *((path, write) for path in ("/tmp", "/box", "/dev/shm")),
        # An optional one that is not there has its place in the root all the same.
        *((mount.target, write & OF_FILES if mount.source in host.files else write)
          for mount in policy.mounts if mount.type == "tmpfs" or mount.writes or mount.is_copy),
    ]  # fmt: skip
    if policy.root.proc == "none":
        rules = [rule for rule in rules if rule[0] != "/proc"]
    return plan.Landlock(
        abi=host.landlock,
        handled=handled,
        scoped=ABSTRACT_UNIX_SOCKET | SIGNAL if host.landlock >= SCOPED_FROM else 0,
        rules=tuple(rules),
        why="second layer around every job",
    )
