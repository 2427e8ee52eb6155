"""Callers of a daemon, as light as they can be: what is measured is the daemon, and not they.

One process with one epoll: each caller has a connection that is kept, sends the same bytes again as
soon as its answer is there, and looks at no more of that than where it ends. By itself:
python tests/bench/load.py SOCKET CALLERS JOBS BODY prints what it took, as JSON.
"""

from __future__ import annotations

import json
import select
import socket
import sys
import time

PIECE = 1 << 20
LENGTH = b"\r\ncontent-length: "


def request(body: bytes) -> bytes:
    head = b"POST /v1/jobs?wait=1 HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n"
    return head % len(body) + body


def complete(answer: bytearray) -> bool:
    """Whether all of it is there; ValueError where it is no good one."""
    end = answer.find(b"\r\n\r\n")
    if end < 0:
        return False
    if not answer.startswith(b"HTTP/1.1 200 "):
        raise ValueError(bytes(answer[:200]))
    head = answer[:end].lower() + b"\r\n"
    at = head.index(LENGTH) + len(LENGTH)
    return len(answer) == end + 4 + int(head[at : head.index(b"\r", at)])


def load(path: str, callers: int, jobs: int, body: bytes) -> dict[str, float]:
    """`seconds` that all took, and of each one `p50` and `p99`; our own CPU time is `cpu`."""
    asking, poll, links = request(body), select.epoll(), {}
    began, used, left = time.monotonic(), time.process_time(), jobs
    taken: list[float] = []
    for _ in range(min(callers, jobs)):
        link = socket.socket(socket.AF_UNIX)
        link.connect(path)
        poll.register(link, select.EPOLLIN)
        links[link.fileno()] = (link, bytearray(), [time.monotonic()])
        link.sendall(asking)
        left -= 1
    while len(taken) < jobs:
        for handle, _ in poll.poll():
            link, answer, since = links[handle]
            answer += link.recv(PIECE)
            if not complete(answer):
                continue
            answer.clear()
            now = time.monotonic()
            taken.append(now - since[0])
            if left:
                left -= 1
                since[0] = now
                link.sendall(asking)
    seconds = time.monotonic() - began
    for link, _, _ in links.values():
        link.close()
    taken.sort()
    return {
        "seconds": seconds,
        "p50": taken[len(taken) // 2],
        "p99": taken[len(taken) * 99 // 100],
        "cpu": time.process_time() - used,
    }


if __name__ == "__main__":
    path, callers, jobs, body = sys.argv[1:]
    print(json.dumps(load(path, int(callers), int(jobs), body.encode())))
