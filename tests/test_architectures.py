"""The whole way of an adapter through every text architecture of mlx-lm, tiny and random."""

import importlib
import importlib.metadata
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx_lm.models
import pytest
from architectures import (
    CANNOT,
    FAMILIES,
    MLX_LM,
    NOT_MODELS,
    OURS_ALONE,
    PADDED,
    WHOLE_LOGITS,
    model_of,
    write_model,
)
from conftest import randomized, worst
from losses import agree, examples, of_batch, of_rows
from mlx.utils import tree_flatten
from mlx_lm.models.cache import ArraysCache, CacheList, make_prompt_cache
from mlx_lm.tuner.utils import load_adapters

from mlxlora.base import open_frozen
from mlxlora.config import LoraConfig
from mlxlora.data.batches import pack, pad
from mlxlora.errors import ConfigError
from mlxlora.export.fuse import fuse
from mlxlora.export.quantize import quantize
from mlxlora.export.streamed import logits_at
from mlxlora.lora.adapter import Adapter
from mlxlora.lora.attach import attach, detach
from mlxlora.lora.fresh import collect, new_layers
from mlxlora.model_files import read_config
from mlxlora.train.attention import Spans
from mlxlora.train.forward import Forward
from mlxlora.train.packing import PROBE_ROWS, caches

RIGHT = sorted(FAMILIES.keys() - CANNOT.keys())
CONFIG = LoraConfig(rank=4, alpha=8.0)
TOKENS = mx.array([[5, 3, 8, 1, 9, 2, 7, 4, 6, 11, 10, 12]])
ROWS = examples(6, 13, 17)  # together enough tokens for experts to sort them

pytestmark = pytest.mark.skipif(
    importlib.metadata.version("mlx-lm") != MLX_LM,
    reason=f"the table is of the model files of mlx-lm {MLX_LM}",
)


@pytest.fixture(scope="module", autouse=True)
def uncompiled() -> Iterator[None]:
    """Without MLX's compiler, which on the CPU calls g++ for every activation."""
    mx.disable_compile()
    yield
    mx.enable_compile()


@dataclass(frozen=True)
class Trained:
    """A base on the disk, and an adapter of it that is saved too."""

    family: str
    base: Path
    adapter: Path
    own: mx.array  # the base's logits
    logits: mx.array  # with the adapter
    model: nn.Module  # with the adapter
    forward: Forward


@pytest.fixture(scope="module", params=RIGHT)
def trained(request, tmp_path_factory) -> Trained:
    family = request.param
    directory = tmp_path_factory.mktemp("architectures")
    base = write_model(directory / "base", family)
    model = opened(base)
    own = model(TOKENS)
    adapt(model)
    logits = model(TOKENS)
    collect(model, CONFIG, {}).save(directory / "adapter")
    forward = Forward(model)
    return Trained(family, base, directory / "adapter", own, logits, model, forward)


def opened(path: Path) -> nn.Module:
    return open_frozen(path)[0]


def adapt(model: nn.Module) -> None:
    new_layers(model, CONFIG, 0)
    randomized(model)


def test_every_model_file_of_mlx_lm_is_here_or_is_no_model():
    files = {path.stem for path in Path(mlx_lm.models.__path__[0]).glob("*.py")} - {"__init__"}
    assert FAMILIES.keys() | NOT_MODELS == files
    assert not FAMILIES.keys() & NOT_MODELS
    for name in NOT_MODELS:
        assert not hasattr(importlib.import_module(f"mlx_lm.models.{name}"), "Model")


def test_loss_and_gradients_are_those_of_every_row_alone(trained):
    batch = (pack if trained.forward.packs else pad)(ROWS)
    agree(of_batch(trained.model, batch, trained.forward), of_rows(trained.model, ROWS))


def test_blocks_computed_again_have_the_same_gradients(trained):
    batch = (pack if trained.forward.packs else pad)(ROWS)
    plain = of_batch(trained.model, batch, trained.forward)
    trained.forward.checkpoint_blocks = True
    again = of_batch(trained.model, batch, trained.forward)
    trained.forward.checkpoint_blocks = False
    assert again[0] == plain[0] and again[1].keys() == plain[1].keys()
    assert all(mx.array_equal(again[1][name], gradient) for name, gradient in plain[1].items())


def test_a_model_is_packed_and_its_head_comes_apart_as_the_table_says(trained):
    padded = set().union(*PADDED.values())
    assert trained.forward.packs == (trained.family not in padded)
    assert (trained.forward.head is None) == (trained.family in WHOLE_LOGITS)


def test_the_saved_adapter_does_the_same_in_a_fresh_base_and_in_mlx_lm(trained):
    assert worst(trained.logits, trained.own) > 1e-2
    ours, theirs = opened(trained.base), opened(trained.base)
    attach(ours, Adapter.load(trained.adapter))
    assert mx.array_equal(ours(TOKENS), trained.logits)
    if trained.family in OURS_ALONE:
        with pytest.raises(ValueError, match="incompatible"):
            load_adapters(theirs, str(trained.adapter))
        return
    load_adapters(theirs, str(trained.adapter))
    assert worst(theirs(TOKENS), trained.logits) < 1e-5


def test_the_fused_model_says_the_same(trained, tmp_path):
    bits = 8 if "quantization" in read_config(trained.base) else "keep"
    fuse(trained.base, Adapter.load(trained.adapter), tmp_path / "fused", bits, proof=None)
    assert worst(opened(tmp_path / "fused")(TOKENS), trained.logits) < 1e-4


