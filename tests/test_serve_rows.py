"""Several adapters in one batch, compared with each attached alone."""

from pathlib import Path

import mlx.core as mx
import pytest
from conftest import worst
from serving import adapter_for
from zoo import FAMILIES, model_of

from mlxlora.base import Base
from mlxlora.lora.attach import attach, detach
from mlxlora.model_files import Identity
from mlxlora.serve.batch.adapters import Adapters
from mlxlora.serve.batch.rows import Row, Rows, RowsLinear, Tag

IDENTITY = Identity("tiny", "", "", "none", "none")
APART = {"gpt_oss", "deepseek_v2"}  # with experts among the layers that are trained


def mixed_logits(adapters, rows, slots, tokens):
    adapters.stage.show(adapters.mixed)
    rows.let([Row(slot) for slot in slots])
    logits = adapters.base.model(tokens)
    mx.eval(logits)
    adapters.stage.show(None)
    return logits


def alone(base, adapter, tokens):
    if adapter is not None:
        attach(base.model, adapter)
    logits = base.model(tokens[None])
    mx.eval(logits)
    detach(base.model)
    return logits[0]


@pytest.fixture(params=["dense", "quantized"])
def base(request):
    return request.getfixturevalue(request.param)


def test_each_row_answers_as_its_adapter_does_alone(base):
    rows = Rows()
    adapters = Adapters(base, rows, slots=4)
    trained = {
        "one": adapter_for(base, 1, rank=4),
        "wide": adapter_for(base, 2, rank=11),
        "few": adapter_for(base, 3, targets=("*.q_proj", "*.down_proj")),
    }
    for name, adapter in trained.items():
        assert adapters.load(name, adapter).form is None
    tokens = mx.random.randint(0, 256, (5, 9), key=mx.random.key(0))
    order = ["wide", None, "few", "one", "wide"]
    slots = [adapters.get(name).slot for name in order]
    logits = mixed_logits(adapters, rows, slots, tokens)
    for row, name in enumerate(order):
        assert worst(logits[row], alone(base, trained.get(name), tokens[row])) < 1e-5


def test_a_batch_of_one_adapter_gathers_nothing(base, monkeypatch):
    rows = Rows()
    adapters = Adapters(base, rows, slots=2)
    adapter = adapter_for(base, 1)
    adapters.load("one", adapter)
    calls = []
    gather = mx.gather_mm
    monkeypatch.setattr(mx, "gather_mm", lambda *a, **k: calls.append(1) or gather(*a, **k))
    tokens = mx.random.randint(0, 256, (3, 5), key=mx.random.key(0))
    logits = mixed_logits(adapters, rows, [1, 1, 1], tokens)
    assert not calls
    assert worst(logits[2], alone(base, adapter, tokens[2])) < 1e-5
    mixed_logits(adapters, rows, [1, 0, 1], tokens)
    assert calls


def test_a_slot_is_used_again_and_nothing_of_the_last_one_stays(dense):
    rows = Rows()
    adapters = Adapters(dense, rows, slots=1)
    adapters.load("one", adapter_for(dense, 1, rank=8))
    adapters.unload("one")
    second = adapter_for(dense, 2, rank=3, targets=("*.q_proj",))
    assert adapters.load("two", second).slot == 1
    tokens = mx.random.randint(0, 256, (2, 5), key=mx.random.key(0))
    logits = mixed_logits(adapters, rows, [1, 0], tokens)
    assert worst(logits[0], alone(dense, second, tokens[0])) < 1e-5


def test_a_slot_adds_nothing_where_only_its_last_adapter_had_factors(dense):
    rows = Rows()
    adapters = Adapters(dense, rows, slots=2)
    adapters.load("both", adapter_for(dense, 1, targets=("*.q_proj", "*.down_proj")))
    adapters.unload("both")
    narrow, other = adapter_for(dense, 2, targets=("*.q_proj",)), adapter_for(dense, 3)
    adapters.load("narrow", narrow)
    adapters.load("other", other)  # beside it, every layer gathers
    tokens = mx.random.randint(0, 256, (2, 9), key=mx.random.key(2))
    logits = mixed_logits(adapters, rows, [1, 2], tokens)
    assert worst(logits[0], alone(dense, narrow, tokens[0])) < 1e-5
    assert worst(logits[1], alone(dense, other, tokens[1])) < 1e-5


def test_one_adapter_adds_nothing_where_only_another_has_factors(dense):
    rows = Rows()
    layer = RowsLinear(dense.model.layers[0].mlp.up_proj, rows, 2, mx.float32)
    layer.put(1, mx.ones((64, 2)), mx.ones((2, 128)), 1.0)
    rows.let([Row(2), Row(0)])
    x = mx.random.normal((2, 3, 64))
    assert mx.array_equal(layer(x), layer.base(x))


def test_the_tag_moves_with_the_rows():
    rows = [Row(n) for n in range(4)]
    tag = Tag.merge([Tag(rows[:2]), Tag(rows[2:3])])
    tag.extend(Tag(rows[3:]))
    tag.filter([3, 1])
    assert tag.rows == [rows[3], rows[1]]
    assert tag.extract(1).rows == [rows[1]]


@pytest.mark.parametrize("family", FAMILIES)
def test_of_every_family_rows_are_mixed_right_or_not_at_all(family):
    """The trial at loading finds out which layers can tell their rows apart."""
    base = Base(model_of(family), None, {}, Path(family), IDENTITY)
    rows = Rows()
    adapters = Adapters(base, rows, slots=2)
    trained = [adapter_for(base, seed) for seed in (1, 2)]
    served = [adapters.load(str(n), one) for n, one in enumerate(trained)]
    assert (served[0].form is not None) == (family in APART)
    if family in APART:
        return
    tokens = mx.random.randint(0, 60, (3, 6), key=mx.random.key(0))
    logits = mixed_logits(adapters, rows, [2, 0, 1], tokens)
    for row, adapter in ((0, trained[1]), (1, None), (2, trained[0])):
        assert worst(logits[row], alone(base, adapter, tokens[row])) < 1e-4
