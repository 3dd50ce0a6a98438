"""Fused models with chosen bits: what is planned is what plain mlx-lm loads and computes."""

import json
import time
from functools import partial

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from architectures import write_model as write_architecture
from conftest import DENSE, randomized, worst, write_model, write_tokenizer
from memory import peak
from mlx.utils import tree_flatten
from mlx_lm import load as mlx_lm_load

from mlxlora.base import load, open_model
from mlxlora.config import LoraConfig, RunConfig
from mlxlora.errors import ExportError
from mlxlora.export import auto, rounding, shards
from mlxlora.export import fuse as writer
from mlxlora.export.auto import Way, blocks, choose, scale_types, ways_of
from mlxlora.export.calibrate import visit_layers
from mlxlora.export.merged import Merged
from mlxlora.export.proof import Proof
from mlxlora.export.quantize import quantize
from mlxlora.export.trial import trial
from mlxlora.lora.adapter import Adapter
from mlxlora.lora.attach import attach, detach
from mlxlora.lora.fresh import collect, new_layers
from mlxlora.quantized import unpacked
from mlxlora.quickstart import story
from mlxlora.train.loop import train

TOKENS = mx.array([[1, 2, 3, 4, 5, 6]])
fuse = partial(writer.fuse, proof=None)


def adapted(base, size=0.1, **lora):
    """An adapter that adds something of this size, taken out again."""
    config = LoraConfig(rank=4, **lora)
    new_layers(base.model, config, 0)
    randomized(base.model)
    adapter = collect(base.model, config, {"base": base.identity.to_dict()})
    detach(base.model)
    weights = {n: size / 0.1 * a if n.endswith("lora_b") else a for n, a in adapter.weights.items()}
    return type(adapter)(**{**vars(adapter), "weights": weights})


def weights(directory):
    return sum(f.stat().st_size for f in directory.glob("model*.safetensors"))


@pytest.fixture(scope="session")
def experts4(experts_path):
    out = experts_path.parent / "experts-4bit"
    quantize(experts_path, out, bits=4, group_size=32)
    return out


@pytest.mark.parametrize("max_size", [1.0, 1.15, 1.3, 2.0, 8.0])
def test_the_limit_on_size_is_kept_and_used(quantized, tmp_path, max_size):
    adapter = adapted(quantized)
    fuse(quantized, adapter, tmp_path / "fused", max_size=max_size)
    size = weights(tmp_path / "fused") / weights(quantized.path)
    assert max_size - 0.15 < size <= max_size + 0.001 or size > 4


def test_plain_mlx_lm_loads_what_was_planned(quantized, tmp_path, monkeypatch):
    planned = {}
    monkeypatch.setattr(writer, "choose", lambda *a: planned.setdefault("ways", choose(*a)))
    adapter = adapted(quantized)
    fuse(quantized, adapter, tmp_path / "fused", max_size=1.6)
    model, _ = mlx_lm_load(str(tmp_path / "fused"))
    modules = dict(model.named_modules())
    assert set(planned["ways"]) == set(adapter.modules)
    assert len({way.bits for way in planned["ways"].values()}) > 1
    for path, way in planned["ways"].items():
        module = modules[path]
        assert ("bits" in vars(module)) == bool(way.bits)
        if way.bits:
            assert (module.bits, module.group_size) == (way.bits, way.group_size)
    attach(quantized.model, adapter)
    assert worst(model(TOKENS), quantized.model(TOKENS)) < 0.2


