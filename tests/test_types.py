"""Types print as the dump shows them, and read back."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from colocc.errors import LayoutError
from colocc.layout import Layout
from colocc.types import ITEMSIZE, Dim, Type

LAYOUT = Layout(tp=2, dp=4)


def make(*dims: Dim, dtype: str = "bf16", batch: int | None = 0, is_open: bool = False) -> Type:
    return Type(dtype, dims, "images", LAYOUT, batch, is_open)


@pytest.mark.parametrize(
    ("value", "text", "local"),
    [
        (make(Dim(8, 1, ("dp",)), Dim(1, 576)), "bf16[8@dp,576]", "[2,576]"),
        (make(Dim(8, 576, ("dp",)), Dim(1, 64)), "bf16[8*576@dp,64]", "[1152,64]"),
        (make(Dim(0, 1, ("dp",)), dtype="?", is_open=True), "?[B@dp,...]", "[B/4,...]"),
        (make(Dim(1, 3), Dim(8, 1, ("dp",)), batch=1), "bf16[3,8@dp]", "[3,2]"),
        (make(batch=None, dtype="f32"), "f32[]", "[]"),
        (make(Dim(1, 5), batch=None, dtype="i64"), "i64[5]", "[5]"),
        (make(Dim(0, 4, ("dp",))), "bf16[B*4@dp]", "[B/4]"),
    ],
)
def test_prints_the_global_and_the_local_shape(value: Type, text: str, local: str) -> None:
    assert str(value) == text
    assert value.local() == local
    assert Type.parse(text, "images", LAYOUT) == value


LONG = Layout(tp=2, cp=4, sp=True)


@pytest.mark.parametrize(
    ("text", "local", "batch", "sequence"),
    [
        ("bf16[8@dp,576@tp@cp,4096]", "[8,72,4096]", 0, 1),
        ("bf16[576@tp@cp,8@dp,4096]", "[72,8,4096]", 1, 0),
        ("bf16[8*576@tp@cp@dp,4096]", "[576,4096]", 0, 0),
        ("bf16[8@dp,576@cp]", "[8,144]", 0, 1),
    ],
)
def test_a_sequence_that_axes_cut(text: str, local: str, batch: int, sequence: int) -> None:
    value = Type.parse(text, "language", LONG)
    assert (str(value), value.local()) == (text, local)
    assert (value.batch, value.sequence) == (batch, sequence)


def test_on_cuts_the_sequence_as_the_reader_does() -> None:
    whole = replace(make(Dim(8, 1, ("dp",)), Dim(1, 576), Dim(1, 64)), sequence=1)
    moved = whole.on("language", LONG)
    assert (str(moved), moved.local()) == ("bf16[8@dp,576@tp@cp,64]", "[8,72,64]")
    assert str(moved.on("images", LAYOUT)) == str(whole)
    flat = replace(make(Dim(8, 576, ("dp",)), Dim(1, 64)), sequence=0).on("language", LONG)
    assert (str(flat), flat.local()) == ("bf16[8*576@tp@cp@dp,64]", "[576,64]")


def test_a_sequence_that_the_reader_cannot_cut_is_refused() -> None:
    whole = replace(make(Dim(8, 1, ("dp",)), Dim(1, 575)), sequence=1)
    with pytest.raises(LayoutError, match=r"what language reads of images.* 575 % 8 = 7"):
        whole.on("language", LONG)
    with pytest.raises(
        LayoutError, match=r"images: .* has no dim 2, which is to hold the sequence"
    ):
        whole.cut(2, "images")


dims = st.builds(
    lambda samples, rows: Dim(samples, rows, ("dp",)), st.integers(0, 64), st.integers(1, 999)
)
sizes = st.integers(0, 4096).map(lambda size: Dim(1, size))


@given(
    dtype=st.sampled_from(sorted(ITEMSIZE)),
    batch=dims,
    before=st.lists(sizes, max_size=2),
    after=st.lists(sizes, max_size=3),
)
def test_parse_is_the_inverse_of_str(
    dtype: str, batch: Dim, before: list[Dim], after: list[Dim]
) -> None:
    value = make(*before, batch, *after, dtype=dtype, batch=len(before))
    assert Type.parse(str(value), "images", LAYOUT) == value


@pytest.mark.parametrize(
    "text",
    [
        *("", "bf16", "bf16[", "bf17[8]", "bf16[8@qp]", "bf16[x]", "bf16[-1]", "bf16[8**2@dp]"),
        *("bf16[...,8]", "bf16[8] ", "bf16[8]\n", "__import__('os')[8]", f"bf16[{'9' * 40}]"),
    ],
)
def test_other_text_is_refused(text: str) -> None:
    with pytest.raises(LayoutError, match="write"):
        Type.parse(text, "images", LAYOUT)


@given(st.text(max_size=40))
def test_any_text_is_a_type_or_a_layout_error(text: str) -> None:
    try:
        value = Type.parse(text, "images", LAYOUT)
    except LayoutError as error:
        assert repr(text)[:5] in str(error)
    else:
        assert Type.parse(str(value), "images", LAYOUT) == value


def test_bytes_of_one_sample() -> None:
    assert make(Dim(8, 576, ("dp",)), Dim(1, 64)).bytes_per_sample() == 576 * 64 * 2
    assert make(Dim(1, 3), Dim(8, 1, ("dp",)), batch=1, dtype="f64").bytes_per_sample() == 24
    assert make(Dim(0, 1, ("dp",)), is_open=True).bytes_per_sample() is None
    assert make(Dim(1, 3), batch=None).bytes_per_sample() is None


def test_on_moves_the_same_tensor_to_another_layout() -> None:
    value = make(Dim(8, 1, ("dp",)), Dim(1, 4))
    reader = Layout(tp=2, pp=2, dp=2)
    moved = value.on("language", reader, (0,))
    assert (moved.module, moved.layout, moved.stages) == ("language", reader, (0,))
    assert str(moved) == str(value)
    assert moved.local() == "[4,4]"
