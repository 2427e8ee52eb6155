"""DNS messages against dnspython, and against bytes that are none."""

from __future__ import annotations

from ipaddress import ip_address

import dns.flags
import dns.message
import dns.name
import dns.rcode
import dns.rdatatype
import dns.rrset
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sandboxd.compile import dns as ours

LABELS = st.text("abcdefghijklmnopqrstuvwxyz0123456789-_", min_size=1, max_size=20)
NAMES = st.lists(LABELS, min_size=1, max_size=5).map(".".join)


@given(NAMES, st.sampled_from([ours.A, ours.AAAA]), st.integers(0, 65535))
def test_a_question_is_what_others_read(name: str, kind: int, number: int) -> None:
    read = dns.message.from_wire(ours.query(number, name, kind))
    assert read.id == number
    assert read.flags & dns.flags.RD
    assert read.question[0].name == dns.name.from_text(name)
    assert read.question[0].rdtype == kind
    assert read.payload == ours.BUFFER


@given(NAMES, st.sampled_from(["A", "AAAA", "TXT", "HTTPS", "PTR"]), st.booleans())
def test_questions_of_others_are_read(name: str, kind: str, extended: bool) -> None:
    written = dns.message.make_query(name, kind, use_edns=extended)
    read = ours.read_query(written.to_wire())
    assert (read.name, read.kind) == (name, dns.rdatatype.from_text(kind))
    assert read.number == written.id
    assert ours.is_standard(read)


ADDRESSES = st.lists(st.ip_addresses(v=4), max_size=60)


@given(NAMES, ADDRESSES, st.integers(0, 1 << 30))
def test_an_answer_is_what_others_read(name: str, addresses: list[object], lifetime: int) -> None:
    asked = dns.message.make_query(name, "A")
    query = ours.read_query(asked.to_wire())
    texts = [str(one) for one in addresses]
    wire = ours.answer(query, ours.NOERROR, [ip_address(one) for one in texts], lifetime)
    assert len(wire) <= ours.MOST_PLAIN
    read = dns.message.from_wire(wire)
    assert asked.is_response(read)
    found = [record.address for one in read.answer for record in one]
    assert set(found) <= set(texts)
    assert bool(found) == bool(texts)
    if len(texts) <= 10:
        assert set(found) == set(texts)
        assert all(one.ttl == lifetime for one in read.answer)


def response(*sets: str, question: str = "a.example", kind: str = "A") -> ours.Answer:
    """What dnspython writes, with its compression."""
    asked = dns.message.make_query(question, kind)
    answer = dns.message.make_response(asked)
    for text in sets:
        name, ttl, rdtype, *data = text.split()
        answer.answer.append(dns.rrset.from_text(name + ".", int(ttl), "IN", rdtype, *data))
    return ours.read_answer(answer.to_wire())


def test_aliases_are_followed() -> None:
    found = response(
        "a.example 300 CNAME b.example.",
        "b.example 60 CNAME c.other.",
        "c.other 600 A 192.0.2.1 192.0.2.2",
        "unasked.example 600 A 192.0.2.3",
        "a.example 5 TXT text",
    )
    addresses, lifetime = ours.addresses(found)
    assert sorted(map(str, addresses)) == ["192.0.2.1", "192.0.2.2"]
    assert lifetime == 60


@pytest.mark.parametrize(
    "sets",
    [
        ["a.example 300 CNAME a.example."],
        ["a.example 300 CNAME b.example.", "b.example 300 CNAME a.example."],
        ["a.example 300 CNAME b.example."],
        ["b.example 300 A 192.0.2.1"],
        ["a.example 300 AAAA 2001:db8::1"],
        [f"{chr(97 + n)}.example 1 CNAME {chr(98 + n)}.example." for n in range(20)],
        [],
    ],
)
def test_what_leads_nowhere(sets: list[str]) -> None:
    assert ours.addresses(response(*sets)) == ([], 0)


def test_letters_have_no_case() -> None:
    asked = dns.message.make_query("PaCkAgEs.Example.ORG", "A")
    assert ours.read_query(asked.to_wire()).name == "packages.example.org"


def test_bytes_that_no_name_has_match_nothing() -> None:
    asked = dns.message.make_query(dns.name.Name([b"a.b", b"\0\xff", b"org", b""]), "A")
    assert ours.read_query(asked.to_wire()).name == "a\\000b.\\000\\000.org"


def test_answers_are_no_questions() -> None:
    asked = dns.message.make_query("a.example", "A")
    with pytest.raises(ours.DnsError):
        ours.read_query(dns.message.make_response(asked).to_wire())
    with pytest.raises(ours.DnsError):
        ours.read_answer(asked.to_wire())


def test_pointers_end() -> None:
    head = bytes.fromhex("000101000001000000000000")
    for name in ("c00c", "c00d00", "c0ff", "01610161c00c", "c0", "ff", "40", "80", "3f61", ""):
        with pytest.raises(ours.DnsError):
            ours.read_query(head + bytes.fromhex(name))


@given(st.binary(max_size=300))
def test_any_bytes(data: bytes) -> None:
    for read in (ours.read_query, ours.read_answer):
        try:
            read(data)
        except ours.DnsError:
            continue
