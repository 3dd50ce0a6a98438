import json
import re
import shutil
from collections import namedtuple
from functools import partial

import mlx.core as mx
import pytest
from architectures import write_model
from conftest import DENSE, randomized, worst, write_tokenizer
from conftest import write_model as write_dense
from documents import guide, section
from memory import peak
from mlx.utils import tree_flatten
from mlx_lm import load as mlx_lm_load
from typer.testing import CliRunner

from mlxlora.base import SHELLS, load, open_model
from mlxlora.cli import app
from mlxlora.config import LoraConfig
from mlxlora.errors import AdapterError, ExportError
from mlxlora.export import shards
from mlxlora.export.hf import directory as huggingface
from mlxlora.export.hf import names as hf_names
from mlxlora.export.hf import steps as hf_steps
from mlxlora.export.hf.proof import round_trip
from mlxlora.export.quantize import quantize
from mlxlora.lora.attach import detach
from mlxlora.lora.fresh import collect, new_layers, prepare_full

write = partial(
    huggingface.write, proof=None
)  # random adapters gain nothing; test_proof.py measures
TOKENS = mx.array([[1, 2, 3, 4, 5, 6]])


def adapted(base, **lora):
    """(adapter, logits with it attached)."""
    config = LoraConfig(rank=4, **lora)
    new_layers(base.model, config, 0)
    randomized(base.model)
    adapter = collect(base.model, config, {"base": base.identity.to_dict()})
    logits = base.model(TOKENS)
    detach(base.model)
    return adapter, logits


def config_of(directory) -> dict:
    return json.loads((directory / "config.json").read_text())


@pytest.mark.parametrize("name", ["dense", "quantized", "experts"])
def test_mlx_lm_loads_what_is_written_and_it_is_base_and_adapter(name, request, tmp_path):
    base = request.getfixturevalue(name)
    adapter, logits = adapted(base)
    done = write(base, adapter, tmp_path / "out")
    model, _ = mlx_lm_load(str(tmp_path / "out"))
    assert worst(model(TOKENS), logits) < 1e-4
    file = tmp_path / "out" / "model.safetensors"
    tensors, metadata = mx.load(str(file), return_metadata=True)
    assert metadata == {"format": "pt"}
    assert done.tensors == len(tensors)
    assert done.bytes == sum(array.nbytes for array in tensors.values())
    assert not list((tmp_path / "out").glob("*.index.json"))


@pytest.mark.parametrize(
    "family",
    ["qwen2_moe", "mixtral", "dots1", "deepseek_v3", "granitemoe", "gpt2", "gpt_neox", "lfm2_moe"],
)
def test_what_mlx_lm_renames_is_given_back_number_by_number(family, tmp_path):
    base = write_model(tmp_path / "base", family)
    write(base, None, tmp_path / "out")
    here = dict(tree_flatten(open_model(base)[0].parameters()))
    again = dict(tree_flatten(open_model(tmp_path / "out")[0].parameters()))
    assert here.keys() == again.keys()
    assert all(mx.array_equal(array, again[name]) for name, array in here.items())


def test_experts_are_written_one_by_one(experts_path, tmp_path):
    write(experts_path, None, tmp_path / "out")
    names = mx.load(str(tmp_path / "out" / "model.safetensors")).keys()
    assert "model.layers.1.mlp.experts.3.gate_proj.weight" in names
    assert not any("switch_mlp" in name for name in names)


def test_the_config_says_what_is_written(quantized_path, tmp_path):
    write(quantized_path, None, tmp_path / "out", "bf16")
    before, after = config_of(quantized_path), config_of(tmp_path / "out")
    assert "quantization" in before
    told = {"architectures": ["Qwen3ForCausalLM"], "torch_dtype": "bfloat16"}
    assert after == {k: v for k, v in before.items() if not k.startswith("quantiz")} | told


def test_a_dtype_is_told_under_the_key_that_the_base_uses(tmp_path):
    base = write_dense(tmp_path / "base", {**DENSE, "dtype": "float32"})
    write(base, None, tmp_path / "out", "f16")
    after = config_of(tmp_path / "out")
    assert after["dtype"] == "float16" and "torch_dtype" not in after


@pytest.mark.parametrize("quant", [None, "f32", "f16", "bf16"])
def test_a_bfloat16_base_stays_one_unless_another_type_is_wished_for(quant, dense_path, tmp_path):
    base = shutil.copytree(dense_path, tmp_path / "base")
    weights = mx.load(str(base / "model.safetensors"))
    halves = {name: array.astype(mx.bfloat16) for name, array in weights.items()}
    halves["model.norm.weight"] = weights["model.norm.weight"]  # kept wider, as some are
    mx.save_safetensors(str(base / "model.safetensors"), halves, {"format": "mlx"})
    done = write(base, None, tmp_path / "out", quant)
    wanted = {"f32": "float32", "f16": "float16"}.get(quant, "bfloat16")
    assert done.dtype == config_of(tmp_path / "out")["torch_dtype"] == wanted
    found = mx.load(str(tmp_path / "out" / "model.safetensors"))
    assert found.pop("model.norm.weight").dtype == mx.float32
    assert {array.dtype for array in found.values()} == {getattr(mx, wanted)}


