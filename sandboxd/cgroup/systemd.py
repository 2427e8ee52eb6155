"""A cgroup from systemd: a delegated scope, and a way into it for processes of ours.

Theory of operation. The kernel lets nobody move a process, or clone one, into a cgroup without
write permission on cgroup.procs of the closest common ancestor (cgroup-v2.rst, "Delegation
Containment"). From a login session or a service that is root's, so only systemd can do it, for
processes of the user who asks (org.freedesktop.systemd1(5)):

    us                        manager (user@UID.service; for root the system's)
    start the holder
    StartTransientUnit   ->   a scope with the holder in it, Delegate=yes
                         <-   JobRemoved: done
    holder into a leaf of the scope, so that controllers can be enabled for the others
    start a tenant
    AttachProcessesToUnit ->  the tenant is in a leaf of the scope

The caller's process is not moved: it may be a service's main process or a user's shell session,
whose limits, name and end are its owner's business. Only what clones sandboxes has to be inside,
and that is the tenant. The holder keeps the scope alive until we close its pipe or die; systemd
removes an empty scope with everything that is left in it.
"""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import msgspec

from sandboxd.cgroup import subtree
from sandboxd.errors import HostError

if TYPE_CHECKING:
    from jeepney.io.blocking import DBusConnection

PATIENCE = 20.0
"""Seconds for an answer, which takes milliseconds; in emulation half a second."""
HOLDER = "sandboxd.holder"
_NAME = "org.freedesktop.systemd1"
_PATH = "/org/freedesktop/systemd1"
_MANAGER = f"{_NAME}.Manager"
_UNLIMITED = (1 << 64) - 1
_WAIT = "import os; os.read(0, 1)"


class Scope(msgspec.Struct, frozen=True):
    """A scope that is ours while it is held; its holder sits in a leaf."""

    name: str
    path: Path


def bus(uid: int) -> Path:
    """The socket of the bus on which this user's systemd answers; it needs no environment."""
    if uid == 0:
        return Path("/run/dbus/system_bus_socket")
    usual = Path(f"/run/user/{uid}/bus")
    named = os.environ.get("XDG_RUNTIME_DIR", "")
    candidates = [Path(named, "bus"), usual] if os.path.isabs(named) else [usual]
    return next((path for path in candidates if _is_socket_of(path, uid)), usual)


def _is_socket_of(path: Path, uid: int) -> bool:
    try:
        found = path.stat()
    except OSError:
        return False
    return stat.S_ISSOCK(found.st_mode) and found.st_uid == uid


def answers() -> str:
    """Why there is no systemd to ask; "" if there may be one."""
    path = bus(os.geteuid())
    if os.path.exists(path):
        return ""
    kind = "system bus" if os.geteuid() == 0 else "user manager"
    return f"no {kind} of systemd here ({path}: no such socket)"


@contextmanager
def open_scope() -> Iterator[Scope]:
    """A delegated scope for as long as the block lasts. HostError says why there is none."""
    if why := answers():
        raise HostError("systemd", why)
    name = f"sandboxd-{os.getpid()}-{os.urandom(6).hex()}.scope"
    _, here = subtree.mounted()
    with _holder() as pid:
        with _asked() as systemd:
            systemd.start_scope(name, pid, slice_of(here, os.geteuid()))
        yield Scope(name, _settle(pid, name))


def slice_of(here: Path | None, uid: int) -> str:
    """The slice we are in, as our systemd calls it, so that its limits hold for the scope, too.

    "" where the slices above are not that systemd's, as in a login session: it picks its own.
    """
    parts = list(here.parts) if here is not None else []
    user = f"user@{uid}.service"
    at = parts.index(user) if user in parts else len(parts)
    # Root asks the system's, to which all below root's user manager is one service.
    parts = parts[:at] if uid == 0 else parts[at + 1 :]
    return next((part for part in reversed(parts) if part.endswith(".slice")), "")


@contextmanager
def _holder() -> Iterator[int]:
    """A process that does nothing, in a session of its own so that no Ctrl-C reaches it.

    It ends with its pipe, which the kernel closes if we die.
    """
    cat = shutil.which("cat")
    argv = [cat] if cat else [sys.executable, "-I", "-S", "-c", _WAIT]
    process = subprocess.Popen(
        argv, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        cwd="/", start_new_session=True, env={},
    )  # fmt: skip
    try:
        yield process.pid
    finally:
        assert process.stdin is not None
        process.stdin.close()
        try:
            process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _settle(pid: int, name: str) -> Path:
    """Where the scope is, once its holder is in a leaf of it."""
    _, path = subtree.mounted(pid=pid)
    if path is None or path.name != name:
        raise HostError("systemd", f"{name} was started, but its cgroup is not to be seen here")
    try:
        (path / HOLDER).mkdir()
        (path / HOLDER / "cgroup.procs").write_text(str(pid))
    except OSError as error:
        raise HostError("systemd", f"{path} is not delegated to us: {error.strerror}") from None
    return path


