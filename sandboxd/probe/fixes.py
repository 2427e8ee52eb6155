"""What to type so that a missing capability is there: one exact command each, for doctor.py.

Pure, but for the few kernel files that tell which of several causes it is.
"""

from __future__ import annotations

import os
import pwd
from pathlib import Path

from sandboxd.cgroup.ladder import VARIABLE, prepared_place
from sandboxd.probe import idrange

_DOCKER = "docker run --security-opt seccomp=unconfined --security-opt systempaths=unconfined"
_PRIVATE = "seccomp=unconfined --security-opt apparmor=unconfined"
_ENGINE_FILES = ("/.dockerenv", "/run/.containerenv")


def admin(command: str) -> str:
    """The command as one types it who is not root."""
    return command if os.geteuid() == 0 else f"sudo {command}"


def sysctl(name: str) -> str:
    """A sysctl's value; "" if there is no such thing."""
    try:
        return Path("/proc/sys", name).read_text(encoding="ascii", errors="replace").strip()
    except OSError:
        return ""


def user_namespaces(why: str) -> str:
    """`why`: what the kernel said; root without CAP_SETFCAP may not map itself (Linux 5.12)."""
    if "uid_map" in why and os.geteuid() == 0:
        return "run sandboxd as an ordinary user, or with CAP_SETUID, CAP_SETGID and CAP_SETFCAP"
    for name, bad, good in (
        ("user/max_user_namespaces", "0", "15000"),
        ("kernel/unprivileged_userns_clone", "0", "1"),
        ("kernel/apparmor_restrict_unprivileged_userns", "1", "0"),
    ):
        if sysctl(name) == bad:
            return admin(f"sysctl -w {name.replace('/', '.')}={good}")
    if inside_docker():
        return f"{_DOCKER.replace('seccomp=unconfined', _PRIVATE)} ..."
    return "unshare --user true  # must work: not in a chroot, not under a filter that forbids it"


def inside_docker() -> bool:
    return any(os.path.exists(path) for path in _ENGINE_FILES)


def id_maps(why: str) -> str:
    if os.geteuid() == 0:
        return "start sandboxd with CAP_SETUID and CAP_SETGID, and with more ids mapped"
    if "in PATH" in why:
        return admin("apt-get install uidmap")
    if "/etc/sub" in why:
        first = free_subids()
        last = first + 65535
        return admin(
            f"usermod --add-subuids {first}-{last} --add-subgids {first}-{last} {user_name()}"
        )
    if _status("NoNewPrivs") == "1":
        return "start sandboxd without no_new_privs, under which newuidmap is not set-user-id"
    return admin("chmod u+s /usr/bin/newuidmap /usr/bin/newgidmap")


def _status(name: str) -> str:
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith(f"{name}:"):
            return line.partition(":")[2].strip()
    return ""


def user_name() -> str:
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        return str(os.getuid())


def free_subids(folder: Path = Path("/etc")) -> int:
    """The first id after all that /etc/subuid and /etc/subgid give to anybody."""
    kinds = ("subuid", "subgid")
    ends = [
        found.start + found.count for kind in kinds for _, found in idrange.entries(folder / kind)
    ]
    return max(100000, *ends) if ends else 100000


def overlay() -> str:
    return "boot Linux 6.6 or later, or install fuse-overlayfs"


def fuse_overlayfs(found: bool) -> str:
    if not found:
        return admin("apt-get install fuse-overlayfs")
    return device("/dev/fuse", "fuse")


def carrier(found: bool, why: str) -> str:
    """`found`: slirp4netns or pasta is installed, and `why` it does not work."""
    install = admin("apt-get install slirp4netns")
    if found and "network namespace" in why:  # AppArmor: Debian 12's profile of pasta
        return f"{admin('aa-disable /usr/bin/pasta')}, or {install}"
    if found and "slirp4netns" in why:
        return admin("apt-get install passt")
    return install


def nftables() -> str:
    return f"boot a kernel with CONFIG_NF_TABLES_INET, or {admin('modprobe nf_tables')}"


def bridge() -> str:
    return (
        f"boot a kernel with CONFIG_BRIDGE and CONFIG_VETH, or {admin('modprobe -a bridge veth')}"
    )


def network_caps() -> str:
    load = admin("modprobe -a nft_quota nft_limit sch_tbf")
    return f"boot a kernel with CONFIG_NFT_QUOTA, _NFT_LIMIT and _NET_SCH_TBF, or {load}"


def device(path: str, module: str) -> str:
    if not os.path.exists(path):
        return admin(f"modprobe {module}")
    return admin(f"chmod 0666 {path}")


def subtree(top: Path | None, why: str, given: str | None = None) -> str:
    """A subtree of our own: by systemd, else made by root. `given` is what --cgroup named."""
    named = given or os.environ.get(VARIABLE)
    if named and "runs outside of it" in why:
        return f"{admin('sh -c')} 'mkdir -p {named}/leaf && echo '$$' >{named}/leaf/cgroup.procs'"
    if named and why:
        return "leave --cgroup out" if given else f"unset {VARIABLE}"
    if top is None:
        return admin("mount -t cgroup2 cgroup2 /sys/fs/cgroup")
    if os.path.isdir("/run/systemd/system"):
        if os.geteuid() == 0:
            return "systemctl start dbus.socket"
        return admin(f"loginctl enable-linger {user_name()}")
    return by_root(top)


def by_root(top: Path) -> str:
    """Root makes the subtree, gives it away and puts this shell into a leaf of it."""
    path = prepared_place(top, os.getuid())
    enter = f"{admin('sh -c')} 'echo '$$' >{path}/login/cgroup.procs'"
    if path.exists():
        return enter
    return f"{admin('sandboxd setup')} --user {user_name()} --apply && {enter}"


def controller(name: str, why: str, top: Path | None) -> str:
    if "v1" in why:
        return "boot with cgroup_no_v1=all (systemd: and systemd.unified_cgroup_hierarchy=1)"
    if "boot" in why:
        return f"boot without cgroup_disable={name}"
    if os.environ.get(VARIABLE) and "leaf" in why:
        return _leaf()
    if os.path.isdir("/run/systemd/system"):
        return f"{admin('sandboxd setup')} --user {user_name()} --apply"
    return f"echo +{name} | {admin('tee')} PARENT/cgroup.subtree_control  # of every parent"


def _leaf() -> str:
    """Whoever sits in the subtree itself, in one leaf of it."""
    return (
        f'mkdir -p "${VARIABLE}/leaf" && for p in $(cat "${VARIABLE}/cgroup.procs"); '
        f'do echo $p >"${VARIABLE}/leaf/cgroup.procs"; done'
    )


def landlock() -> str:
    try:
        active = Path("/sys/kernel/security/lsm").read_text(encoding="ascii").strip()
    except OSError:
        active = ""
    if "landlock" in active:
        return "boot Linux 6.12 or later"
    return f"boot with lsm=landlock{',' if active else ''}{active}"


def hidepid() -> str:
    return admin("mount -o remount,hidepid=0 /proc  # or gid= a group that you are in")


def proc() -> str:
    if inside_docker():
        return f"{_DOCKER} ..."
    return "umount what lies over parts of /proc: grep ' /proc/' /proc/self/mountinfo"
