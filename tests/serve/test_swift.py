"""What is read without h11 is read as h11 reads it; everything else is left to that."""

from __future__ import annotations

import h11
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sandboxd.serve import swift

PLAIN = b"POST /v1/jobs?wait=1 HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n{}"
LEFT = {
    "in chunks": PLAIN.replace(b"Content-Length: 2", b"Transfer-Encoding: chunked"),
    "to be asked for": PLAIN.replace(b"Host: x", b"Host: x\r\nExpect: 100-continue"),
    "the last one": PLAIN.replace(b"Host: x", b"Host: x\r\nConnection: close"),
    "two hosts": PLAIN.replace(b"Host: x", b"Host: x\r\nhost: y"),
    "two lengths": PLAIN.replace(b"Host: x", b"Host: x\r\nContent-Length: 2"),
    "no host": PLAIN.replace(b"Host: x\r\n", b""),
    "not all of it": PLAIN[:-1],
    "more than that": PLAIN + b"G",
    "an older one": PLAIN.replace(b"HTTP/1.1", b"HTTP/1.0"),
    "another method": PLAIN.replace(b"POST", b"PUT"),
    "a method in small letters": PLAIN.replace(b"POST", b"post"),
    "a folded line": PLAIN.replace(b"Host: x", b"Host: x\r\n y"),
    "line feeds alone": PLAIN.replace(b"\r\n", b"\n"),
    "a header nobody knows": PLAIN.replace(b"Host: x", b"Host: x\r\nA: b"),
    "a space before the colon": PLAIN.replace(b"Host:", b"Host :"),
    "a value of no ASCII": PLAIN.replace(b"Host: x", b"Host: \xff"),
    "a length that is none": PLAIN.replace(b": 2", b": +2"),
}


def by_h11(data: bytes) -> tuple[str, str, dict[str, str], bytes]:
    machine = h11.Connection(h11.SERVER)
    machine.receive_data(data)
    head = machine.next_event()
    assert isinstance(head, h11.Request)
    body = b""
    while isinstance(event := machine.next_event(), h11.Data):
        body += event.data
    assert isinstance(event, h11.EndOfMessage)
    assert machine.their_state is h11.DONE  # and another may follow
    assert machine.trailing_data == (b"", False)
    headers = {name.decode(): value.decode() for name, value in head.headers}
    assert len(headers) == len(head.headers)
    return head.method.decode(), head.target.decode(), headers, body


def check(data: bytes) -> bool:
    found = swift.read(data)
    if found is None:
        return False
    assert (found.method, found.target, found.headers, found.body) == by_h11(data)
    assert found.data == data
    return True


def test_a_plain_one_is_read() -> None:
    assert check(PLAIN)
    assert check(b"GET / HTTP/1.1\r\nHOST:x\r\nAccept: */*, a\r\nuser-agent: a b/1\r\n\r\n")


@pytest.mark.parametrize("why", LEFT)
def test_what_is_not_plain_is_left_to_h11(why: str) -> None:
    assert swift.read(LEFT[why]) is None


NAMES = [b"Host", b"host", b"Content-Length", b"Accept", b"Authorization", b"Connection", b"A", b""]
lines = st.builds(
    lambda name, gap, value: name + gap + value,
    st.sampled_from(NAMES),
    st.sampled_from([b":", b": ", b":  ", b" :", b":\t", b""]),
    st.sampled_from(
        [b"x", b"0", b"2", b"02", b"a b", b"a  b", b" a", b"a ", b"", b"\xff", b"a\tb"]
    ),
)
wholes = st.builds(
    lambda first, headers, end, body: end.join([first, *headers, b"", body]),
    st.sampled_from(
        [b"GET / HTTP/1.1", b"POST /a?b HTTP/1.1", b"GET /\xff HTTP/1.1", b"GET  / HTTP/1.1"]
    ),
    st.lists(lines, max_size=4),
    st.sampled_from([b"\r\n", b"\n"]),
    st.sampled_from([b"", b"ab", b"{}\r\n"]),
)


@given(wholes)
def test_it_is_read_as_h11_does(data: bytes) -> None:
    check(data)


@given(st.integers(0, len(PLAIN) - 1), st.binary(max_size=3), st.integers(0, 3))
def test_so_is_one_with_a_fault_in_it(at: int, put: bytes, gone: int) -> None:
    check(PLAIN[:at] + put + PLAIN[at + gone :])


def test_a_reply_is_one_to_h11() -> None:
    machine = h11.Connection(h11.CLIENT)
    machine.send(h11.Request(method="GET", target="/", headers=[("Host", "x")]))
    machine.send(h11.EndOfMessage())
    machine.receive_data(swift.written(404, [("A", "b")], b"body"))
    head = machine.next_event()
    assert isinstance(head, h11.Response)
    assert (head.status_code, head.reason, head.http_version) == (404, b"Not Found", b"1.1")
    assert list(head.headers) == [(b"a", b"b"), (b"content-length", b"4")]
    data = machine.next_event()
    assert isinstance(data, h11.Data)
    assert data.data == b"body"
    with pytest.raises(ValueError, match="line"):
        swift.written(200, [("A", "b\r\nC: d")], b"")
