"""The admin messages and their bytes."""

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from filer.admin.protocol import (
    EXIT_MISCONFIGURED,
    BadMessage,
    Failure,
    LineSplitter,
    Progress,
    Request,
    Result,
    decode_reply,
    decode_request,
    encode,
    failure_of,
)
from filer.errors import Corrupt, Misconfigured, OutcomeUnknown, Refused


@given(st.binary(max_size=64))
def test_paths_of_any_bytes_survive_the_trip(name: bytes) -> None:
    request = Request("flush", {"path": os.fsdecode(name)})

    line = encode(request)

    assert line.isascii()
    assert line.count(b"\n") == 1
    assert os.fsencode(decode_request(line).arguments["path"]) == name


@pytest.mark.parametrize("message", [
    Progress(3, None, "files", "reading"),
    Progress(3, 9),
    Result({"a": [1, {"b": None}]}),
    Failure("refused", "no", "do this", 1),
])
def test_every_reply_survives_the_trip(message) -> None:
    assert decode_reply(encode(message)) == message


@pytest.mark.parametrize("line", [
    b"", b"{}", b"[]", b"null", b"\xff\xfe", b'{"type":"request"}', b'{"type":"nonsense"}',
    b'{"type":"request","verb":7,"arguments":{}}', b'{"type":"request","verb":"x","arguments":[]}',
    b"[" * 100_000,
])
def test_what_is_no_request_is_refused_as_such(line: bytes) -> None:
    with pytest.raises(BadMessage):
        decode_request(line)


@given(st.lists(st.binary(max_size=20).filter(lambda b: b"\n" not in b)), st.integers(1, 7))
def test_lines_come_out_whole_however_the_bytes_arrive(lines: list[bytes], step: int) -> None:
    stream = b"".join(line + b"\n" for line in lines)
    splitter = LineSplitter()

    out = [
        line
        for start in range(0, len(stream), step)
        for line in splitter.feed(stream[start:start + step])
    ]

    assert out == lines


def test_a_line_without_end_is_refused_before_it_fills_the_memory() -> None:
    splitter = LineSplitter(line_bytes_max=10)
    assert splitter.feed(b"0123456789") == []

    with pytest.raises(BadMessage, match="longer than 10"):
        splitter.feed(b"x")


def test_the_operators_own_mistakes_have_their_own_exit_status_and_hint() -> None:
    failure = failure_of(Misconfigured("no such policy", "use read"))

    assert failure == Failure(
        "misconfigured", "no such policy", "use read", EXIT_MISCONFIGURED)


@pytest.mark.parametrize(("error", "kind"), [
    (OutcomeUnknown("lost"), "try-again"),
    (Refused(28, "/a"), "refused"),
    (Corrupt("page 7"), "corrupt"),
])
def test_errors_are_told_by_what_the_caller_must_do(error, kind) -> None:
    assert failure_of(error).kind == kind