def test_a_number_that_float16_has_none_for_is_refused(broken, tmp_path):
    weights = mx.load(str(broken / "model.safetensors"))
    weights["model.layers.0.mlp.up_proj.weight"] *= 1e6
    mx.save_safetensors(str(broken / "model.safetensors"), weights, {"format": "mlx"})
    with pytest.raises(ExportError, match=r"layers\.0\.mlp\.up_proj\.weight holds .* bf16 or f32"):
        write(broken, None, tmp_path / "out", "f16")
    assert not (tmp_path / "out").exists()


def test_shards_are_named_and_listed_as_on_the_hub(dense_path, tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "SHARD_BYTES", 100_000)
    done = write(dense_path, None, tmp_path / "out")
    files = sorted(file.name for file in (tmp_path / "out").glob("*.safetensors"))
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors" and len(files) > 3
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == done.bytes
    assert set(index["weight_map"].values()) == set(files)
    assert len(index["weight_map"]) == done.tensors


def test_tokenizer_template_and_generation_config_are_copied_byte_for_byte(dense_path, tmp_path):
    base = shutil.copytree(dense_path, tmp_path / "base")
    (base / "generation_config.json").write_text('{"temperature":   0.6}')
    (base / "hf_quant_config.json").write_text("{}")
    write(base, None, tmp_path / "out")
    names = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    for name in names | {"generation_config.json"}:
        assert (tmp_path / "out" / name).read_bytes() == (base / name).read_bytes()
    assert not (tmp_path / "out" / "hf_quant_config.json").exists()


def test_a_full_adapter_is_written(experts, tmp_path):
    prepare_full(experts.model)
    layer = experts.model.layers[0].mlp.switch_mlp.up_proj
    layer.weight = layer.weight + 0.1
    logits = experts.model(TOKENS)
    adapter = collect(experts.model, LoraConfig(method="full"), {})
    detach(experts.model)
    assert worst(experts.model(TOKENS), logits) > 1e-3
    write(experts, adapter, tmp_path / "out")
    assert worst(load(tmp_path / "out").model(TOKENS), logits) < 1e-4


def test_of_a_model_that_sees_the_language_model_is_written(tmp_path):
    base = write_model(tmp_path / "base", "gemma3", tie_word_embeddings=True)
    config = config_of(base)
    text = {k: v for k, v in config["text_config"].items() if k != "vocab_size"}
    changed = config | {"text_config": text, "vocab_size": 200, "eos_token_id": [1, 106]}
    (base / "config.json").write_text(json.dumps(changed))
    (base / "preprocessor_config.json").write_text("{}")
    done = write(base, None, tmp_path / "out")
    after = config_of(tmp_path / "out")
    assert (after["model_type"], after["vocab_size"]) == ("gemma3_text", 200)
    assert after["architectures"] == ["Gemma3ForCausalLM"] and after["eos_token_id"] == [1, 106]
    assert "language model alone" in done.notes[0]
    assert not (tmp_path / "out" / "preprocessor_config.json").exists()
    model, again = open_model(base)[0], open_model(tmp_path / "out")[0]
    assert worst(again(TOKENS), model(TOKENS)) < 1e-6


@pytest.mark.parametrize("family", ["qwen3_5", "qwen3_5_moe"])
def test_a_language_model_that_mlx_lm_does_not_know_alone_is_loaded_here(family, tmp_path):
    base = write_model(tmp_path / "base", family, mtp_num_hidden_layers=1, vocab_size=260)
    write_tokenizer(base)
    done = huggingface.write(base, None, tmp_path / "out")
    assert any("mlx-lm does not" in note for note in done.notes)
    assert any("predict further tokens" in note for note in done.notes)
    assert config_of(tmp_path / "out")["mtp_num_hidden_layers"] == 0
    model, again = open_model(base)[0], open_model(tmp_path / "out")[0]
    assert worst(again(TOKENS), model(TOKENS)) < 1e-5
    write(tmp_path / "out", None, tmp_path / "again")
    first, second = (mx.load(str(tmp_path / n / "model.safetensors")) for n in ("out", "again"))
    assert first.keys() == second.keys()


def test_what_is_written_is_measured(dense, tmp_path):
    adapter, _ = adapted(dense)
    done = huggingface.write(dense, adapter, tmp_path / "out")
    assert done.fidelity is not None and done.fidelity.kl < 1e-6
    assert (tmp_path / "out" / "fidelity.json").exists()
    again = write(tmp_path / "out", None, tmp_path / "again")
    assert again.fidelity is None and not (tmp_path / "again" / "fidelity.json").exists()


