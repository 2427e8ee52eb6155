"""The script's format and its builder: what is written where."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sandboxd.script.record import (
    BASE,
    HEADER_SIZE,
    NO_CALL,
    NO_TAG,
    OFFSETS,
    RECORD_SIZE,
    Assembler,
    Condition,
    Image,
    Record,
)


def words(image: Image, address: int, count: int = 1) -> tuple[int, ...]:
    offset = address - image.origin
    return struct.unpack(f"<{count}Q", image.content[offset : offset + 8 * count])


# -- records


@given(st.lists(st.integers(-(2**63), 2**63 - 1), min_size=12, max_size=12))
def test_a_record_survives_packing(fields: list[int]) -> None:
    record = Record(*fields)
    assert Record.unpack(record.pack()) == record
    assert record.pack() == struct.pack("<12q", *fields)


def test_fields_stand_where_the_machines_expect_them() -> None:
    assert dict(OFFSETS) == {
        "nr": 0, "a0": 8, "a1": 16, "a2": 24, "a3": 32, "a4": 40, "a5": 48,
        "store": 56, "flags": 64, "compare": 72, "target": 80, "result": 88,
    }  # fmt: skip
    assert len(Record(0).pack()) == RECORD_SIZE == 96


def test_unsigned_words_are_packed_as_they_are() -> None:
    assert Record(0, 2**64 - 1).pack() == Record(0, -1).pack()


@pytest.mark.parametrize(
    ("nr", "result", "errno"),
    [(0, -1, 1), (0, -4095, 4095), (0, -4096, 0), (0, 0, 0), (0, 5, 0), (NO_CALL, -1, 0)],
)
def test_the_errno_of_a_record(nr: int, result: int, errno: int) -> None:
    assert Record(nr, result=result).errno == errno


def test_the_condition_of_a_record() -> None:
    assert Record(0, flags=Condition.EQUAL << 8 | 1).condition is Condition.EQUAL


# -- layout


def test_head_then_records_then_data_then_space() -> None:
    asm = Assembler()
    handler, cell, space = asm.label(), asm.cell(7), asm.space(100)
    start = asm.emit(1, cell, space)
    asm.place(handler)
    asm.emit(2)
    image = asm.finish([handler, cell, start])
    first, data = BASE + HEADER_SIZE, BASE + HEADER_SIZE + 2 * RECORD_SIZE
    assert words(image, BASE, 8) == (first + RECORD_SIZE, data, first, 0, 0, 0, 0, 0)
    assert image.records_offset == HEADER_SIZE
    assert image.record(0) == Record(1, data, data + 8)
    assert image.record(1) == Record(2)
    assert words(image, data) == (7,)
    assert len(image.content) == data + 8 - BASE
    assert image.memory == data + 8 - BASE + 100


def test_without_a_head_the_origin_is_the_first_record() -> None:
    asm = Assembler(0x20000000)
    asm.emit(3)
    image = asm.finish()
    assert (image.records_offset, image.address(0)) == (0, 0x20000000)


def test_a_head_may_be_longer_than_one_line() -> None:
    asm = Assembler()
    start = asm.emit(3)
    image = asm.finish([*range(11), start])
    assert image.records_offset == 128
    assert words(image, BASE, 12) == (*range(11), BASE + 128)


def test_the_same_calls_give_the_same_bytes() -> None:
    def build() -> Image:
        asm = Assembler()
        asm.emit(1, asm.string(b"a"), asm.pointers([asm.string(b"b"), asm.string(b"a")]))
        return asm.finish()

    assert build().content == build().content


def test_finishing_twice_changes_nothing() -> None:
    asm = Assembler()
    asm.emit(1, asm.string(b"a"), asm.space(8))
    assert asm.finish() == asm.finish()


# -- emitting


def test_labels_and_fields_are_known_before_the_record_is() -> None:
    asm = Assembler()
    later = asm.label()
    asm.emit(1, store=later.field("a2"), when=Condition.ZERO, target=later)
    asm.place(later)
    asm.emit(2)
    image = asm.finish()
    second = image.address(1)
    assert image.record(0) == Record(
        1, store=second + OFFSETS["a2"], flags=Condition.ZERO << 8, target=second
    )


def test_several_labels_may_mean_one_record() -> None:
    asm = Assembler()
    one, other = asm.label(), asm.label()
    asm.place(one)
    asm.place(other)
    record = asm.emit(1, one, other)
    image = asm.finish([record])
    assert image.record(0).a0 == image.record(0).a1 == words(image, BASE)[0] == image.address(0)


def test_a_jump_is_a_constant_that_always_goes_on_elsewhere() -> None:
    asm = Assembler()
    start = asm.emit(1)
    asm.jump(start)
    image = asm.finish()
    assert image.record(1) == Record(NO_CALL, flags=Condition.ALWAYS << 8, target=image.address(0))


def test_ignore_and_compare_are_encoded() -> None:
    asm = Assembler()
    cell, there = asm.cell(), asm.label()
    asm.emit(1, -100, ignore=True, when=Condition.EQUAL, compare=cell, target=there)
    asm.place(there)
    asm.emit(2)
    image = asm.finish()
    assert image.record(0) == Record(
        1,
        -100,
        flags=Condition.EQUAL << 8 | 1,
        compare=image.address(2),
        target=image.address(1),
    )


def test_tags_map_an_address_to_a_step() -> None:
    asm = Assembler()
    asm.emit(1)
    asm.tag = 4
    asm.emit(2)
    asm.emit(3, tag=5)
    image = asm.finish([0])
    assert image.tags == (NO_TAG, 4, 5)
    assert [image.tag(image.address(index)) for index in range(3)] == [NO_TAG, 4, 5]
    assert image.number(image.address(2)) == 2


@pytest.mark.parametrize("distance", [-RECORD_SIZE, 1, 8, RECORD_SIZE])
def test_an_address_without_a_record_has_no_index(distance: int) -> None:
    asm = Assembler()
    asm.emit(1)
    image = asm.finish([0])
    with pytest.raises(ValueError, match="no record at"):
        image.number(image.address(0) + distance)


# -- data


def test_strings_are_shared_and_data_is_not() -> None:
    asm = Assembler()
    asm.emit(1, asm.string(b"x"), asm.string(b"x"), asm.data(b"x"), asm.data(b"x"))
    image = asm.finish()
    record = image.record(0)
    assert record.a0 == record.a1
    assert len({record.a1, record.a2, record.a3}) == 3
    assert image.content[record.a0 - image.origin :].startswith(b"x\0")


def test_pointers_end_with_null() -> None:
    asm = Assembler()
    name = asm.string(b"sh")
    asm.emit(1, name, asm.pointers([name, name + 1]))
    image = asm.finish()
    record = image.record(0)
    assert words(image, record.a1, 3) == (record.a0, record.a0 + 1, 0)


def test_data_and_space_are_aligned() -> None:
    asm = Assembler()
    odd, line, page = asm.data(b"x", align=1), asm.data(b"y", align=64), asm.space(9, align=4096)
    asm.emit(1, odd, line, page, asm.words([1]))
    image = asm.finish()
    record = image.record(0)
    assert (record.a1 % 64, record.a2 % 4096, record.a3 % 8) == (0, 0, 0)
    assert image.content[record.a1 - image.origin] == ord("y")
    assert image.memory == record.a2 + 9 - image.origin


# -- marks


def test_marks_are_patched_and_the_rest_stays() -> None:
    asm = Assembler()
    cell = asm.cell(1)
    record = asm.emit(1, 10, 20, cell)
    asm.mark("cell", cell)
    asm.mark("second", record.field("a1"))
    asm.mark("head", asm.origin + 8)
    image = asm.finish([5, 6])
    patched = image.patched({"cell": 2**64 - 1, "second": -3, "head": 7})
    assert len(patched) == len(image.content)
    assert struct.unpack("<8Q", patched[:64])[:3] == (5, 7, 0)
    assert Record.unpack(patched[64:160]) == Record(1, 10, -3, image.address(1))
    assert patched[160:] == b"\xff" * 8
    assert image.patched({}) == image.content


def test_an_unknown_mark_is_an_error() -> None:
    with pytest.raises(KeyError):
        Assembler().finish().patched({"typo": 1})


def test_a_mark_must_lie_in_the_content() -> None:
    asm = Assembler()
    asm.mark("space", asm.space(8))
    with pytest.raises(ValueError, match="outside"):
        asm.finish()


def test_a_mark_has_one_place() -> None:
    asm = Assembler()
    asm.mark("cell", asm.cell())
    with pytest.raises(ValueError, match="already"):
        asm.mark("cell", asm.cell())


# -- mistakes


def test_a_label_that_is_used_has_to_be_placed() -> None:
    asm = Assembler()
    asm.jump(asm.label())
    with pytest.raises(ValueError, match="not placed"):
        asm.finish()


def test_a_label_needs_a_record_behind_it() -> None:
    asm = Assembler()
    end = asm.label()
    asm.jump(end)
    asm.place(end)
    with pytest.raises(ValueError, match="after the last record"):
        asm.finish()


def test_a_label_is_placed_once() -> None:
    asm = Assembler()
    label = asm.place(asm.label())
    asm.emit(1)
    with pytest.raises(ValueError, match="already"):
        asm.place(label)


def test_a_condition_and_its_target_belong_together() -> None:
    asm = Assembler()
    with pytest.raises(ValueError, match="needs a target"):
        asm.emit(1, when=Condition.ZERO)
    with pytest.raises(ValueError, match="needs a target"):
        asm.emit(1, target=BASE)
    with pytest.raises(ValueError, match="compare"):
        asm.emit(1, when=Condition.EQUAL, target=BASE)
    with pytest.raises(ValueError, match="compare"):
        asm.emit(1, when=Condition.ZERO, target=BASE, compare=BASE)


def test_a_call_takes_six_arguments() -> None:
    with pytest.raises(ValueError, match="six"):
        Assembler().emit(1, 1, 2, 3, 4, 5, 6, 7)


def test_a_string_ends_at_its_end() -> None:
    with pytest.raises(ValueError, match="NUL"):
        Assembler().string(b"a\0b")
