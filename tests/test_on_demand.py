from functools import partial

import mlx.core as mx
import pytest
from conftest import worst
from mlx.utils import tree_flatten

from mlxlora.base import load, open_frozen
from mlxlora.export.merged import Merged
from mlxlora.export.on_demand import fetching
from mlxlora.export.streamed import logits_at

INPUTS = mx.array([[1, 2, 3, 4, 5], [9, 8, 7, 6, 5]])


@pytest.mark.parametrize("kind", ["dense_path", "quantized_path", "experts_path"])
def test_it_is_the_model_with_those_weights(kind, request):
    path = request.getfixturevalue(kind)
    weights = dict(Merged.of(path).tensors())
    asked = []

    def fetch(name):
        asked.append(name)
        return weights[name] * 2

    def opened():
        return fetching(open_frozen(path)[0], {name: partial(fetch, name) for name in weights})

    plain = fetching(open_frozen(path)[0], {name: partial(weights.get, name) for name in weights})
    assert worst(plain(INPUTS), load(path).model(INPUTS)) < 1e-5
    model = opened()
    at_once = len(asked)
    assert at_once < len(weights)  # only vectors
    logits = logits_at(opened, INPUTS, mx.arange(10))
    assert worst(logits, model(INPUTS).reshape(10, -1)) < 1e-6
    assert worst(logits, load(path).model(INPUTS).reshape(10, -1)) > 1e-2
    held = sum(a.nbytes for _, a in tree_flatten(model.parameters()))
    assert held < sum(a.nbytes for a in weights.values()) / 10


def test_other_weights_are_refused(dense_path):
    weights = dict(Merged.of(dense_path).tensors())
    fetches = {name: partial(weights.get, name) for name in weights}
    with pytest.raises(ValueError, match=r"model\.norm\.weight"):
        fetching(
            open_frozen(dense_path)[0],
            {k: v for k, v in fetches.items() if k != "model.norm.weight"},
        )
    fetches["model.norm.weight"] = lambda: mx.zeros(3)
    with pytest.raises(ValueError, match=r"model\.norm\.weight is \(3,\)"):
        fetching(open_frozen(dense_path)[0], fetches)
