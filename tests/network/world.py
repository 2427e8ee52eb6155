"""An Internet to reach, a host in it, and a runner on that host; no packet leaves this machine.

Started by tests/network/conftest.py in namespaces of its own (user, network, mount, pid). Its own
network is the Internet: servers listen there, at addresses that are public, private, link-local.
`tests/network/host.py` is the host: a network namespace with a default route to here. Servers say
who they are; the name server has a table, and remembers what it was asked.
"""

from __future__ import annotations

import os
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Callable
from ipaddress import ip_address

from tests.network.places import ADDRESSES, NAME_SERVER, NAMES, OUTSIDE, PORTS


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, stdin=subprocess.DEVNULL)


def answer_tcp(server: socket.socket, who: str) -> None:
    """Say who one is, then echo; "flood N" is answered with N bytes, "sink" with how many came."""
    while True:
        one, _ = server.accept()
        threading.Thread(target=talk, args=(one, who), daemon=True).start()


def talk(one: socket.socket, who: str) -> None:
    with one:
        try:
            one.sendall(f"{who}\n".encode())
            while data := one.recv(65536):
                if data.startswith(b"flood "):
                    size, block = int(data.split()[1]), bytes(1 << 20)
                    for _ in range(size >> 20):
                        one.sendall(block)
                    one.sendall(bytes(size & (1 << 20) - 1))
                    return
                if data.startswith(b"sink"):
                    size = len(data)
                    while data := one.recv(1 << 20):
                        size += len(data)
                    one.sendall(b"%d" % size)
                    return
                one.sendall(data)
        except OSError:
            return


def answer_udp(server: socket.socket, who: str) -> None:
    while True:
        data, sender = server.recvfrom(65536)
        server.sendto(f"{who} ".encode() + data, sender)


def encoded(name: str) -> bytes:
    return b"".join(bytes([len(one)]) + one.encode() for one in name.split(".")) + b"\0"


def records(name: str, kind: int) -> bytes:
    """The answer section for a name: `NAMES` has addresses, "@alias", or a lifetime before them."""
    found = b""
    count = 0
    while name in NAMES:
        for entry in NAMES[name]:
            seconds, _, text = entry.rpartition(" ")
            lifetime = int(seconds or 30)
            if text.startswith("@"):
                content, its = encoded(text[1:]), 5
            else:
                content = ip_address(text).packed
                its = 1 if len(content) == 4 else 28
            if its in (kind, 5):
                found += encoded(name) + struct.pack(">HHIH", its, 1, lifetime, len(content))
                found += content
                count += 1
        alias = [one for one in NAMES[name] if one.startswith("@")]
        name = alias[0][1:] if alias else ""
    return struct.pack(">H", count) + found


def reply(data: bytes, limit: int) -> bytes:
    labels, at = [], 12
    while data[at]:
        labels.append(data[at + 1 : at + 1 + data[at]].decode())
        at += 1 + data[at]
    kind = struct.unpack_from(">H", data, at + 1)[0]
    name = ".".join(labels)
    found = records(name, kind)
    code = 2 if name == "broken.example.org" else 0 if name in NAMES else 3
    question = data[12 : at + 5]
    whole = data[:2] + struct.pack(">HH", 0x8180 | code, 1) + found[:2] + bytes(4) + question
    whole += found[2:]
    if len(whole) > limit:
        return data[:2] + struct.pack(">HHHHH", 0x8380, 1, 0, 0, 0) + question
    return whole


def name_server_udp(server: socket.socket, _: str) -> None:
    while True:
        data, sender = server.recvfrom(65536)
        if b"\x06forged" in data:
            for forged in forgeries(data):
                server.sendto(forged, sender)
        if b"\x06silent" not in data:
            server.sendto(reply(data, 1232), sender)


def forgeries(data: bytes) -> list[bytes]:
    """What is no answer to this question: nothing, rubbish, another number, another name."""
    evil = reply(data.replace(b"\x06forged\x07example\x03org", b"\x04evil\x07example\x03com"), 1232)
    other = bytes([data[0] ^ 1]) + reply(data, 1232)[1:]
    return [b"", os.urandom(40), data, other, evil, reply(data, 1232)[:-3]]


def name_server_tcp(server: socket.socket, _: str) -> None:
    while True:
        one, _ = server.accept()
        with one:
            size = int.from_bytes(one.recv(2))
            data = reply(one.recv(size), 65535)
            if b"\x04torn" in data:  # in the middle, and not to the end
                one.sendall(len(data).to_bytes(2) + data[:100])
                one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                continue
            one.sendall(len(data).to_bytes(2) + data)


def serve(address: str, port: int, kind: int, what: Callable[[socket.socket, str], None]) -> None:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    server = socket.socket(family, kind)
    server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    server.bind((address, port))
    if kind == socket.SOCK_STREAM:
        server.listen(64)
    threading.Thread(target=what, args=(server, f"{address} {port}"), daemon=True).start()


def main() -> None:
    ip("link", "set", "lo", "up")
    ip("link", "add", "wan", "type", "veth", "peer", "name", "eth0")
    command = ["unshare", "--net", sys.executable, "-P", "-m", "tests.network.host"]
    host = subprocess.Popen(command, stdin=subprocess.PIPE)
    # unshare(1) executes the host once it has its namespace, and the host says so by its name.
    while os.readlink(f"/proc/{host.pid}/ns/net") == os.readlink("/proc/self/ns/net"):
        os.sched_yield()
    ip("link", "set", "eth0", "netns", str(host.pid))
    for address, bits in OUTSIDE:
        ip("addr", "add", f"{address}/{bits}", "dev", "wan", *(["nodad"] if ":" in address else []))
    ip("link", "set", "wan", "up")
    for address in ADDRESSES:
        six = ":" in address
        ip("addr", "add", f"{address}/{128 if six else 32}", "dev", "lo",
           *(["nodad"] if six else []))  # fmt: skip
        for port in PORTS:
            serve(address, port, socket.SOCK_STREAM, answer_tcp)
            serve(address, port, socket.SOCK_DGRAM, answer_udp)
    for address in NAME_SERVER:
        serve(address, 53, socket.SOCK_DGRAM, name_server_udp)
        serve(address, 53, socket.SOCK_STREAM, name_server_tcp)
    assert host.stdin is not None
    threading.Thread(target=lambda: os._exit(host.wait()), daemon=True).start()
    for line in sys.stdin.buffer:  # the host's requests, once there is somebody to reach
        host.stdin.write(line)
        host.stdin.flush()
    host.stdin.close()
    sys.exit(host.wait())


if __name__ == "__main__":
    main()
