"""PEFT adapters without PEFT: configs and tensors as it writes them, made by hand."""

import json
import shutil

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from conftest import randomized
from mlx_lm.models.switch_layers import SwitchLinear
from typer.testing import CliRunner

from mlxlora.base import load, open_base
from mlxlora.cli import app
from mlxlora.config import LoraConfig
from mlxlora.errors import AdapterError, ConfigError, ExportError
from mlxlora.export.peft import write
from mlxlora.lora.adapter import Adapter
from mlxlora.lora.attach import attach, detach
from mlxlora.lora.fresh import collect, new_layers, prepare_full
from mlxlora.lora.names import Names
from mlxlora.lora.peft import read
from mlxlora.lora.peft_experts import Fused, fused

ROOT = "base_model.model."
Q = "model.layers.0.self_attn.q_proj"
DOWN = "model.layers.1.mlp.down_proj"
WIDTHS = {Q: (64, 64), DOWN: (64, 128)}  # path -> (out, in) in the dense base
TOKENS = mx.array([[1, 2, 3, 250]])
CONFIG = {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "r": 4,
    "lora_alpha": 8,
    "target_modules": ["q_proj", "down_proj"],
    "base_model_name_or_path": "someone/Tiny",
}


def numbers(*shape, seed=0) -> mx.array:
    return mx.array(np.random.default_rng([seed, *shape]).normal(size=shape).astype(np.float32))


def factors(rank=4, root=ROOT, widths=WIDTHS, a="lora_A.weight", b="lora_B.weight") -> dict:
    """lora_A and lora_B of some modules."""
    tensors = {}
    for seed, (path, (out, inside)) in enumerate(widths.items()):
        tensors[f"{root}{path}.{a}"] = numbers(rank, inside, seed=seed)
        tensors[f"{root}{path}.{b}"] = numbers(out, rank, seed=seed)
    return tensors


def peft_dir(path, tensors, **config):
    path.mkdir(exist_ok=True)
    (path / "adapter_config.json").write_text(json.dumps({**CONFIG, **config}))
    mx.save_safetensors(str(path / "adapter_model.safetensors"), tensors, {"format": "pt"})
    return path


def same(one: Adapter, other: Adapter) -> bool:
    return (
        (one.method, one.rank, one.scale) == (other.method, other.rank, other.scale)
        and one.weights.keys() == other.weights.keys()
        and all(mx.array_equal(a, other.weights[name]) for name, a in one.weights.items())
    )


def trained(base, **options) -> Adapter:
    config = LoraConfig(**{"rank": 4, "alpha": 8.0, **options})
    new_layers(base.model, config, 0)
    randomized(base.model)
    adapter = collect(base.model, config, {"base": base.identity.to_dict()})
    detach(base.model)
    return adapter


def logits(base, adapter) -> mx.array:
    attach(base, adapter)
    found = base.model(TOKENS)
    detach(base.model)
    return found


def apart(one: mx.array, other: mx.array) -> float:
    return (mx.abs(one - other).max() / mx.abs(other).max()).item()


# What is read


def test_tensors_scale_and_origin_are_those_of_the_file(dense, tmp_path):
    tensors = factors()
    adapter = read(peft_dir(tmp_path / "p", tensors), dense)
    assert (adapter.method, adapter.rank, adapter.scale, adapter.blocks) == ("lora", 4, 2.0, 2)
    assert set(adapter.modules) == {Q, DOWN}
    assert mx.array_equal(adapter.weights[f"{Q}.lora_a"].T, tensors[f"{ROOT}{Q}.lora_A.weight"])
    assert mx.array_equal(adapter.weights[f"{Q}.lora_b"].T, tensors[f"{ROOT}{Q}.lora_B.weight"])
    assert adapter.provenance["base"] == {**dense.identity.to_dict(), "name": "dense"}
    told = adapter.provenance["imported"]
    assert told["base"] == "someone/Tiny" and told["format"] == "peft" and len(told["sha256"]) == 64


@pytest.mark.parametrize(
    "names",
    [
        {"a": "lora_A.default.weight", "b": "lora_B.default.weight"},
        {"a": "lora_A.my_adapter.weight", "b": "lora_B.my_adapter.weight"},
        {"root": ""},
        {"root": "base_model.model.base_model.model."},
        {"root": "module.base_model.model."},
        {"root": "_orig_mod.base_model.model._fsdp_wrapped_module."},
        {"root": "base_model.model.model.language_"},  # model.language_model.layers...
        {"root": "base_model.model.language_model."},
    ],
)
def test_names_as_others_write_them(dense, tmp_path, names):
    expected = read(str(peft_dir(tmp_path / "p", factors())), dense)
    found = read(peft_dir(tmp_path / "other", factors(**names)), dense)
    assert same(found, expected)


def test_half_precision_is_read_as_float32(dense, tmp_path):
    tensors = {name: array.astype(mx.bfloat16) for name, array in factors().items()}
    adapter = read(peft_dir(tmp_path / "p", tensors), dense)
    assert {array.dtype for array in adapter.weights.values()} == {mx.float32}


