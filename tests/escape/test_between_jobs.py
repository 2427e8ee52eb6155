"""Job to job: at the same time, and one after the other in all that is used again."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from tests.escape.attack import (
    Argument,
    Change,
    Job,
    Rule,
    achieved,
    any_uid,
    both,
    every_policy,
    find,
    finished,
    in_turn,
    live,
    needs_scopes,
    open_runner,
    plan,
    python,
    weakened,
    with_inet,
    without,
    without_namespace,
)

NETWORK = "found['network'] = os.readlink('/proc/self/ns/net')\n"
LISTENING = (
    NETWORK
    + r"""
server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
server.bind("\0sandboxd-attack")
server.listen()
datagrams = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
datagrams.bind("\0sandboxd-datagrams")
"""
)
CONNECTING = (
    NETWORK
    + r"""
client = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
found["stream"] = tried(client.connect, "\0sandboxd-attack")
client = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
found["datagram"] = tried(client.sendto, b"x", "\0sandboxd-datagrams")
found["listed"] = "sandboxd" in reads("/proc/self/net/unix")
"""
)


async def beside(policy: str, body: str, other: str) -> dict[str, Any]:
    """What `other` achieves while `body` is live, in one runner."""
    async with open_runner(slots=2) as runner:
        async with live(runner, policy, body + "\nready()") as first:
            found = achieved(await runner.run(Job(argv=python(other), policy=policy)))
            await finished(first)
    return found


async def in_one_network(
    policy: str, body: str, other: str, weaken: Change | None = None
) -> dict[str, Any]:
    """What `other` achieves in the network namespace that `body` had, when it is used again."""
    with weakened(weaken):
        async with open_runner(slots=1) as runner:
            first = achieved(await runner.run(Job(argv=python(body), policy=policy)))
            for _ in range(20):  # the earlier one may still be on its way out
                found = achieved(await runner.run(Job(argv=python(other), policy=policy)))
                if found["network"] == first["network"]:
                    return found
    raise AssertionError("its network namespace was not used again: nothing was tested")


@any_uid
async def test_abstract_sockets_of_a_live_job(policy: str) -> None:
    """Abstract unix sockets belong to the network namespace: unix(7), CVE-2020-15257 (containerd).

    Countermeasures: a network namespace for each live sandbox; Landlock scopes them (ABI 6).
    """
    found = await beside(policy, LISTENING, CONNECTING)
    assert (found["stream"], found["datagram"]) == ("ECONNREFUSED", "ECONNREFUSED")
    assert not found["listed"]


@any_uid
@pytest.mark.needs("landlock")
async def test_abstract_sockets_in_one_network(policy: str) -> None:
    """In one network namespace Landlock still keeps two jobs apart; without both they talk."""
    needs_scopes()
    with weakened(without(plan.JoinNetwork)):
        found = await beside(policy, LISTENING, CONNECTING)
    assert (found["stream"], found["datagram"]) == ("EPERM", "EPERM")
    with weakened(without(plan.JoinNetwork, plan.Landlock)):
        found = await beside(policy, LISTENING, CONNECTING)
    assert (found["stream"], found["datagram"]) == ("ok", "ok")


KEPT_IN_FLIGHT = r"""
one, other = socket.socketpair()
def send(through, *fds):
    rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))
    through.sendmsg([b"x"], [rights])
send(one, server.fileno(), datagrams.fileno(), other.fileno())
send(other, server.fileno(), datagrams.fileno(), one.fileno())
"""


@pytest.mark.parametrize("policy", ["judge-native"])
async def test_abstract_sockets_of_an_earlier_job(policy: str) -> None:
    """The same after the job, in the network namespace that is used again; unix(7), SCM_RIGHTS.

    The sockets are left in flight in a cycle, so that no process' end closes them. Countermeasures:
    the namespace goes back to the pool when the pidfd says that all are dead; the kernel collects.
    """
    found = await in_one_network(policy, LISTENING + KEPT_IN_FLIGHT, CONNECTING)
    assert (found["stream"], found["datagram"]) == ("ECONNREFUSED", "ECONNREFUSED")


TALKING = (
    NETWORK
    + """
