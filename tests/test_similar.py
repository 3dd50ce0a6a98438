"""Near rows: every pair that is found is near, and hardly one is missed; by exact sets."""

import itertools
import random

import numpy as np
import pytest
from conftest import write_rows

from mlxlora.config import DataConfig
from mlxlora.data.inspect.scan import scan
from mlxlora.data.inspect.similar import (
    MOST_PAIRS,
    NEAR,
    _densified,
    _keys,
    find_similar,
    text_of,
)

WORDS = [f"{a}{b}{c}" for a in "bcdfg" for b in "aeiou" for c in "lmnrst"]
NOTHING = np.zeros(1 << 22, bool)


def silent(what, done, of):
    pass


def table_of(path, rows):
    write_rows(path, [{"text": text} for text in rows])
    return scan(DataConfig(path=str(path.parent)), 0, silent)


def jaccard(a, b):
    """By Python's own sets of 8-byte pieces."""
    one, other = ({t[i : i + 8] for i in range(len(t) - 7)} for t in (a, b))
    return len(one & other) / len(one | other)


def text(random_, words=60):
    return " ".join(random_.choices(WORDS, k=words))


def changed(random_, original, count):
    words = original.split()
    for place in random_.sample(range(len(words)), count):
        words[place] = random_.choice(WORDS)
    return " ".join(words)


def test_what_is_near_is_what_exact_sets_say(tmp_path):
    random_ = random.Random(5)
    originals = [text(random_) for _ in range(60)]
    rows = originals + [changed(random_, originals[n], 1 + n % 8) for n in range(60)]
    table = table_of(tmp_path / "train.jsonl", rows)
    order = np.arange(len(rows))
    found = find_similar(table, order, order[:0], silent)
    spoken = [text_of(table.record(row)) for row in range(len(rows))]
    near = {b: a for a, b in itertools.combinations(range(len(rows)), 2)
            if jaccard(spoken[a], spoken[b]) >= NEAR}  # fmt: skip
    marked = {int(row): int(found.copies[row]) for row in np.flatnonzero(found.copies >= 0)}
    assert set(marked.items()) <= set(near.items())  # nothing that is not
    assert len(near) > 15 and len(marked) >= 0.9 * len(near)  # and nearly all that is
    assert found.complete


def test_a_prompt_that_all_rows_share_makes_them_not_near(tmp_path):
    random_ = random.Random(1)
    shared = text(random_, 200)
    rows = [f"{shared} {text(random_, 15)}" for _ in range(80)]
    rows.append(rows[3] + " also")
    table = table_of(tmp_path / "train.jsonl", rows)
    assert jaccard(*(text_of(table.record(row)) for row in (0, 1))) > NEAR
    found = find_similar(table, np.arange(81), np.arange(0), silent)
    assert {int(r): int(found.copies[r]) for r in np.flatnonzero(found.copies >= 0)} == {80: 3}


def test_system_prompts_case_and_spaces_are_not_compared():
    from mlxlora.data.formats import parse

    one = parse({"system": "be kind", "prompt": "Say  HELLO\n", "completion": "Ｈi"}, {})
    other = parse({"system": "be strict", "prompt": "say hello", "completion": "hi"}, {})
    assert text_of(one) == text_of(other) == b"say hello hi"


def test_agreement_of_bins_estimates_the_similarity():
    random_ = random.Random(2)
    original = text(random_, 300)
    other = changed(random_, original, 30)
    exact = jaccard(original.encode(), other.encode())
    from mlxlora.data.inspect import similar

    seen = []
    real = similar._band_keys
    similar._band_keys = lambda sketch: (seen.append(sketch), real(sketch))[1]
    try:
        _keys([original.encode(), other.encode()], NOTHING)
    finally:
        similar._band_keys = real
    estimate = (seen[0][0] == seen[0][1]).mean()
    assert abs(estimate - exact) < 0.13  # three standard deviations of 128 bins


def test_blocks_do_not_mix_their_rows():
    random_ = random.Random(3)
    texts = [text(random_, n).encode() for n in (5, 40, 2, 80)]
    together, enough = _keys(texts, NOTHING)
    for place, one in enumerate(texts):
        alone, alone_enough = _keys([one], NOTHING)
        assert alone_enough[0] == enough[place]
        if enough[place]:
            assert (alone[0] == together[place]).all()


def test_empty_bins_are_all_filled_and_full_ones_left():
    none = np.uint64(0xFFFFFFFFFFFFFFFF)
    sketch = np.full((3, 128), none)
    sketch[0, 5], sketch[1, ::2], sketch[2, :] = 9, 4, 1
    full = _densified(sketch)
    assert (full != none).all() and (full[0] == 9).all()
    assert (full[sketch != none] == sketch[sketch != none]).all()


def test_a_limit_on_pairs_is_said(tmp_path, monkeypatch):
    random_ = random.Random(4)
    original = text(random_)
    rows = [changed(random_, original, 1) for _ in range(9)] + [text(random_) for _ in range(60)]
    table = table_of(tmp_path / "train.jsonl", rows)
    monkeypatch.setattr("mlxlora.data.inspect.similar.MOST_PAIRS", 3)
    found = find_similar(table, np.arange(69), np.arange(0), silent)
    assert not found.complete and found.compared == 3 < MOST_PAIRS


@pytest.mark.parametrize("rows", [["a"], ["short", "short"], ["", " "]])
def test_rows_too_short_to_compare_are_left_alone(tmp_path, rows):
    table = table_of(tmp_path / "train.jsonl", rows)
    found = find_similar(table, np.arange(len(rows)), np.arange(0), silent)
    assert (found.copies < 0).all()