@pytest.mark.parametrize(
    "config, ranks, scales",
    [
        ({"use_rslora": True}, (4, 4), (4.0, 4.0)),
        ({"lora_alpha": 2.5}, (4, 4), (0.625, 0.625)),
        ({"rank_pattern": {"q_proj": 2}}, (2, 4), (4.0, 2.0)),
        ({"rank_pattern": {"layers.1.mlp.down_proj": 7}}, (4, 7), (2.0, 8 / 7)),
        ({"rank_pattern": {"^model.*q_proj": 2}, "use_rslora": True}, (2, 4), (8 / 2**0.5, 4.0)),
        ({"alpha_pattern": {r".*\.\d+\.mlp\..*": 3, "down_proj": 9}}, (4, 4), (2.0, 0.75)),
        ({"alpha_pattern": {"proj": 3}}, (4, 4), (2.0, 2.0)),  # part of a name is no match
        ({"alpha_pattern": {"q_proj": 0}}, (4, 4), (0.0, 2.0)),
    ],
)
def test_patterns_give_each_module_its_rank_and_scale(dense, tmp_path, config, ranks, scales):
    tensors = {}
    for path, rank in zip(WIDTHS, ranks, strict=True):
        tensors |= factors(rank, widths={path: WIDTHS[path]})
    adapter = read(peft_dir(tmp_path / "p", tensors, **config), dense)
    assert adapter.rank == max(ranks)
    for path, scale in zip(WIDTHS, scales, strict=True):
        a, b = (tensors[f"{ROOT}{path}.lora_{x}.weight"] for x in "AB")
        own = adapter.tensors(path)
        found = adapter.scale * (own["lora_a"] @ own["lora_b"]).T
        assert mx.allclose(found, scale * (b @ a), atol=1e-4)


@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": None},
        {"target_modules": "all-linear"},
        {"target_modules": r".*(q|down)_proj"},
        {"target_modules": [Q, "mlp.down_proj"]},
        {"target_modules": "all-linear", "exclude_modules": ["k_proj"]},
        {"layers_to_transform": [0, 1]},
        {"layers_to_transform": [0, 1], "layers_pattern": "layers"},
        {"target_parameters": ["down_proj.weight"], "target_modules": ["q_proj"]},
        # of no matter, or nothing
        {"init_lora_weights": "eva", "eva_config": {"rho": 2.0}, "velora_config": {"scale": 1}},
        {"init_lora_weights": False, "loftq_config": {}, "megatron_config": None},
        {"bias": "all", "fan_in_fan_out": True, "qalora_group_size": 16, "use_qalora": False},
        {"some_new_field": None, "another": [], "third": False},
    ],
)
def test_configs_that_say_the_same(dense, tmp_path, config):
    expected = read(peft_dir(tmp_path / "p", factors()), dense)
    assert same(read(peft_dir(tmp_path / "other", factors(), **config), dense), expected)


def test_dora_has_its_magnitudes(dense, tmp_path):
    tensors = factors()
    for path, (out, _) in WIDTHS.items():
        tensors[f"{ROOT}{path}.lora_magnitude_vector"] = mx.abs(numbers(out)) + 1
    adapter = read(peft_dir(tmp_path / "p", tensors, use_dora=True), dense)
    assert adapter.method == "dora"
    assert mx.array_equal(adapter.weights[f"{Q}.m"], tensors[f"{ROOT}{Q}.lora_magnitude_vector"])
    old = {
        name.replace("_vector", "_vector.default.weight"): array for name, array in tensors.items()
    }
    assert same(read(peft_dir(tmp_path / "old", old, use_dora=True), dense), adapter)


def test_a_multimodal_base_s_language_model_is_found_and_no_other_part_of_it(dense):
    inner = nn.Module()
    inner.language_model = dense.model
    names = Names(inner, {"model_type": "x", "architectures": ["XForConditionalGeneration"]})
    for name in (
        "model.language_model.layers.1",
        "language_model.model.layers.1",
        "model.layers.1",
    ):
        path = names.here(f"{name}.mlp.up_proj")
        assert path == "language_model.model.layers.1.mlp.up_proj"
        assert names.there(path) == ["model.language_model.layers.1.mlp.up_proj"]
    assert names.here("model.vision_tower.layers.1.mlp.up_proj") is None
    assert names.here("vision_tower.encoder.layers.1.self_attn.q_proj") is None