def test_it_is_nearer_to_the_trained_model_than_plain_rounding(quantized, tmp_path):
    adapter = adapted(quantized, 0.03)
    attach(quantized.model, adapter)
    rows = trial(quantized.tokenizer).inputs
    logits = quantized.model(rows)

    def error(name):
        fuse(quantized, adapter, tmp_path / name, name)
        off = load(tmp_path / name).model(rows) - logits
        return mx.square(off).mean().item()

    detach(quantized.model)
    assert error("auto") < 0.3 * error("keep")


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float32])
def test_an_adapter_that_does_nothing_leaves_every_byte_as_it_is(dense, tmp_path, dtype):
    source = mx.load(str(dense.path / "model.safetensors"))
    half = tmp_path / "half"
    half.mkdir()
    shards.copy_companions(dense.path, half)
    (half / "config.json").write_text((dense.path / "config.json").read_text())
    cast = {name: array.astype(dtype) for name, array in source.items()}
    mx.save_safetensors(str(half / "model.safetensors"), cast, {"format": "mlx"})
    quantize(half, tmp_path / "base", bits=4, group_size=32)
    base = load(tmp_path / "base")
    fuse(base, adapted(base, 0.0, targets=("all-linear", "embed_tokens")), tmp_path / "fused")
    before, after = (mx.load(str(tmp_path / d / "model.safetensors")) for d in ("base", "fused"))
    assert before.keys() == after.keys()
    for name, array in before.items():
        assert array.dtype == after[name].dtype and mx.array_equal(array, after[name]), name


@pytest.mark.parametrize("max_size", [1.15, 8.0])
def test_experts_are_rounded_too(experts4, tmp_path, max_size):
    base = load(experts4)
    adapter = adapted(base)
    attach(base.model, adapter)
    logits = base.model(TOKENS)
    fuse(base, adapter, tmp_path / "fused", max_size=max_size)
    model, _ = mlx_lm_load(str(tmp_path / "fused"))
    assert worst(model(TOKENS), logits) < (1.0 if max_size < 2 else 1e-3)


def test_each_expert_is_given_its_own_inputs(experts4):
    """Against the inputs as the experts' own module was called with them."""
    base = load(experts4)
    adapter = adapted(base)
    rows = trial(base.tokenizer, tokens=512)
    calls = {}
    merged = Merged(experts4, adapter)
    visit_layers(merged, rows, lambda given: calls.update({given.path: given.call}))
    attach(base.model, adapter)
    block = base.model.layers[0]
    path = "model.layers.0.mlp.switch_mlp.up_proj"
    h = base.model.model.embed_tokens(rows.inputs)
    h = h + block.self_attn(block.input_layernorm(h), mask="causal")
    x = block.post_attention_layernorm(h)
    chosen = mx.argpartition(-block.mlp.gate(x), kth=1, axis=-1)[..., :2]
    x, chosen = np.array(x).reshape(-1, 64), np.array(chosen).reshape(-1, 2)
    for expert in range(4):
        own = x[(chosen == expert).any(axis=1)]
        seen = calls[path].rows[calls[path].owners == expert]
        assert seen.shape == own.shape
        assert np.allclose(seen.T @ seen, own.T @ own, rtol=1e-3, atol=1e-3)
    ones = [calls[path].inputs(n, 4, slice(0, 64)).moments for n in range(2)]
    assert np.abs(ones[0] - ones[1]).max() > 1e-3