def test_run_block_by_block_from_the_disk_it_says_the_same(trained):
    def lazily():
        model = opened(trained.base)
        attach(model, Adapter.load(trained.adapter))
        return model

    places = mx.arange(0, TOKENS.size, 2)
    wanted = trained.logits.reshape(TOKENS.size, -1)[places]
    assert worst(logits_at(lazily, TOKENS, places), wanted) < 1e-5


def test_detached_it_is_the_base_again(trained):
    model = opened(trained.base)
    model(TOKENS)
    before = dict(tree_flatten(model.parameters()))
    classes = [(path, type(module)) for path, module in model.named_modules()]
    attach(model, Adapter.load(trained.adapter))
    assert mx.array_equal(model(TOKENS), trained.logits)
    detach(model)
    after = dict(tree_flatten(model.parameters()))
    assert [(path, type(module)) for path, module in model.named_modules()] == classes
    assert before.keys() == after.keys()
    assert all(mx.array_equal(after[name], array) for name, array in before.items())
    assert mx.array_equal(model(TOKENS), trained.own)


def why_padded(model: nn.Module) -> str:
    """The reason of PADDED, told by what the model's caches are and what packing does to it."""
    state, place, own = PADDED
    kinds = make_prompt_cache(model)
    parts = [p for kind in kinds for p in (kind.caches if isinstance(kind, CacheList) else [kind])]
    if any(isinstance(part, ArraysCache) for part in parts):
        return state
    if not all(hasattr(kind, "update_and_fetch") for kind in kinds):
        return own
    first, second = PROBE_ROWS
    cache = caches(model, Spans((len(first), len(first) + len(second))))
    try:
        together = model(mx.array([[*first, *second]]), cache=cache)
    except AttributeError:  # it asks its cache for what ours does not have
        return own
    alone = model(mx.array([second]))
    return place if worst(together[:, len(first) :], alone) > 1e-2 else own


@pytest.mark.parametrize(
    ("reason", "family"), [(reason, f) for reason in PADDED for f in sorted(PADDED[reason])]
)
def test_rows_are_padded_for_the_reason_that_the_table_gives(reason, family):
    model = model_of(family)
    model.eval()
    assert why_padded(model) == reason


def gradient_of(family: str) -> dict:
    model = model_of(family)
    adapt(model)
    return of_rows(model, ROWS)[1]


@pytest.mark.parametrize(
    ("family", "error", "says"),
    [
        ("bitnet", ConfigError, "matches no module"),
        ("muse_spark", RuntimeError, "No Metal"),
        ("deepseek_v41", ValueError, "VJP with respect to indices"),
        ("olmo", SystemExit, "1"),
    ],
)
@pytest.mark.skipif(mx.metal.is_available(), reason="the errors are those of MLX without Metal")
def test_what_is_said_to_fail_fails(family, error, says):
    with pytest.raises(error, match=says):
        gradient_of(family)


def test_phi3small_sees_what_comes_after():
    model = model_of("phi3small")
    other = mx.concatenate([TOKENS[:, :-1], mx.array([[99]])], axis=1)
    with_other = model.model(other)[:, :-1]
    assert worst(with_other, model.model(TOKENS)[:, :-1]) > 1e-2


# Sizes of which every layer can be quantized in groups of 32.
WIDE = {"moe_intermediate_size": 64, "shared_expert_intermediate_size": 64}
LATENT = {"q_lora_rank": 32, "qk_nope_head_dim": 32, "v_head_dim": 32}


@pytest.mark.parametrize(
    ("family", "changes", "also"),
    [
        ("mixtral", {}, ()),
        ("qwen3_5_moe", WIDE, ()),
        ("gpt_oss", {}, ()),
        ("deepseek_v2", {**WIDE, **LATENT}, ()),
        ("deepseek_v3", {**WIDE, **LATENT}, ("embed_q", "unembed_out")),
        ("longcat_flash", LATENT, ("embed_q", "unembed_out")),
    ],
)
def test_over_a_quantized_base_too(family, changes, also, tmp_path):
    plain = write_model(tmp_path / "plain", family, **changes)
    quantize(plain, tmp_path / "base", bits=4, group_size=32)
    model = opened(tmp_path / "base")
    config = LoraConfig(rank=4, alpha=8.0, targets=("all-linear", *also))
    paths = new_layers(model, config, 0)
    assert {path.rpartition(".")[2] for path in paths} >= set(also)
    packed = [path for path in paths if "scales" in dict(model.named_modules())[path].base]
    assert packed == paths
    randomized(model)
    forward = Forward(model)
    batch = (pack if forward.packs else pad)(ROWS)
    agree(of_batch(model, batch, forward), of_rows(model, ROWS))
    logits = model(TOKENS)
    adapter = collect(model, config, {})
    fresh = opened(tmp_path / "base")
    attach(fresh, adapter)
    assert mx.array_equal(fresh(TOKENS), logits)
    fuse(tmp_path / "base", adapter, tmp_path / "fused", "none", proof=None)
    fused = opened(tmp_path / "fused")
    assert not any("scales" in module for module in fused.modules())
    assert worst(fused(TOKENS), logits) < 1e-4


def test_a_base_of_which_some_layers_are_not_quantized_is_fused(tmp_path):
    plain = write_model(tmp_path / "plain", "qwen2", intermediate_size=80)
    quantize(plain, tmp_path / "base", bits=4, group_size=32)  # but for down_proj
    model = opened(tmp_path / "base")
    adapt(model)
    logits = model(TOKENS)
    fuse(tmp_path / "base", collect(model, CONFIG, {}), tmp_path / "fused", 8, proof=None)
    down, up = (opened(tmp_path / "fused").layers[0].mlp[name] for name in ("down_proj", "up_proj"))
    assert "scales" not in down and up.bits == 8
    assert worst(opened(tmp_path / "fused")(TOKENS), logits) < 5e-2