@pytest.mark.parametrize("family", ["dbrx", "falcon_h1", "ernie4_5_moe"])
def test_a_family_whose_inverse_is_not_known_is_refused_by_name(family, tmp_path):
    base = write_model(tmp_path / "base", family)
    with pytest.raises(ExportError, match=f"type {family} cannot be written for transformers"):
        write(base, None, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "family, changes, said",
    [
        ("glm", {}, "rotates whole heads"),
        ("jamba", {}, "add up to 1"),
        ("mamba2", {}, "groups of a recurrent block"),
        ("granitemoehybrid", {"mamba_n_groups": 2}, "groups of a recurrent block"),
    ],
)
def test_a_model_that_would_not_be_the_same_there_is_refused(family, changes, said, tmp_path):
    base = write_model(tmp_path / "base", family, **changes)
    with pytest.raises(ExportError, match=f"type {family} would not be the same there: .*{said}"):
        write(base, None, tmp_path / "out")


@pytest.mark.parametrize(
    "step, said",
    [
        (hf_steps.renamed(r"model\.norm", "model.last_norm"), r"model\.last_norm\.weight is new"),
        (hf_steps.changed(r".+q_norm.+", lambda norm: norm + 1), "q_norm.weight holds other"),
        (hf_steps.changed(r".+q_proj.+", mx.transpose), r"q_proj\.weight holds other|was"),
        (hf_steps.unstacked(r"(.+)\.norm\.weight", r"\1.norm.*"), "is new"),
        (hf_steps.joined("q_norm.weight", "q.weight", "q", mx.add), "without its other half"),
    ],
)
def test_an_inverse_that_is_wrong_writes_nothing(step, said, dense_path, tmp_path, monkeypatch):
    monkeypatch.setitem(hf_names.FAMILIES, "qwen3", hf_names.Family("Wrong", (step,)))
    with pytest.raises(ExportError, match=said):
        write(dense_path, None, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_architecture_that_mlx_lm_changed_is_refused(experts_path, monkeypatch):
    model, family = open_model(experts_path)[0], hf_names.FAMILIES["qwen3_moe"]
    round_trip(model, family)
    monkeypatch.setattr(type(model), "sanitize", lambda self, weights: {})
    with pytest.raises(ExportError, match=r"not what was expected.*is missing"):
        round_trip(model, family)


def test_what_cannot_be_written_is_refused_and_nothing_is_left(
    dense, experts_path, tmp_path, monkeypatch
):
    adapter, _ = adapted(dense)
    with pytest.raises(ExportError, match=r"--quant q4_0: --format hf writes f32, f16, bf16"):
        write(dense, adapter, tmp_path / "out", "q4_0")
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").touch()
    with pytest.raises(ExportError, match="exists already"):
        write(dense, adapter, tmp_path / "there")
    with pytest.raises(AdapterError, match="another base"):
        write(experts_path, adapter, tmp_path / "out")
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(1 << 40, 1 << 40, 1 << 20))
    with pytest.raises(ExportError, match=r"needs about .* MB and the disk has"):
        write(dense, adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".out*"))


def test_memory_stays_at_one_shard(dense_path, tmp_path, monkeypatch):
    """MLX's peak while writing, against the size of the model."""
    monkeypatch.setattr(shards, "SHARD_BYTES", 40_000)
    total = (dense_path / "model.safetensors").stat().st_size
    assert peak(lambda: write(dense_path, None, tmp_path / "out")) < 0.7 * total


def test_the_command_says_what_it_wrote(dense, quantized_path, tmp_path):
    base = load(quantized_path)
    adapter, _ = adapted(base)
    adapter.save(tmp_path / "adapter")
    asked = ["export", "--model", str(quantized_path), "--adapter", str(tmp_path / "adapter")]
    out = tmp_path / "out"
    said = CliRunner().invoke(app, [*asked, "--format", "hf", "--out", str(out), "--json"])
    assert said.exit_code == 0, said.output
    result = json.loads(said.stdout.splitlines()[-1])
    assert result["format"] == "hf" and result["dtype"] == "float32" and result["tensors"] == 24
    assert "transformers" in (out / "README.md").read_text()
    plain = CliRunner().invoke(app, [*asked[:3], "--format", "hf", "--out", str(tmp_path / "base")])
    assert plain.exit_code == 0 and not (tmp_path / "base" / "README.md").exists()


def test_a_packed_base_stays_what_it_was(experts_path, tmp_path):
    quantize(experts_path, tmp_path / "packed", bits=4, group_size=32)
    logits = load(tmp_path / "packed").model(TOKENS)
    write(tmp_path / "packed", None, tmp_path / "out")
    assert worst(load(tmp_path / "out").model(TOKENS), logits) < 1e-4


def test_the_guide_names_every_family():
    cells = section(guide("exporting"), "hf").split("|")
    named = {cell.strip() for cell in cells if re.fullmatch(r" [a-z]\w+ ", cell)} - {"family"}
    inner = {kind for kind in hf_names.FAMILIES if kind in SHELLS}  # told as what is around them
    assert named == (hf_names.FAMILIES.keys() | hf_names.SEEING.keys()) - inner