def test_what_a_family_renames_when_it_is_loaded_is_found_by_that():
    from mlx_lm.models import lfm2_moe

    options = {"moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2}
    options |= {"norm_topk_prob": True, "num_dense_layers": 1, "norm_eps": 1e-5}
    options |= {"conv_bias": False, "conv_L_cache": 3, "use_expert_bias": False}
    options |= {"layer_types": ["conv", "full_attention"], "rope_theta": 1e4, "vocab_size": 99}
    options |= {"hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 96}
    options |= {"num_attention_heads": 4, "num_key_value_heads": 2, "model_type": "lfm2_moe"}
    options |= {"max_position_embeddings": 64}
    names = Names(lfm2_moe.Model(lfm2_moe.ModelArgs(**options)), options)
    assert names.here("model.layers.0.feed_forward.w1") == "model.layers.0.feed_forward.gate_proj"
    assert names.here("model.layers.0.feed_forward.w9") is None
    assert names.there("model.layers.0.feed_forward.gate_proj") == []  # the way back is not known


# Experts

LEAVES = {"gate_proj": (64, 64), "up_proj": (64, 64), "down_proj": (64, 64)}
SWITCH = "model.layers.0.mlp.switch_mlp"


def one_by_one(leaf="gate_proj", experts=range(4)) -> dict:
    names = [f"model.layers.0.mlp.experts.{n}.{leaf}" for n in experts]
    return factors(widths=dict.fromkeys(names, (64, 64)))


def test_experts_one_by_one_are_stacked(experts, tmp_path):
    tensors = one_by_one()
    adapter = read(peft_dir(tmp_path / "p", tensors, target_modules=["gate_proj"]), experts)
    assert adapter.modules == [f"{SWITCH}.gate_proj"]
    for number in range(4):
        name = f"{ROOT}model.layers.0.mlp.experts.{number}.gate_proj"
        own = adapter.tensors(f"{SWITCH}.gate_proj")
        assert mx.array_equal(own["lora_a"][number], tensors[f"{name}.lora_A.weight"])
        assert mx.array_equal(own["lora_b"][number], tensors[f"{name}.lora_B.weight"])


def test_an_expert_that_is_missing_is_named_unless_the_config_leaves_it_out(experts, tmp_path):
    tensors = one_by_one(experts=(0, 1))
    directory = peft_dir(tmp_path / "p", tensors, target_modules=["gate_proj"])
    with pytest.raises(AdapterError, match=r"experts.2.gate_proj: missing, as are 2 of 4 experts"):
        read(directory, experts)
    chosen = ["experts.0.gate_proj", "experts.1.gate_proj"]
    adapter = read(peft_dir(tmp_path / "p", tensors, target_modules=chosen), experts)
    own = adapter.tensors(f"{SWITCH}.gate_proj")
    changed = mx.abs(own["lora_b"] @ own["lora_a"]).sum((-1, -2))
    assert (changed > 0).tolist() == [True, True, False, False]


def block(hidden=64, inner=24, count=3) -> dict:
    return {
        "gate_proj": SwitchLinear(hidden, inner, count, bias=False),
        "up_proj": SwitchLinear(hidden, inner, count, bias=False),
        "down_proj": SwitchLinear(inner, hidden, count, bias=False),
    }


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("crossed", [False, True])
@pytest.mark.parametrize("parameter", ["gate_up_proj", "down_proj"])
def test_fused_experts_are_known_by_their_shapes(parameter, crossed, interleaved):
    """The delta of every expert, as PEFT's ParamWrapper writes it out."""
    inside, out = (64, 48) if parameter == "gate_up_proj" else (24, 64)
    first, last = (out, inside) if crossed else (inside, out)
    a, b = numbers(3 * 2, first), numbers(last, 3 * 2)
    found = fused(a, b, block(), "")
    assert isinstance(found, Fused) and found.parameter == parameter
    a, b = np.array(a).reshape(3, 2, first), np.array(b).reshape(last, 2, 3)
    delta = np.einsum("ore,eri->eio" if crossed else "ore,eri->eoi", b, a)
    leaves = {
        leaf: np.array(left @ right) for leaf, (left, right) in found.leaves(interleaved).items()
    }
    if parameter == "down_proj":
        together = leaves["down_proj"]
    elif interleaved:
        together = np.stack([leaves["gate_proj"], leaves["up_proj"]], 2).reshape(3, 48, 64)
    else:
        together = np.concatenate([leaves["gate_proj"], leaves["up_proj"]], 1)
    assert np.abs(together - delta).max() < 1e-4


def test_fused_experts_that_fit_both_ways_are_told_apart_by_peft_s_version():
    square = block(hidden=24, inner=24)
    a, b = numbers(6, 24), numbers(24, 6)
    new, old = fused(a, b, square, "0.21.2"), fused(a, b, square, "0.18.1")
    assert isinstance(new, Fused) and isinstance(old, Fused)
    assert mx.allclose(new.left @ new.right, (old.left @ old.right).swapaxes(1, 2), atol=1e-5)
    assert "both ways around" in fused(a, b, square, "")


# There and back


@pytest.mark.parametrize(
    "name, options",
    [
        ("dense", {}),
        ("dense", {"targets": ("all-linear", "embed_tokens")}),
        ("dense", {"method": "dora"}),
        ("dense", {"method": "rslora"}),
        ("dense", {"train_also": ("embed_tokens",)}),
        ("dense", {"blocks": (1,)}),
        ("quantized", {}),
        ("experts", {}),
        ("experts", {"blocks": (1,), "targets": ("switch_mlp.down_proj", "mlp.gate")}),
    ],
)
def test_there_and_back_is_the_same_adapter(name, options, request, tmp_path):
    base = request.getfixturevalue(name)
    adapter = trained(base, **options)
    write(adapter, base, tmp_path / "p")
    assert same(read(tmp_path / "p", base), adapter)


@pytest.mark.parametrize("options", [{"alpha": 2.5, "rank": 3}, {"alpha": -8.0}, {"alpha": 1e-3}])
def test_a_scale_that_is_no_whole_alpha_is_in_b(dense, options, tmp_path):
    adapter = trained(dense, **options)
    write(adapter, dense, tmp_path / "p")
    written = json.loads((tmp_path / "p" / "adapter_config.json").read_text())
    assert written["lora_alpha"] == written["r"]
    assert apart(logits(dense, read(tmp_path / "p", dense)), logits(dense, adapter)) < 1e-5


@pytest.mark.parametrize(
    "name, options, says",
    [
        (
            "dense",
            {},
            {"target_modules": "down_proj gate_proj k_proj o_proj q_proj up_proj v_proj"},
        ),
        (
            "dense",
            {"blocks": (1,), "targets": ("q_proj",)},
            {"target_modules": "q_proj", "layers_to_transform": [1]},
        ),
        (
            "dense",
            {"targets": ("layers.0.self_attn.q_proj", "layers.1.mlp.up_proj")},
            {"target_modules": "model.layers.0.self_attn.q_proj model.layers.1.mlp.up_proj"},
        ),
        ("dense", {"targets": ("embed_tokens",)}, {"target_modules": "embed_tokens lm_head"}),
        ("dense", {"targets": ("q_proj",), "dropout": 0.1}, {"lora_dropout": 0.1}),
        (
            "dense",
            {"targets": ("q_proj",), "train_also": ("embed_tokens",)},
            {"modules_to_save": "embed_tokens lm_head"},
        ),
        ("experts", {"targets": ("down_proj",), "dropout": 0.1}, {"lora_dropout": 0.0}),
    ],
)
def test_the_config_chooses_exactly_what_is_adapted(name, options, says, request, tmp_path):
    base = request.getfixturevalue(name)
    write(trained(base, **options), base, tmp_path / "p")
    written = json.loads((tmp_path / "p" / "adapter_config.json").read_text())
    for field, value in says.items():
        assert written[field] == (value.split() if isinstance(value, str) else value)
    assert ("layers_to_transform" in written) == ("layers_to_transform" in says)
    always = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "inference_mode": True, "r": 4}
    always |= {"bias": "none", "use_rslora": False, "init_lora_weights": True, "lora_alpha": 8}
    assert {field: written[field] for field in always} == always
    assert written["base_model_name_or_path"] == base.identity.name
    tensors = mx.load(str(tmp_path / "p" / "adapter_model.safetensors"))
    assert {array.dtype for array in tensors.values()} == {mx.float32}
    assert all(tensor.startswith(ROOT) for tensor in tensors)


def test_experts_are_written_one_by_one_under_the_family_s_names(experts, tmp_path):
    write(trained(experts, targets=("switch_mlp.gate_proj",)), experts, tmp_path / "p")
    names = set(mx.load(str(tmp_path / "p" / "adapter_model.safetensors")))
    leaves = ("gate_proj", "up_proj", "down_proj")  # those that transformers fuses, and finds it by
    assert names == {
        f"{ROOT}model.layers.{layer}.mlp.experts.{n}.{leaf}.lora_{x}.weight"
        for layer in range(2)
        for n in range(4)
        for leaf in leaves
        for x in "AB"
    }
    names = Names(experts.model, {"model_type": "mixtral"})
    assert names.there(f"{SWITCH}.down_proj")[3] == "model.layers.0.mlp.experts.3.w2"
    assert Names(experts.model, {"model_type": "gpt_oss"}).there(f"{SWITCH}.down_proj") == []


def test_the_base_it_was_imported_for_is_the_base_it_is_exported_for(dense, tmp_path):
    adapter = read(peft_dir(tmp_path / "p", factors()), dense)
    write(adapter, dense, tmp_path / "again")
    written = json.loads((tmp_path / "again" / "adapter_config.json").read_text())
    assert written["base_model_name_or_path"] == "someone/Tiny"


def test_provenance_and_model_card_stand_beside(dense, tmp_path):
    trained(dense).save(tmp_path / "a")
    (tmp_path / "a" / "README.md").write_text("# A card")
    write(Adapter.load(tmp_path / "a"), dense, tmp_path / "p", beside=tmp_path / "a")
    assert (tmp_path / "p" / "README.md").read_text() == "# A card"
    told = json.loads((tmp_path / "p" / "provenance.json").read_text())
    assert told == json.loads((tmp_path / "a" / "provenance.json").read_text())
    with pytest.raises(ExportError, match="exists already"):
        write(Adapter.load(tmp_path / "a"), dense, tmp_path / "p")


@pytest.mark.parametrize(
    "name, options, says",
    [
        ("dense", {"method": "dora", "targets": ("embed_tokens",)}, "one magnitude for each token"),
        ("experts", {"method": "dora"}, "no DoRA over experts"),
        ("dense", {"train_also": ("input_layernorm",)}, "input_layernorm.weight: only the embed"),
    ],
)
def test_what_peft_has_no_place_for_is_refused(name, options, says, request, tmp_path):
    base = request.getfixturevalue(name)
    adapter = trained(base, **options)
    with pytest.raises(ExportError, match=says):
        write(adapter, base, tmp_path / "p")
    assert not (tmp_path / "p").exists()


def test_a_full_adapter_is_refused(dense, tmp_path):
    prepare_full(dense.model)
    adapter = collect(dense.model, LoraConfig(method="full"), {})
    with pytest.raises(ExportError, match="fuse it: mlxlora fuse"):
        write(adapter, dense, tmp_path / "p")


def test_an_adapter_of_another_base_is_refused(dense, experts, tmp_path):
    with pytest.raises(AdapterError, match=r"switch_mlp.gate_proj: the base has no such layer"):
        write(trained(experts), dense, tmp_path / "p")


@pytest.mark.parametrize(
    "name, options, says",
    [
        ("dense", {"method": "dora"}, "take no DoRA"),
        ("dense", {"train_also": ("embed_tokens",)}, "trained whole"),
        ("dense", {"targets": ("embed_tokens",)}, "a head that is the embedding"),
        ("experts", {"blocks": (0,)}, "missing; they are 0"),
    ],
)
def test_it_is_said_which_programs_take_less(name, options, says, request, tmp_path):
    base = request.getfixturevalue(name)
    done = write(trained(base, **options), base, tmp_path / "p")
    assert says in " ".join(done.notes)
    assert write(trained(base, targets=("q_proj",)), base, tmp_path / "q").notes == []


# Where head and embedding are one

EMBED, HEAD = "model.embed_tokens", "lm_head"


def tied_tensors(**head) -> dict:
    tensors = {
        f"{ROOT}{EMBED}.lora_embedding_A": numbers(4, 259),
        f"{ROOT}{EMBED}.lora_embedding_B": numbers(64, 4),
    }
    return {**tensors, **{f"{ROOT}{HEAD}.{name}": array for name, array in head.items()}}


def test_factors_of_a_tied_embedding_are_taken_with_the_same_of_the_head(dense, tmp_path):
    alike = {"lora_A.weight": numbers(64, 4).T, "lora_B.weight": numbers(4, 259).T}
    both = {"target_modules": ["embed_tokens", "lm_head"]}
    adapter = read(peft_dir(tmp_path / "p", tied_tensors(**alike), **both), dense)
    assert adapter.modules == [EMBED]
    assert mx.array_equal(adapter.weights[f"{EMBED}.lora_a"], numbers(4, 259).T)
    alone = peft_dir(tmp_path / "alone", tied_tensors(), target_modules=["embed_tokens"])
    with pytest.raises(AdapterError, match="changed the embedding alone"):
        read(alone, dense)
    tied = {"target_modules": ["embed_tokens"], "ensure_weight_tying": True}
    assert same(read(peft_dir(tmp_path / "tied", tied_tensors(), **tied), dense), adapter)
    alike["lora_A.weight"] = alike["lora_A.weight"] + 1
    with pytest.raises(AdapterError, match=r"lm_head: in this base the head is the embedding"):
        read(peft_dir(tmp_path / "other", tied_tensors(**alike), **both), dense)


def test_a_tied_embedding_that_was_trained_whole(dense, tmp_path):
    weight = numbers(259, 64)
    saved = {f"{ROOT}{EMBED}.weight": weight}
    resized = read(
        peft_dir(tmp_path / "r", {**factors(), **saved}), dense
    )  # in no list: the base's
    assert mx.array_equal(resized.whole[f"{EMBED}.weight"], weight)
    listed = {"modules_to_save": ["embed_tokens"]}
    with pytest.raises(AdapterError, match="changed the embedding alone"):
        read(peft_dir(tmp_path / "w", {**factors(), **saved}, **listed), dense)
    saved[f"{ROOT}{HEAD}.modules_to_save.default.weight"] = weight
    listed = {"modules_to_save": ["embed_tokens", "lm_head"]}
    whole = read(peft_dir(tmp_path / "b", {**factors(), **saved}, **listed), dense)
    assert same(whole, resized)
    attach(dense, whole)
    assert mx.array_equal(dense.model.model.embed_tokens.weight, weight)


def test_trained_tokens_are_rows_of_a_whole_embedding(dense, tmp_path):
    rows = numbers(2, 64)
    tensors = {**factors(), f"{ROOT}{EMBED}.token_adapter.trainable_tokens_delta": rows}
    adapter = read(peft_dir(tmp_path / "p", tensors, trainable_token_indices=[7, 258]), dense)
    weight = adapter.whole[f"{EMBED}.weight"]
    own = dense.model.model.embed_tokens.weight
    assert mx.array_equal(weight[mx.array([7, 258])], rows)
    assert mx.array_equal(weight[:7], own[:7]) and mx.array_equal(weight[8:258], own[8:258])
    for wrong in ([7], [7, 259], []):
        directory = peft_dir(tmp_path / "w", tensors, trainable_token_indices=wrong)
        with pytest.raises(AdapterError, match="trainable_token_indices, base"):
            read(directory, dense)


@pytest.mark.parametrize("name", ["dense", "quantized"])
def test_a_saved_copy_of_the_embedding_counts_where_it_is_not_the_base_s(name, request, tmp_path):
    base, plain = request.getfixturevalue(name), request.getfixturevalue("dense")
    copy = plain.model.model.embed_tokens.weight.astype(mx.bfloat16).astype(mx.float32)
    tied = {"target_modules": ["embed_tokens"], "ensure_weight_tying": True}
    tensors = tied_tensors() | {f"{ROOT}{EMBED}.base_layer.weight": copy}
    adapter = read(peft_dir(tmp_path / "p", tensors, **tied), base)
    assert adapter.modules == [EMBED] and adapter.whole == {}
    copy[258] = numbers(64)
    tensors[f"{ROOT}{EMBED}.base_layer.weight"] = copy
    adapter = read(peft_dir(tmp_path / "p", tensors, **tied), base)
    delta = 2.0 * (numbers(4, 259).T @ numbers(64, 4).T)
    assert adapter.modules == []
    assert mx.allclose(adapter.whole[f"{EMBED}.weight"], copy + delta, atol=1e-4)


# What is refused


@pytest.mark.parametrize(
    "config, says",
    [
        ({"peft_type": "IA3"}, r"of type 'IA3'; only LoRA \(LORA\) can be imported"),
        ({"peft_type": None}, "names no peft_type. What mlx-lm or mlxlora wrote needs no import"),
        ({"init_lora_weights": "pissa"}, "path_initial_model_for_weight_conversion"),
        ({"init_lora_weights": "pissa_niter_4"}, "silently wrong over this base"),
        ({"init_lora_weights": "olora"}, "silently wrong over this base"),
        ({"init_lora_weights": "corda", "corda_config": {"x": 1}}, "silently wrong over this base"),
        ({"init_lora_weights": "lora_ga"}, "silently wrong over this base"),
        ({"init_lora_weights": "loftq"}, "merge it there into that base"),
        ({"init_lora_weights": "newest"}, "a start that mlxlora does not know"),
        ({"lora_bias": True}, "lora_bias = True: it adds a bias to B"),
        ({"use_qalora": True}, "use_qalora = True: it pools"),
        ({"alora_invocation_tokens": [1, 2]}, "alora_invocation_tokens"),
        ({"layer_replication": [[0, 2], [1, 2]]}, "layer_replication .* repeats blocks"),
        ({"use_bdlora": {"nblocks": 2}}, "use_bdlora"),
        ({"arrow_config": {"top_k": 3}}, "arrow_config"),
        ({"kasa_config": {"x": 1}}, "kasa_config"),
        ({"monteclora_config": {"x": 1}}, "monteclora_config"),
        ({"megatron_config": {"x": 1}}, "megatron_config"),
        ({"use_frobnication": 3}, "use_frobnication = 3: a field that mlxlora does not know"),
        ({"r": 0}, "r must be a whole number from 1"),
        ({"r": "4"}, "r must be a whole number from 1"),
        ({"lora_alpha": "8"}, "lora_alpha must be a number, not '8'"),
        ({"lora_alpha": float("nan")}, "lora_alpha must be a number"),
        ({"rank_pattern": {"q_proj": 2.5}}, "rank_pattern must be an object of numbers"),
        ({"rank_pattern": {"q_proj(": 2}}, r"rank_pattern: 'q_proj\(' is no regular expression"),
        ({"target_modules": "*.q_proj"}, "is no regular expression"),
        ({"target_modules": {"q": 1}}, "target_modules must be a list of names"),
        ({"layers_to_transform": ["1"]}, "layers_to_transform must be whole numbers"),
        ({"trainable_token_indices": [-1]}, "trainable_token_indices must be token numbers"),
        ({"use_rslora": "yes"}, "use_rslora must be true or false"),
        # what does not belong to the tensors
        ({"target_modules": r".*\.k_proj"}, "q_proj.lora_A.weight.*not among what the config tar"),
        ({"target_modules": ["proj"]}, "not among what the config targets"),
        ({"exclude_modules": r".*q_proj"}, "q_proj.lora_A.weight.*not among what the config targ"),
        ({"layers_to_transform": [0]}, "down_proj.lora_A.weight.*not among what the config targe"),
        ({"modules_to_save": ["mlp"]}, "down_proj.lora_A.weight.*not among what the config targe"),
        ({"r": 8}, "of rank 4, and the config says 8"),
        ({"rank_pattern": {"q_proj": 2}}, "q_proj.lora_A.weight.*of rank 4, and the config says 2"),
        ({"use_dora": True}, "q_proj.lora_magnitude_vector is missing"),
    ],
)
def test_configs_that_cannot_be_used_are_refused_by_field(dense, tmp_path, config, says):
    directory = peft_dir(tmp_path / "p", factors(), **config)
    with pytest.raises(AdapterError, match=says):
        read(directory, dense)


@pytest.mark.parametrize(
    "change, says",
    [
        ({f"{Q}.lora_A.weight": numbers(4, 60)}, r"q_proj.lora_A.weight: adapter \(4, 60\), base"),
        ({f"{Q}.lora_B.weight": numbers(60, 4)}, r"q_proj.lora_B.weight: adapter \(60, 4\), base"),
        ({f"{Q}.lora_B.weight": numbers(64, 3)}, "are no two factors"),
        ({f"{Q}.lora_B.weight": numbers(64)}, "are no two factors"),
        ({f"{Q}.lora_B.weight": None}, "q_proj.lora_B is missing"),
        ({f"{Q}.lora_B.bias": numbers(64)}, "without a bias"),
        ({f"{Q}.lora_magnitude_vector": numbers(64)}, "not what an adapter with use_dora = False"),
        ({f"{Q}.base_layer.bias": numbers(64)}, "a trained bias of an adapted layer"),
        ({f"{Q}.lora_diag": numbers(4)}, "lora_diag: mlxlora does not know what this is"),
        ({f"{Q}.lora_A.a.weight": numbers(4, 64)}, "q_proj.lora_A.weight: the same as"),
        ({"lm_head.weight": numbers(259, 64)}, "lm_head.weight: in this base the head is the emb"),
        ({"model.norm.weight": numbers(64)}, "model.norm.weight: whole weights can be imported"),
        ({f"{Q}.weight": numbers(64, 64)}, "q_proj.weight: whole weights can be imported"),
        ({f"{EMBED}.weight": numbers(300, 64)}, r"adapter \(300, 64\), base \(259, 64\)"),
        ({f"{Q}.lora_A.weight": numbers(4, 64) * float("nan")}, r"NaN or infinity"),
        ({f"{Q}.base_layer.weight": numbers(64, 64)}, "of neither the embedding nor the head"),
        ({"": numbers(2)}, "mlxlora does not know what this is"),
        ({f"{Q}.lora_A.weight": mx.ones((4, 64), mx.int32)}, "of type I32, not floating"),
    ],
)
def test_tensors_that_cannot_be_used_are_named(dense, tmp_path, change, says):
    tensors = {**factors(), **{ROOT + name: array for name, array in change.items()}}
    tensors = {name: array for name, array in tensors.items() if array is not None}
    with pytest.raises(AdapterError, match=says):
        read(peft_dir(tmp_path / "p", tensors), dense)


@pytest.mark.parametrize(
    "path, says",
    [
        ("model.layers.7.self_attn.q_proj", "layers.7.self_attn.q_proj.lora_A.weight.*no such lay"),
        ("model.vision.layers.0.self_attn.q_proj", "vision.layers.0.*the base has no such layer"),
        ("model.layers.0.mlp.experts.0.q_proj", "the base has no such experts"),
        ("model.layers.0.mlp.experts", "the base has no such experts"),
        ("model.embed_tokens", "model.embed_tokens is a layer of another kind"),
    ],
)
def test_modules_that_the_base_does_not_have_are_named(dense, tmp_path, path, says):
    tensors = factors(widths={path: (64, 64)})
    targets = ["q_proj", "experts", "embed_tokens"]
    with pytest.raises(AdapterError, match=says) as told:
        read(peft_dir(tmp_path / "p", tensors, target_modules=targets), dense)
    assert "It was made for someone/Tiny" in str(told.value)


@pytest.mark.parametrize(
    "path", [f"{SWITCH}.q_proj", f"{SWITCH}.gate_proj", "model.layers.0.mlp.experts.9.gate_proj"]
)
def test_stacked_experts_are_no_linear_layer(experts, tmp_path, path):
    tensors = factors(widths={path: (64, 64)})
    targets = ["q_proj", "gate_proj"]
    with pytest.raises(AdapterError, match=r"no such layer|adapter expert 9 of 64 x 64, base 4 of"):
        read(peft_dir(tmp_path / "p", tensors, target_modules=targets), experts)


def test_two_adapters_in_one_file_are_refused(dense, tmp_path):
    one = factors(widths={Q: WIDTHS[Q]}, a="lora_A.one.weight", b="lora_B.one.weight")
    two = factors(widths={DOWN: WIDTHS[DOWN]}, a="lora_A.two.weight", b="lora_B.two.weight")
    with pytest.raises(AdapterError, match=r"several adapters \(one, two\)"):
        read(peft_dir(tmp_path / "p", {**one, **two}), dense)


def test_every_fault_is_told_at_once(dense, tmp_path):
    tensors = factors()
    tensors[f"{ROOT}{Q}.lora_A.weight"] = numbers(4, 60)
    tensors |= factors(widths={"model.layers.9.mlp.down_proj": (64, 128)})
    with pytest.raises(AdapterError) as told:
        read(peft_dir(tmp_path / "p", tensors), dense)
    assert "q_proj" in str(told.value) and "layers.9" in str(told.value)


def test_a_model_whose_weights_mlx_lm_rewrites_is_refused(dense, tmp_path):
    dense.config["model_type"] = "falcon_h1"
    with pytest.raises(AdapterError, match="mlx-lm has other numbers in this layer's weight"):
        read(peft_dir(tmp_path / "p", factors()), dense)
    with pytest.raises(ExportError, match="not known, or not the same"):
        write(trained(dense, targets=("q_proj",)), dense, tmp_path / "q")


# Files


def test_a_pickle_is_not_opened_and_how_to_convert_it_is_said(dense, tmp_path):
    directory = peft_dir(tmp_path / "p", factors())
    (directory / "adapter_model.safetensors").unlink()
    (directory / "adapter_model.bin").write_bytes(b"\x80\x04cos\nsystem\n(S'touch ran'\ntR.")
    with pytest.raises(AdapterError, match=r"adapter_model.bin is a pickle.*save_pretrained"):
        read(directory, dense)


def test_directories_without_the_files_are_named(dense, tmp_path):
    with pytest.raises(AdapterError, match=r"no adapter_config.json \(it does not exist\)"):
        read(tmp_path / "nowhere", dense)
    outer = tmp_path / "outer"
    outer.mkdir()
    directory = peft_dir(outer / "default", factors())
    with pytest.raises(AdapterError, match=r"no adapter_config.json; there are default in it"):
        read(outer, dense)
    (directory / "adapter_model.safetensors").unlink()
    with pytest.raises(AdapterError, match=r"has no adapter_model.safetensors$"):
        read(directory, dense)
    (directory / "adapters.safetensors").write_bytes(b"")
    with pytest.raises(AdapterError, match="it is mlxlora's or mlx-lm's, and needs no import"):
        read(directory, dense)


def test_damaged_files_are_one_error(dense, tmp_path):
    good = peft_dir(tmp_path / "p", factors())
    whole = (good / "adapter_model.safetensors").read_bytes()
    cut = shutil.copytree(good, tmp_path / "cut")
    for size in (0, 7, 100, len(whole) - 1):
        (cut / "adapter_model.safetensors").write_bytes(whole[:size])
        with pytest.raises(AdapterError, match=r"adapter_model.safetensors (is|has)"):
            read(cut, dense)
    (good / "adapter_config.json").write_text('{"peft_type": "LORA"')
    with pytest.raises(AdapterError, match="is not valid JSON"):
        read(good, dense)
    (good / "adapter_config.json").write_text("[1]")
    with pytest.raises(AdapterError, match="does not hold a JSON object"):
        read(good, dense)


def test_a_file_without_tensors_is_refused(dense, tmp_path):
    with pytest.raises(AdapterError, match="it holds no tensor"):
        read(peft_dir(tmp_path / "p", {}), dense)
    copy = {f"{ROOT}lm_head.original_module.weight": numbers(259, 64)}
    with pytest.raises(AdapterError, match="it adapts nothing"):
        read(peft_dir(tmp_path / "p", copy), dense)


# The program


def run(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


def test_from_peft_through_the_program_and_back(dense_path, tmp_path):
    made = peft_dir(tmp_path / "made", factors())
    done = run("adapter", "import", made, "--model", dense_path, "--out", tmp_path / "a", "--json")
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout.splitlines()[-1])
    assert set(result["lora_parameters"]["keys"]) == {Q, DOWN}
    done = run("adapter", "info", tmp_path / "a")
    assert "made for someone/Tiny" in " ".join(done.output.split())
    assert run("adapter", "verify", tmp_path / "a", "--model", dense_path).exit_code == 0
    words = ("--model", dense_path, "--adapter", tmp_path / "a", "--out")
    assert run("fuse", *words, tmp_path / "fused").exit_code == 0
    done = run("export", "--format", "peft", *words, tmp_path / "again", "--json")
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout.splitlines()[-1])
    assert (result["format"], result["modules"], result["notes"]) == ("peft", 2, [])
    base = load(dense_path)
    fused = load(tmp_path / "fused")
    expected = logits(base, read(made, base))
    assert apart(fused.model(TOKENS), expected) < 1e-5
    assert same(read(tmp_path / "again", base), read(made, base))


@pytest.mark.parametrize(
    "words, says",
    [
        (
            ["--format", "onnx", "--adapter", "a"],
            "--format 'onnx' is not known; known are mlx, hf, peft",
        ),
        (["--format", "peft"], "pass --adapter"),
        (["--format", "peft", "--adapter", "a", "--quant", "f16"], "there is no --quant"),
    ],
)
def test_orders_that_cannot_be_filled_are_refused(words, says, tmp_path):
    result = run("export", "--model", "m", "--out", tmp_path / "out", *words)
    assert isinstance(result.exception, ConfigError) and says in str(result.exception)


def test_a_base_that_is_only_opened_has_the_same_names_and_numbers(dense_path, dense, tmp_path):
    lazy = open_base(dense_path)
    assert lazy.identity == dense.identity and lazy.tokenizer is None
    assert same(read(peft_dir(tmp_path / "p", factors()), lazy), read(tmp_path / "p", dense))