def pair(family, address):
    server = socket.socket(family)
    server.bind((address, 4711))
    server.listen()
    client = socket.create_connection((address, 4711))
    accepted = server.accept()[0]
    accepted.close()  # the first to close is who waits (TIME_WAIT)
    client.recv(1)
    client.close()
    return server
held = [pair(socket.AF_INET, "127.0.0.1"), pair(socket.AF_INET6, "::1")]
datagrams = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
datagrams.bind(("127.0.0.1", 4712))
datagrams.sendto(b"left", ("127.0.0.1", 4712))
"""
)
LOOKING = (
    NETWORK
    + """
for family, address in ((socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")):
    found["connect " + address] = tried(socket.create_connection, (address, 4711))
    found["bind " + address] = tried(socket.socket(family).bind, (address, 4711))
datagrams = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
found["udp"] = tried(datagrams.bind, ("127.0.0.1", 4712))
datagrams.setblocking(False)
found["left"] = tried(datagrams.recv, 10)
"""
)


@any_uid
async def test_ports_of_an_earlier_job(policy: str) -> None:
    """Ports still taken, connections still waiting (TIME_WAIT), datagrams still there: tcp(7).

    Countermeasures: all sockets die with their processes; a network namespace in which anything
    was sent is not used again.
    """
    async with open_runner(slots=1) as runner:
        for _ in range(2):
            await runner.run(Job(argv=python(TALKING), policy=policy))
            found = achieved(await runner.run(Job(argv=python(LOOKING), policy=policy)))
            assert found["connect 127.0.0.1"] == found["connect ::1"] == "ECONNREFUSED"
            assert found["bind 127.0.0.1"] == found["bind ::1"] == found["udp"] == "ok"
            assert found["left"] == "EAGAIN"


SENDING = (
    NETWORK
    + """
datagrams = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
datagrams.bind(("127.0.0.1", 0))
datagrams.sendto(bytes(12345), datagrams.getsockname())
"""
)
COUNTING = (
    NETWORK
    + """
lines = reads("/proc/self/net/dev").splitlines()
found["bytes"] = next(int(line.split()[1]) for line in lines if line.split()[0] == "lo:")
"""
)


@every_policy
async def test_traffic_of_an_earlier_job(policy: str) -> None:
    """The counters of lo (proc_pid_net(5), rtnetlink(7)): how much an earlier job had to say.

    Countermeasure: a namespace is used again only if nothing was sent in it.
    """
    async with open_runner(slots=1) as runner:
        await runner.run(Job(argv=python(SENDING), policy=policy))
        for _ in range(3):
            found = achieved(await runner.run(Job(argv=python(COUNTING), policy=policy)))
            assert found["bytes"] == 0


FAILING = """
one, other = socket.socket(socket.AF_INET, 2), socket.socket(socket.AF_INET6, 2)
for _ in range(4711):
    tried(one.sendto, b"x", ("192.0.2.1", 1))
    tried(other.sendto, b"x", ("2001:db8::1", 1))
tried(socket.create_connection, ("192.0.2.1", 1))
"""
STATISTICS = """
for name in ("snmp", "snmp6", "netstat", "dev", "arp", "route", "igmp", "ip6_flowlabel"):
    found[name] = reads("/proc/self/net/" + name)
"""


@with_inet
async def test_counters_of_an_earlier_job(policy: str) -> None:
    """Counters count what fails, too (OutNoRoutes in /proc/net/snmp), and nothing sets them back.

    So a namespace keeps a number of a job's choice though no packet was ever sent (snmp_counter
    in the kernel's documentation). Countermeasure: one in which there can have been a socket of
    the internet is not used again.
    """
    runs = await in_turn(policy, STATISTICS, FAILING, STATISTICS, STATISTICS, STATISTICS)
    before, _, *after = runs
    assert [one["snmp"] for one in after] == [before["snmp"]] * 3
    assert after == [before] * 3


async def test_counters_under_a_rule_of_ones_own() -> None:
    """The same for a policy whose rule lets in sockets of one protocol only, by its number (UDP).

    Whether a namespace is used again must not be guessed from protocol 0: socket(2), ip(7).
    """
    of_udp = (Argument(index=0, op="eq", value=2), Argument(index=2, op="eq", value=17))
    rules = ("@sockets-unix", Rule(calls=("socket",), args=of_udp), "@no-namespaces", "@guards")
    syscalls = msgspec.structs.replace(find("base").syscalls, rules=rules)
    policy = find("base", syscalls=syscalls)
    failing = """
one = socket.socket(socket.AF_INET, socket.SOCK_DGRAM, 17)
for _ in range(4711):
    tried(one.sendto, b"x", ("192.0.2.1", 1))
"""
    runs = await in_turn(policy, STATISTICS, failing, *[STATISTICS] * 6)
    before, _, *after = runs
    assert after == [before] * 6


LABELLING = (
    NETWORK
    + """
IPV6_FLOWLABEL_MGR, CREATE, ANYBODY, LINGER = 32, 1, 255, 100
target = socket.inet_pton(socket.AF_INET6, "2001:db8::5ec:2e7")  # 16 bytes of one's choice
wanted = target + struct.pack("!I", 0x12345)
wanted += struct.pack("BBHHHI", 0, ANYBODY, CREATE, 0, LINGER, 0)
one = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
found["made"] = tried(one.setsockopt, socket.IPPROTO_IPV6, IPV6_FLOWLABEL_MGR, wanted)
"""
)
READING = (
    NETWORK
    + """
found["labels"] = reads("/proc/self/net/ip6_flowlabel").splitlines()[1:]
"""
)


@with_inet
async def test_flow_labels_of_an_earlier_job(policy: str) -> None:
    """IPv6 flow labels outlive their socket by minutes, with 16 bytes of their maker's choice.

    A note for whoever has the network namespace next (net/ipv6/ip6_flowlabel.c). Countermeasure:
    a namespace in which there can have been such sockets is not used again.
    """
    async with open_runner(slots=1) as runner:
        first = achieved(await runner.run(Job(argv=python(LABELLING), policy=policy)))
        assert first["made"] in ("EPERM", "EAFNOSUPPORT", "ENOPROTOOPT")
        for _ in range(3):
            found = achieved(await runner.run(Job(argv=python(READING), policy=policy)))
            assert found["labels"] == []


SYSTEM_V = """
IPC_CREAT = 0o1000
os.umask(0)
queue = (ctypes.c_long * 8)(0, 1, 16)
def made(flags):
    found["shm"] = tried(call, "shmget", 4711, 4096, flags | 0o666)
    found["sem"] = tried(call, "semget", 4711, 1, flags | 0o666)
    found["msg"] = tried(call, "msgget", 4711, flags | 0o666)
    found["mq"] = tried(call, "mq_open", b"attack", 0o2 | (0o100 if flags else 0), 0o666, queue)
"""


@any_uid
@pytest.mark.needs("landlock")
async def test_ipc_objects(policy: str) -> None:
    """System V and POSIX queues, semaphores, shared memory: sysvipc(7), mq_overview(7).

    They outlive their makers. Countermeasure: an IPC namespace for each sandbox. (Landlock knows
    no path to a POSIX queue, so it admits none; it is off here for these to be made at all.)
    """
    making, looking = SYSTEM_V + "made(IPC_CREAT)", SYSTEM_V + "made(0)"
    weaken = without(plan.Landlock)
    first, second = await in_turn(policy, making, looking, weaken=weaken)
    assert set(first.values()) == {"ok"}
    assert set(second.values()) == {"ENOENT"}
    found = await beside(policy, making, looking)
    assert found.pop("mq") in ("EACCES", "ENOENT")
    assert set(found.values()) == {"ENOENT"}
    weaken = both(weaken, without_namespace("ipc"))
    _, second = await in_turn(policy, making, looking, weaken=weaken)
    assert set(second.values()) == {"ok"}


FILES = """
for place in ("/tmp", "/box", "/dev/shm", "/var/tmp", "/run", "/proc/self/cwd", "/mnt", "/lower"):
    found[place] = [name for name in os.listdir(place)] if os.path.isdir(place) else []
"""
LEAVING = (
    FILES
    + """
for place in list(found):
    tried(os.mkdir, place + "/left")
    tried(lambda: open(place + "/left/file", "w").write("left"))
    tried(os.chmod, place, 0o777)
tried(lambda: open("/dev/shm/sem.left", "w").write("left"))
held = call("memfd_create", b"left", 0)
os.write(held, b"left")
"""
)


@every_policy
async def test_files_of_another_job(policy: str) -> None:
    """/tmp, /dev/shm and the working directory, at the same time and afterwards: shm_overview(7).

    Countermeasures: one fresh tmpfs for each sandbox, which dies with it. Files copied in for
    one job are not there for the next.
    """
    async with open_runner(slots=1, spares=1) as runner:
        for _ in range(3):
            job = Job(argv=python(LEAVING), policy=policy, files={"input": b"x"})
            found = achieved(await runner.run(job))
            assert found.pop("/box") == found.pop("/proc/self/cwd") == ["input"]
            assert not any(found.values()), found
    assert not any((await beside(policy, LEAVING, FILES)).values())


@any_uid
async def test_keyrings(policy: str) -> None:
    """The user and session keyrings are one for all processes of a uid: keyrings(7), crun#1148.

    Countermeasures: seccomp; since Linux 5.3 the user's keyring is one for each user namespace.
    (The session's is inherited all the same, and quotas are one for each user.)
    """
    leaving = "found['left'] = tried(call, 'add_key', b'user', b'attack', b'secret', 6, -4)"
    looking = "found['key'] = tried(call, 'keyctl', 10, -4, b'user', b'attack', 0)"
    first, second = await in_turn(policy, leaving, looking)
    assert (first["left"], second["key"]) == ("EPERM", "EPERM")
    weaken = without(plan.Filter)
    first, second = await in_turn(policy, leaving, looking, weaken=weaken)
    assert (first["left"], second["key"]) == ("ok", "ENOKEY")


@any_uid
async def test_memory_of_another_job(policy: str) -> None:
    """futex(2), pidfd and process_vm access by number: nothing to name another job's process by.

    Countermeasure: PID namespaces.
    """
    body = """
text = ctypes.create_string_buffer(8)
part = (ctypes.c_uint64 * 2)(ctypes.addressof(text), 8)
for pid in range(3, 200):
    for name, arguments in (("pidfd_open", (pid, 0)), ("kill", (pid, 0)),
                            ("process_vm_readv", (pid, part, 1, part, 1, 0)),
                            ("sched_setaffinity", (pid, 8, part))):
        found.setdefault(name, []).append(tried(call, name, *arguments))
found = {name: sorted(set(answers)) for name, answers in found.items()}
"""
    found = await beside(policy, "held = os.getpid()", body)
    assert {answer for answers in found.values() for answer in answers} <= {"ESRCH", "EPERM"}
    assert found["kill"] == ["ESRCH"]


async def test_a_network_that_serves_again_is_out_of_reach() -> None:
    """What an earlier job did in a network namespace cannot be told where nobody can do anything.

    Countermeasure: only under a filter that lets nobody have any socket but unix ones is it lent
    again (compile/network.py); every other job gets one that nobody was in.
    """
    body = """
import errno, socket
families = {}
for family in range(46):
    for kind in (1, 2, 3, 5):
        if family != socket.AF_UNIX:
            families[tried(call, "socket", family, kind, 0)] = family
found["families"] = sorted(families)
found["network"] = os.readlink("/proc/self/ns/net")
"""
    async with open_runner(slots=1) as runner:
        seen = {}
        for policy in ("judge-native", "base"):
            found = [
                achieved(await runner.run(Job(argv=python(body), policy=policy))) for _ in range(6)
            ]
            seen[policy] = {one["network"] for one in found}
            if policy == "judge-native":
                assert {name for one in found for name in one["families"]} == {"EAFNOSUPPORT"}
    # A number is given out again when its namespace is gone, so "base" may show one twice.
    assert len(seen["judge-native"]) < 6
