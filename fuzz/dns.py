"""Whatever bytes come as a DNS message, they are understood or DnsError is raised, nothing else.

What is understood is answered in a form that can be read again. Runs under atheris where that is
installed, else on chance alone: fuzz/dns.py [RUNS [SEED]].
"""

from __future__ import annotations

import random
import sys

from sandboxd.compile import dns

PIECES = (
    b"\x00\x01\x01\x00\x00\x01" + bytes(6), b"\x12\x34\x81\x80\x00\x01\x00\x02" + bytes(4),
    b"\x01a\x07example\x00", b"\xc0\x0c", b"\xc0\x00", b"\x3f", b"\x40", b"\x00\x01\x00\x01",
    b"\x00\x1c\x00\x01", b"\x00\x05\x00\x01\x00\x00\x00\x01\x00\x02\xc0\x0c", b"\0", b"\xff",
    b"\x00\x01\x00\x01\x00\x00\x00\x3c\x00\x04\x0a\x00\x00\x01",
)  # fmt: skip


def one_input(data: bytes) -> None:
    try:
        query = dns.read_query(data)
    except dns.DnsError:
        pass
    else:
        whole = dns.answer(query, dns.NXDOMAIN)
        again = dns.read_answer(whole)
        assert (again.number, again.code, again.kind) == (query.number, 3, query.kind), data
        assert again.name == query.name, data
    try:
        answer = dns.read_answer(data)
    except dns.DnsError:
        return
    addresses, lifetime = dns.addresses(answer)
    assert lifetime >= 0, data
    assert len(addresses) <= len(answer.records), data


def by_chance(runs: int, seed: int) -> None:
    chance = random.Random(seed)
    for _ in range(runs):
        parts = [chance.choice(PIECES) for _ in range(chance.randrange(12))]
        data = bytearray(b"".join(parts))
        for _ in range(chance.randrange(4) if data else 0):
            data[chance.randrange(len(data))] = chance.randrange(256)
        one_input(bytes(data))
    print(f"{runs} runs from seed {seed}: all understood or refused")


def main() -> None:
    try:
        import atheris
    except ImportError:
        numbers = [int(word) for word in sys.argv[1:]]
        by_chance(numbers[0] if numbers else 100_000, numbers[1] if len(numbers) > 1 else 1)
        return
    argv = sys.argv if len(sys.argv) > 1 else [*sys.argv, "-runs=200000", "-max_len=512"]
    atheris.instrument_all()
    atheris.Setup(argv, one_input)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
