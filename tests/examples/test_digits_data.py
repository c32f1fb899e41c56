"""Covers examples/digits_data.py."""

import pytest
import torch
from sklearn.datasets import load_digits

from examples import digits_data as data


@pytest.mark.parametrize("digit", range(10))
def test_read_inverts_spell(digit: int) -> None:
    tokens = data.spell(digit)
    assert data.read(tokens) == data.NAMES[digit]
    assert data.read([*tokens, *tokens]) == data.NAMES[digit]
    assert tokens[-1] == data.EOS
    assert len(tokens) <= data.NAME_LENGTH


def test_read_shows_what_the_model_should_not_write() -> None:
    assert data.read([data.VOCABULARY_SIZE - 1, data.PAD]) == "?<pad>"


def test_the_two_parts_are_all_scans_stratified() -> None:
    train, held_out = data.load()
    assert (len(train), len(held_out)) == (1437, 360)
    whole = torch.cat([train.pixels, held_out.pixels]).flatten(1)
    raw = torch.from_numpy(load_digits().data).float()
    restored = (whole * data.SPREAD + data.MEAN).round()
    assert sorted(restored.tolist()) == sorted(raw.tolist())
    counts = torch.bincount(held_out.digits, minlength=10)
    assert counts.min() >= 34
    assert counts.max() <= 37


def test_the_split_is_the_same_in_every_run() -> None:
    assert torch.equal(data.load()[1].pixels, data.load()[1].pixels)


def test_prompt_places_written_letters_after_the_question() -> None:
    batch = data.prompt(torch.zeros(3, 8, 8), torch.tensor([[7, 8]] * 3))
    ids = batch["input_ids"]
    assert ids.shape == (3, data.LENGTH)
    assert (ids == data.IMAGE).sum(dim=1).tolist() == [data.PATCHES] * 3
    start = len(data.PROMPT)
    assert ids[0, start - 1 : start + 3].tolist() == [data.VOCABULARY.index("is"), 7, 8, data.PAD]
    assert "labels" not in batch


def test_lesson_asks_for_the_name_and_nothing_else() -> None:
    digits = torch.arange(10)
    batch = data.lesson(data.Scans(torch.zeros(10, 8, 8), digits))
    for digit in range(10):
        asked = batch["labels"][digit][batch["loss_mask"][digit] > 0].tolist()
        assert asked == data.spell(digit)
    # A label is the input one place later.
    shown, asked = batch["input_ids"][:, 1:], batch["labels"][:, :-1]
    places = (batch["loss_mask"][:, :-1] > 0) & (asked != data.EOS)
    assert torch.equal(shown[places], asked[places])


def lessons(seed: int = 0) -> data.Lessons:
    return data.Lessons(data.load()[0], 64, 4, seed)


def test_lessons_depend_on_seed_and_step_alone() -> None:
    first = torch.cat([b["labels"] for b in lessons().step(30)])
    assert torch.equal(first, torch.cat([b["labels"] for b in lessons().step(30)]))
    assert not torch.equal(first, torch.cat([b["labels"] for b in lessons().step(31)]))
    assert not torch.equal(first, torch.cat([b["labels"] for b in lessons(seed=1).step(30)]))


def test_an_epoch_shows_each_scan_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "disturb", lambda pixels, generator: pixels)
    source = lessons()
    steps = [source.step(step) for step in range(source.per_epoch)]
    assert {len(batch["labels"]) for step in steps for batch in step} == {16}
    seen = [
        tuple(pixels.flatten().tolist())
        for step in steps
        for batch in step
        for pixels in batch["modality_inputs"]["images"]["vit"]["pixel_values"]
    ]
    assert len(seen) == 22 * 64
    assert len(set(seen)) == len(seen)


def test_disturb_moves_some_scans_by_one_pixel() -> None:
    scans = torch.zeros(400, 8, 8)
    scans[:, 3, 4] = 100.0
    moved = data.disturb(scans, torch.Generator().manual_seed(0)).flatten(1).argmax(dim=1)
    rows, columns = moved // 8, moved % 8
    assert {*rows.tolist()} == {2, 3, 4}
    assert {*columns.tolist()} == {3, 4, 5}
    stayed = ((rows == 3) & (columns == 4)).float().mean()
    assert 0.6 < stayed < 0.85
