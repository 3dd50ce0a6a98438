"""Every method of lora.method: what it begins with, what is trained, what is saved and fused."""

import typing

import mlx.core as mx
import numpy as np
import pytest
from conftest import randomized, worst
from mlx.utils import tree_flatten
from mlx_lm import load as mlx_lm_load

from mlxlora.base import load
from mlxlora.config import LoraConfig
from mlxlora.errors import ConfigError
from mlxlora.export.fuse import fuse
from mlxlora.lora.adapter import Adapter
from mlxlora.lora.attach import attach, detach, low_rank_layers
from mlxlora.lora.fresh import FULL, collect, new_layers
from mlxlora.lora.methods import METHODS, orthonormal, principal

TOKENS = mx.array([[1, 2, 3, 4, 5, 6]])
KEY = mx.random.key(0)


def test_the_option_names_exactly_the_methods():
    names = typing.get_args(typing.get_type_hints(LoraConfig)["method"])
    assert set(names) == {*METHODS, FULL}


def trained(base, **lora) -> LoraConfig:
    """The base with a fresh adapter whose trained tensors are then moved."""
    config = LoraConfig(rank=4, alpha=6.0, **lora)
    new_layers(base.model, config, 0)
    for number, (_, layer) in enumerate(low_rank_layers(base.model)):
        for name, array in layer.trainable_parameters().items():
            if isinstance(array, mx.array):
                noise = mx.random.normal(array.shape, key=mx.random.key(number))
                layer[name] = array + 0.1 * noise
    return config


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["dense", "quantized", "experts"])
def test_a_fresh_model_is_the_base(method, name, request):
    base = request.getfixturevalue(name)
    logits = base.model(TOKENS)
    new_layers(base.model, LoraConfig(rank=4, method=method), 0)
    assert worst(base.model(TOKENS), logits) < 2e-5


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["dense", "quantized", "experts"])
@pytest.mark.parametrize("targets", [("all-linear",), ("q_proj", "embed_tokens")])
def test_saved_attached_and_fused_it_is_the_same_model(method, name, targets, request, tmp_path):
    base = request.getfixturevalue(name)
    before = base.model(TOKENS)
    config = trained(base, method=method, targets=targets)
    logits = base.model(TOKENS)
    assert worst(logits, before) > 1e-3
    collect(base.model, config, {"base": base.identity.to_dict()}).save(tmp_path / "a")
    detach(base.model)
    assert mx.array_equal(base.model(TOKENS), before)
    adapter = Adapter.load(tmp_path / "a")
    attach(base, adapter)
    assert worst(base.model(TOKENS), logits) < 2e-5
    fuse(base.path, adapter, tmp_path / "fused", "none", proof=None)
    assert worst(load(tmp_path / "fused").model(TOKENS), logits) < 1e-4


@pytest.mark.parametrize("method", METHODS)
def test_mlx_lm_loads_what_every_method_saves(method, dense, tmp_path):
    config = trained(dense, method=method)
    logits = dense.model(TOKENS)
    collect(dense.model, config, {}).save(tmp_path / "a")
    model, _ = mlx_lm_load(str(dense.path), adapter_path=str(tmp_path / "a"))
    assert worst(model(TOKENS), logits) < 2e-5


def test_lora_fa_trains_b_alone_and_dora_magnitudes_too(dense):
    def names(method):
        new_layers(dense.model, LoraConfig(method=method), 0)
        flat = tree_flatten(dense.model.trainable_parameters())
        return {name.rpartition(".")[2] for name, _ in flat}

    assert names("lora-fa") == {"lora_b"}
    assert names("dora") == {"lora_a", "lora_b", "m"}
    assert names("pissa") == {"lora_a", "lora_b"}


def test_rank_stabilized_scale_is_alpha_over_the_root_of_rank(dense):
    config = LoraConfig(method="rslora", rank=16, alpha=8.0, rank_pattern={"q_proj": 4})
    new_layers(dense.model, config, 0)
    randomized(dense.model)
    scales = {path.rpartition(".")[2]: layer.scale for path, layer in low_rank_layers(dense.model)}
    assert (scales["q_proj"], scales["up_proj"]) == (4.0, 2.0)
    assert collect(dense.model, config, {}).scale == 2.0


@pytest.mark.parametrize("shape", [(40, 24), (24, 40), (3, 40, 24)])
def test_principal_directions_are_those_of_numpy_s_svd(shape):
    weight, scale = mx.random.normal(shape, key=KEY), 2.5
    left, right = principal(weight, 8, scale, KEY)
    u, values, v = np.linalg.svd(np.array(weight, np.float64), full_matrices=False)
    best = u[..., :8] * values[..., None, :8] @ v[..., :8, :]
    assert np.abs(np.array(scale * (left @ right)) - best).max() < 1e-4
    root = np.sqrt(values[..., :8] / scale)  # both sides are equally long
    assert np.abs(np.array(mx.linalg.norm(left, axis=-2)) - root).max() < 1e-4
    assert np.abs(np.array(mx.linalg.norm(right, axis=-1)) - root).max() < 1e-4


def test_principal_directions_of_a_large_weight_are_found_among_random_ones():
    """Singular values that fall, as trained weights have them; more than are oversampled."""
    u, v = (mx.linalg.qr(mx.random.normal((200, 200), key=k), stream=mx.cpu)[0] for k in (KEY, KEY))
    values = 0.9 ** mx.arange(200)
    left, right = principal((u * values) @ v, 8, 1.0, mx.random.key(1))
    best = (u[:, :8] * values[:8]) @ v[:8]
    assert worst(left @ right, best) < 1e-3


@pytest.mark.parametrize("shape", [(40, 24), (24, 40), (3, 40, 24)])
def test_olora_starts_from_the_whole_weight_s_qr(shape):
    weight = mx.random.normal(shape, key=KEY)
    left, right = orthonormal(weight, 8, 2.5, KEY)
    q, r = np.linalg.qr(np.array(weight, np.float64))
    assert np.abs(np.array(left @ right) - q[..., :8] @ r[..., :8, :]).max() < 1e-4
    assert (
        worst(left.swapaxes(-1, -2) @ left, mx.broadcast_to(mx.eye(8), (*shape[:-2], 8, 8))) < 1e-5
    )


@pytest.mark.parametrize("method", ["pissa", "olora"])
def test_a_rank_that_a_weight_has_not_is_refused_with_its_size(method, dense):
    with pytest.raises(
        ConfigError, match=r"lora\.rank = 40: model\..*k_proj is 32 x 64.*at most 32"
    ):
        new_layers(dense.model, LoraConfig(method=method, rank=40), 0)


def test_what_starts_from_weights_is_relative_to_the_base_at_twice_the_rank(dense):
    config = trained(dense, method="pissa")
    adapter = collect(dense.model, config, {})
    assert adapter.rank == 8
    assert adapter.scale == 1.5


def test_a_skeleton_s_weights_are_not_read(dense):
    """Sizes are right, nothing was computed from the weights."""
    for method in METHODS:
        new_layers(dense.model, LoraConfig(method=method, rank=4), 0)
        real = {n: a.shape for n, a in tree_flatten(dense.model.parameters())}
        new_layers(dense.model, LoraConfig(method=method, rank=4), 0, known=False)
        assert {n: a.shape for n, a in tree_flatten(dense.model.parameters())} == real
