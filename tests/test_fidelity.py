"""Every figure against the same computed in numpy from whole models."""

import mlx.core as mx
import numpy as np
import pytest
from conftest import randomized
from mlx_lm import load as mlx_lm_load

from mlxlora.base import load, open_frozen
from mlxlora.config import LoraConfig
from mlxlora.export.fidelity import Change, Fidelity, measure
from mlxlora.export.fuse import fuse
from mlxlora.export.trial import trial
from mlxlora.lora.attach import attach
from mlxlora.lora.fresh import collect, new_layers
from mlxlora.quantized import widen


def adapted(base, **lora):
    config = LoraConfig(rank=4, **lora)
    new_layers(base.model, config, 0)
    randomized(base.model)
    return collect(base.model, config, {"base": base.identity.to_dict()})


def fused(base, adapter, out, bits):
    fuse(base, adapter, out, bits, proof=None)
    return lambda: open_frozen(out)[0]


@pytest.mark.parametrize("bits", [4, 8])
def test_losses_divergence_and_agreement(quantized, tmp_path, bits):
    adapter = adapted(quantized, targets=("all-linear", "embed_tokens"))
    rows = trial(quantized.tokenizer)
    found = measure(
        quantized.path, adapter, fused(quantized, adapter, tmp_path / "fused", bits), rows
    )
    inputs, places = mx.array(rows.batch.inputs), rows.batch.positions

    def logs(model):
        logits = np.array(model(inputs).astype(mx.float32), np.float64)
        logits = logits.reshape(-1, logits.shape[-1])[places]
        return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))

    base = load(quantized.path)
    bare = logs(base.model)
    attach(base.model, adapter)
    trained = logs(base.model)
    written = logs(mlx_lm_load(str(tmp_path / "fused"))[0])
    for q, loss, kl, same in (
        (bare, found.loss_base, found.kl_base, found.agreement_base),
        (written, found.loss_written, found.kl, found.agreement),
    ):
        assert loss == pytest.approx(-q[range(len(q)), rows.batch.targets].mean(), rel=1e-4)
        assert kl == pytest.approx((np.exp(trained) * (trained - q)).sum(1).mean(), rel=1e-3)
        assert same == pytest.approx((q.argmax(1) == trained.argmax(1)).mean(), abs=2e-3)
    own = -trained[range(len(trained)), rows.batch.targets].mean()
    assert found.loss_adapter == pytest.approx(own, rel=1e-4)
    assert found.tokens == len(places)


@pytest.mark.parametrize("kind", ["quantized", "experts"])
def test_every_touched_layer_is_compared(kind, request, tmp_path):
    base = request.getfixturevalue(kind)
    adapter = adapted(base)
    written = fused(base, adapter, tmp_path / "fused", 8 if kind == "quantized" else "keep")
    found = measure(base.path, adapter, written, trial(base.tokenizer))
    assert {one.layer for one in found.layers} == set(adapter.modules)
    modules = dict(load(base.path).model.named_modules())
    theirs = dict(written().named_modules())
    for one in found.layers:
        before = np.array(widen(modules[one.layer]), np.float64)
        a, b = adapter.tensors(one.layer).values()
        product = (a @ b).T if a.ndim == 2 else b @ a
        delta = adapter.scale * np.array(product, np.float64)
        change = np.array(widen(theirs[one.layer]), np.float64) - before
        error = np.linalg.norm(change - delta) / np.linalg.norm(delta)
        assert one.weight_error == pytest.approx(error, rel=1e-2, abs=1e-5)
        assert one.output_error == pytest.approx(error, rel=0.9, abs=1e-4)
        assert one.output_cosine > 0.99


def test_outputs_are_weighed_by_the_layers_own_inputs(quantized, tmp_path):
    adapter = adapted(quantized)
    rows = trial(quantized.tokenizer)
    written = fused(quantized, adapter, tmp_path / "fused", 4)
    found = {one.layer: one for one in measure(quantized.path, adapter, written, rows).layers}
    base = load(quantized.path)
    attach(base.model, adapter)
    # The first layer's inputs can be had without running the model.
    block = base.model.layers[0]
    x = block.input_layernorm(base.model.model.embed_tokens(mx.array(rows.batch.inputs)))
    x = np.array(x.reshape(-1, 64), np.float64)[rows.batch.positions]
    path = "model.layers.0.self_attn.q_proj"
    layer = block.self_attn.q_proj
    delta = np.array(layer.scale * (layer.lora_a @ layer.lora_b).T, np.float64)
    change = np.array(widen(dict(written().named_modules())[path]) - widen(layer.base), np.float64)
    trained, seen = x @ delta.T, x @ change.T
    error = np.linalg.norm(seen - trained) / np.linalg.norm(trained)
    cosine = (seen * trained).sum() / np.linalg.norm(seen) / np.linalg.norm(trained)
    assert found[path].output_error == pytest.approx(error, rel=0.05)
    assert found[path].output_cosine == pytest.approx(cosine, rel=0.05)


def test_a_base_without_an_adapter_is_compared_with_itself(quantized, tmp_path):
    found = measure(
        quantized.path, None, lambda: open_frozen(quantized.path)[0], trial(quantized.tokenizer)
    )
    assert (found.kl, found.kl_base, found.agreement, found.layers) == (0, 0, 1, ())
    assert found.kept is None


def test_dora_and_whole_weights_are_measured(quantized, tmp_path):
    for number, lora in enumerate(({"method": "dora"}, {"train_also": ("norm", "embed_tokens")})):
        adapter = adapted(load(quantized.path), **lora)
        written = fused(quantized, adapter, tmp_path / str(number), "none")
        found = measure(quantized.path, adapter, written, trial(quantized.tokenizer))
        assert found.kl < 1e-6 < found.kl_base


def test_the_verdict():
    def of(base, adapter, written, kl_base=1.0, kl=0.0):
        return Fidelity("rows", True, 9, base, adapter, written, kl_base, kl, 0.5, 1.0)

    assert of(5.0, 1.0, 2.0).kept == 0.75
    assert of(5.0, 5.0, 5.0).kept is None
    assert of(5.0, 6.0, 5.0).kept is None
    assert (of(5, 1, 2, kl_base=9).limit, of(5, 1, 2, kl_base=0.001).limit) == (0.1, 0.01)
    assert of(5, 1, 2, kl_base=0.1).limit == 0.05
    layers = (Change("a", 1, 0, 1, 0.1), Change("b", 1, 0, None, None), Change("c", 1, 0, 1, 0.9))
    found = Fidelity("rows", True, 9, 5, 1, 2, 1, 0, 0.5, 1, layers)
    assert [one.layer for one in found.worst(2)] == ["c", "a"]
    assert found.to_dict()["kept"] == 0.75 and found.to_dict()["layers"][0]["layer"] == "a"