def test_padding_is_no_input_and_one_input_is_worked_on_once(quantized):
    rows = trial(quantized.tokenizer, tokens=1024)
    adapter = adapted(quantized)
    calls = {}
    merged = Merged(quantized.path, adapter)
    visit_layers(merged, rows, lambda given: calls.update({given.path: given.call}))
    first = "model.layers.0."
    assert calls[first + "self_attn.q_proj"] is calls[first + "self_attn.v_proj"]
    assert calls[first + "self_attn.q_proj"] is not calls[first + "self_attn.o_proj"]
    real = rows.rows + rows.batch.inputs.size - (rows.batch.inputs == 256).sum()
    assert len(calls[first + "mlp.up_proj"].rows) <= real
    attach(quantized.model, adapter)
    block = quantized.model.layers[0]
    x = block.input_layernorm(quantized.model.model.embed_tokens(rows.inputs))
    x = np.array(x).reshape(-1, 64)
    found = calls[first + "self_attn.q_proj"].rows
    last = max(rows.batch.positions % rows.inputs.shape[1])
    assert np.allclose(found[: last // 2], x[: last // 2], atol=1e-5)


@pytest.mark.parametrize("kind", ["deepseek_v2", "gpt_oss", "gpt2", "mamba"])
def test_other_architectures(kind, tmp_path):
    """Heads of latent attention, experts with biases, bases without blocks of attention."""
    write_architecture(tmp_path / "plain", kind, vocab_size=259)
    write_tokenizer(tmp_path / "plain")
    quantize(tmp_path / "plain", tmp_path / "base", bits=4, group_size=32)
    base = load(tmp_path / "base")
    adapter = adapted(base)
    fuse(base, adapter, tmp_path / "fused", max_size=9.0)
    fuse(base, adapter, tmp_path / "small")
    attach(base.model, adapter)
    model, _ = mlx_lm_load(str(tmp_path / "fused"))
    assert worst(model(TOKENS), base.model(TOKENS)) < 0.02
    assert weights(tmp_path / "small") <= 1.151 * weights(tmp_path / "base")


def test_dora_embeddings_and_weights_trained_whole(quantized_path, tmp_path):
    for number, lora in enumerate(({"method": "dora"}, {"train_also": ("norm", "embed_tokens")})):
        base = load(quantized_path)
        adapter = adapted(base, **lora)
        fuse(base, adapter, tmp_path / str(number), max_size=9.0)
        attach(base.model, adapter)
        model, _ = mlx_lm_load(str(tmp_path / str(number)))
        assert worst(model(TOKENS), base.model(TOKENS)) < 1e-3


def test_a_base_of_another_kind_of_grid(dense_path, tmp_path):
    config = json.loads((dense_path / "config.json").read_text())
    model, _ = open_model(dense_path)
    nn.quantize(model, 32, 4, mode="mxfp4")
    base = tmp_path / "base"
    base.mkdir()
    shards.copy_companions(dense_path, base)
    config["quantization"] = {"group_size": 32, "bits": 4, "mode": "mxfp4"}
    (base / "config.json").write_text(json.dumps(config))
    tensors = dict(tree_flatten(model.parameters()))
    mx.save_safetensors(str(base / "model.safetensors"), tensors, {"format": "mlx"})
    loaded = load(base)
    adapter = adapted(loaded)
    attach(loaded.model, adapter)
    logits = loaded.model(TOKENS)
    detach(loaded.model)
    for max_size, largest in ((1.0, 1.0), (1.4, 0.5), (9.0, 0.02)):
        out = tmp_path / str(max_size)
        fuse(loaded, adapter, out, max_size=max_size)
        assert worst(mlx_lm_load(str(out))[0](TOKENS), logits) < largest
        assert weights(out) <= max_size * weights(base) + 2000  # names of tensors beside


def test_wide_layers_are_rounded_in_blocks(quantized, tmp_path, monkeypatch):
    assert list(blocks(14336, 64))[:2] == [slice(0, 3584), slice(3584, 7168)]
    assert [b.stop for b in blocks(11008, 128)][-1] == 11008
    monkeypatch.setattr(auto, "WIDEST", 64)
    monkeypatch.setattr(auto, "ROWS_AT_ONCE", 17)
    adapter = adapted(quantized)
    attach(quantized.model, adapter)
    logits = quantized.model(TOKENS)
    fuse(quantized, adapter, tmp_path / "fused", max_size=1.9)
    assert worst(mlx_lm_load(str(tmp_path / "fused"))[0](TOKENS), logits) < 0.1


def test_a_layer_is_written_as_it_was_measured(quantized):
    """The error of the tensors to write, on all outputs, against the one its way promised.

    Least squares come after the promise, and so narrow a layer gains much by them.
    """
    adapter = adapted(quantized)
    merged = Merged(quantized.path, adapter)
    dtypes = scale_types(merged)
    found = []

    def visit(given):
        known = given.call.inputs(0, 1, slice(0, given.target.shape[-1]))
        target = np.array(given.target[0])
        whole = rounding.quadratic(target, known.moments).sum()
        for way, error in auto._errors(given, dtypes[given.path]):
            if not way.bits:
                continue
            parts = auto._rounded(given, way, dtypes[given.path])
            options = {"group_size": way.group_size, "bits": way.bits}
            values = mx.dequantize(
                *(a.astype(mx.float32) if a.dtype != mx.uint32 else a for a in parts.values()),
                **options,
            )
            off = np.array(values[0]) - target
            found.append((rounding.quadratic(off, known.moments).sum() / whole, error))

    visit_layers(merged, trial(quantized.tokenizer, tokens=2048), visit)
    real, promised = np.array(found).T
    assert len(found) == 14 * 6
    assert (real < 1.1 * promised).all() and (real > 0.4 * promised).all()


def test_memory_stays_at_a_block_and_a_shard(quantized, tmp_path, monkeypatch):
    """No layer is held once it is written: a deeper model takes no more."""
    peaks = {}
    for depth in (2, 8):
        source = tmp_path / f"{depth}"
        write_model(source, {**DENSE, "num_hidden_layers": depth})
        quantize(source, tmp_path / f"{depth}-4bit", bits=4, group_size=32)
        base = load(tmp_path / f"{depth}-4bit")
        adapter = adapted(base)
        mx.eval(list(adapter.weights.values()))
        path = base.path
        del base
        monkeypatch.setattr(shards, "SHARD_BYTES", 20_000)
        short = partial(trial, tokens=256)
        monkeypatch.setattr(writer, "trial", short)
        peaks[depth] = peak(partial(fuse, path, adapter, tmp_path / f"{depth}-fused"))
    assert peaks[8] < 1.3 * peaks[2]


@pytest.mark.slow
def test_the_quickstart_is_kept_at_nearly_the_size_of_its_base(tmp_path):
    """Prints the figures of every --bits; python -m pytest -s -m slow -k quickstart."""
    places = {"model": story.BASE, "out": tmp_path / "run", "data.path": story.DATA}
    run = RunConfig.load(story.RECIPE, [f'{key}="{path}"' for key, path in places.items()])
    for _ in train(run):
        pass
    adapter = Adapter.load(tmp_path / "run" / "adapter")
    found = {}
    print("\n  bits  times base    loss    kept       KL  CPU s   MB")
    for bits in ("keep", 5, 6, 8, "auto", "none"):
        mx.reset_peak_memory()
        start = time.process_time()
        done = writer.fuse(story.BASE, adapter, tmp_path / str(bits), bits, proof=Proof(max_kl=9.0))
        taken, peak = time.process_time() - start, mx.get_peak_memory() / 1e6
        one = found[bits] = done.fidelity
        print(
            f"{bits!s:>6} {done.times:11.3f} {one.loss_written:7.4f} {one.kept:7.2%} "
            f"{one.kl:8.6f} {taken:6.1f} {peak:4.0f}"
        )
        if bits == "auto":
            assert weights(tmp_path / "auto") <= 1.15 * weights(story.BASE)
    print(f"base {one.loss_base:.4f}, base + adapter {one.loss_adapter:.4f}; {one.rows}")
    assert found["auto"].kept > 0.9
    assert found["auto"].kl < found["keep"].kl / 10
    assert found["auto"].kl < found[5].kl  # which is larger


def test_ways_are_no_smaller_than_the_base():
    class Module:
        mode, bits, group_size = "affine", 6, 64

    ways = ways_of(Module())
    assert {way.bits for way in ways} == {6, 8, 0}
    assert Way(4, 64).size(6400, 2) == 3200 + 400 and Way(0).size(100, 2) == 200


def test_a_limit_that_cannot_be_used_is_refused(dense, quantized, tmp_path):
    for base, bits in ((dense, "auto"), (quantized, 8), (quantized, "keep")):
        with pytest.raises(ExportError, match="--max-size is for --bits auto"):
            fuse(base, adapted(base), tmp_path / "fused", bits, max_size=1.2)
    assert list(tmp_path.iterdir()) == []


def test_exact_weights_are_those_of_the_codes(quantized):
    layer = quantized.model.layers[0].mlp.up_proj
    layer.set_dtype(mx.bfloat16)
    scales, biases = (np.array(a.astype(mx.float32)) for a in (layer.scales, layer.biases))
    codes = rounding.nearest(np.array(unpacked(layer)), rounding.Grid(4, scales, biases))
    assert (rounding.packed(codes, 4) == np.array(layer.weight)).all()