def attach(scope: str, below: str, pid: int) -> None:
    """Move a process of ours into `below` ("/a/b") of the scope (systemd 238). Blocks."""
    with _asked() as systemd:
        systemd.call("AttachProcessesToUnit", "ssau", scope, below, [pid])


def delegates(unit: str) -> bool:
    """Whether a unit of our systemd has Delegate=yes."""
    with _asked() as systemd:
        (path,) = systemd.call("GetUnit", "s", unit)
        kind = unit.rpartition(".")[2].capitalize()
        return bool(systemd.property(path, f"{_NAME}.{kind}", "Delegate"))


# -- the conversation ------------------------------------------------------------------------------


class _Systemd:
    """systemd on the other end of a connection, all in a given time."""

    def __init__(self, connection: DBusConnection) -> None:
        self._connection = connection
        self._deadline = time.monotonic() + PATIENCE

    def _left(self) -> float:
        return max(0.0, self._deadline - time.monotonic())

    def _ask(self, message: Any) -> tuple[Any, ...]:
        from jeepney.wrappers import unwrap_msg

        reply = self._connection.send_and_get_reply(message, timeout=self._left())
        body: tuple[Any, ...] = unwrap_msg(reply)
        return body

    def call(self, member: str, signature: str | None = None, *body: object) -> tuple[Any, ...]:
        from jeepney import DBusAddress, new_method_call

        address = DBusAddress(_PATH, bus_name=_NAME, interface=_MANAGER)
        return self._ask(new_method_call(address, member, signature, body))

    def property(self, path: str, interface: str, name: str) -> object:
        from jeepney import DBusAddress, Properties

        address = DBusAddress(path, bus_name=_NAME, interface=interface)
        ((_, value),) = self._ask(Properties(address).get(name))
        return value

    def check_pid(self) -> None:
        """Pids mean the same to both sides: else systemd would move somebody else's process."""
        from jeepney import message_bus

        (seen,) = self._ask(message_bus.GetConnectionUnixProcessID(self._connection.unique_name))
        if seen != os.getpid():
            raise HostError("systemd", "we are in another PID namespace than systemd")

    def start_scope(self, name: str, pid: int, where: str) -> None:
        from jeepney import MatchRule, message_bus

        rule = MatchRule(type="signal", interface=_MANAGER, member="JobRemoved", path=_PATH)
        self._ask(message_bus.AddMatch(rule))
        self.call("Subscribe")
        properties: list[tuple[str, tuple[str, object]]] = [
            ("Description", ("s", "sandboxes of sandboxd")),
            ("PIDs", ("au", [pid])),
            ("Delegate", ("b", True)),
            ("CollectMode", ("s", "inactive-or-failed")),
            # The cgroups above still limit it; the default would be shared by all jobs.
            ("TasksMax", ("t", _UNLIMITED)),
        ]
        if where:
            properties.append(("Slice", ("s", where)))
        with self._connection.filter(rule, bufsize=1000) as removed:
            job = self.call("StartTransientUnit", "ssa(sv)a(sa(sv))", name, "fail", properties, [])
            while True:
                message = self._connection.recv_until_filtered(removed, timeout=self._left())
                _, path, _, result = message.body
                if path == job[0]:
                    break
        if result != "done":
            raise HostError("systemd", f"{name} was not started: {result}")


@contextmanager
def _asked() -> Iterator[_Systemd]:
    """systemd, asked on our bus. HostError says what went wrong."""
    from jeepney.io.blocking import open_dbus_connection
    from jeepney.wrappers import DBusErrorResponse

    path = bus(os.geteuid())
    try:
        address = f"unix:path={quote(str(path))}"
        with open_dbus_connection(address, auth_timeout=PATIENCE) as connection:
            systemd = _Systemd(connection)
            systemd.check_pid()
            yield systemd
    except DBusErrorResponse as error:
        said = error.data[0] if error.data else error.name
        raise HostError("systemd", f"systemd refused: {said}") from None
    except TimeoutError:
        raise HostError("systemd", f"no answer on {path} within {PATIENCE:g} s") from None
    except (OSError, ValueError) as error:
        raise HostError("systemd", f"{path}: {getattr(error, 'strerror', '') or error}") from None
