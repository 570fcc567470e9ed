"""Numbered sequences of files."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from filer.cache.sequence import DIRECTORIES_MAX, Sequences, successors
from filer.ids import InodeId

SHOTS, PLATES = InodeId(1), InodeId(2)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (b"shot.0101.exr", [b"shot.0102.exr", b"shot.0103.exr"]),
        (b"shot.099.exr", [b"shot.100.exr", b"shot.101.exr"]),
        (b"shot.999.exr", [b"shot.1000.exr", b"shot.1001.exr"]),
        (b"v2_shot_07", [b"v2_shot_08", b"v2_shot_09"]),
        (b"9", [b"10", b"11"]),
        (b"\xff1\xfe", [b"\xff2\xfe", b"\xff3\xfe"]),
        (b"readme", []),
        (b"", []),
        (b"1" * 30, []),
    ],
)
def test_the_last_number_counts_up_and_keeps_its_width(
    name: bytes, expected: list[bytes]
) -> None:
    assert successors(name, 2) == expected


def test_the_group_that_counts_can_be_chosen() -> None:
    assert successors(b"f07.v2.exr", 1, 0) == [b"f08.v2.exr"]
    assert successors(b"f07.v2.exr", 1, 5) == []


@given(st.binary(max_size=5), st.integers(0, 10**6), st.integers(1, 8), st.integers(1, 5))
def test_names_are_those_that_formatting_gives(
    prefix: bytes, number: int, width: int, count: int
) -> None:
    prefix = prefix.translate(None, b"0123456789") + b"."

    def name(n: int) -> bytes:
        return prefix + b"%0*d" % (width, n) + b".exr"

    if len(b"%d" % number) <= width:
        assert successors(name(number), count) == [name(number + i) for i in range(1, count + 1)]


def test_one_name_proves_nothing_and_two_in_a_row_do() -> None:
    sequences = Sequences()

    assert sequences.on_read(SHOTS, b"a.0099.exr", 2) == []
    assert sequences.on_read(SHOTS, b"a.0100.exr", 2) == [b"a.0101.exr", b"a.0102.exr"]


def test_names_that_do_not_adjoin_prove_nothing() -> None:
    sequences = Sequences()
    for name in (b"a.0001.exr", b"a.0003.exr", b"b.0004.exr", b"a.0004.tif", b"a.0002.0003.exr"):
        assert sequences.on_read(SHOTS, name, 2) == [], name


def test_the_same_name_again_proves_nothing() -> None:
    sequences = Sequences()

    assert sequences.on_read(SHOTS, b"a.1", 1) == []
    assert sequences.on_read(SHOTS, b"a.1", 1) == []


def test_the_group_of_digits_that_changes_is_learnt() -> None:
    sequences = Sequences()
    sequences.on_read(SHOTS, b"f08.v2.exr", 2)

    assert sequences.on_read(SHOTS, b"f09.v2.exr", 2) == [b"f10.v2.exr", b"f11.v2.exr"]


def test_interleaved_sequences_of_one_directory_are_told_apart() -> None:
    sequences = Sequences()
    for name in (b"beauty.001", b"depth.001", b"beauty.002"):
        sequences.on_read(SHOTS, name, 1)

    assert sequences.on_read(SHOTS, b"depth.002", 1) == [b"depth.003"]
    assert sequences.on_read(SHOTS, b"beauty.003", 1) == [b"beauty.004"]


def test_directories_are_kept_apart() -> None:
    sequences = Sequences()
    sequences.on_read(SHOTS, b"a.1", 1)

    assert sequences.on_read(PLATES, b"a.2", 1) == []


def test_memory_of_directories_and_names_is_bounded() -> None:
    sequences = Sequences()
    for directory in range(2 * DIRECTORIES_MAX):
        sequences.on_read(InodeId(directory), b"a.1", 1)
    for number in range(1, 200):
        sequences.on_read(SHOTS, b"%d.x" % (3 * number), 1)

    assert sequences.directory_count == DIRECTORIES_MAX
    assert sequences.on_read(SHOTS, b"4.x", 1) == []
