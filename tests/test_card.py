import mlx.core as mx
import pytest
from conftest import randomized
from huggingface_hub import ModelCard

from mlxlora.config import LoraConfig
from mlxlora.lora.adapter import Adapter
from mlxlora.lora.card import card, facts
from mlxlora.lora.fresh import collect, new_layers

TOLD = {
    "base": {"name": "someone/tiny", "revision": "a" * 40, "quantization": "none"},
    "data": {"format": "chat", "files": {"train": {"path": "train.jsonl", "rows": 1200}}},
    "run": {"lora": {"method": "rslora", "targets": ["*norm*"]}, "train": {"seed": 3}},
    "metrics": {"update": 30, "updates": 40, "valid_loss": 1.25, "valid_loss_before": 2.5},
    "curve": [[n, 3 - n / 10, 2.5 - n / 20] for n in range(30)],
    "versions": {"mlx": "0.32.4"},
}


def adapter_of(base, **lora) -> Adapter:
    config = LoraConfig(rank=2, **lora)
    new_layers(base.model, config, 0)
    randomized(base.model)
    return collect(base.model, config, TOLD)


def test_the_card_beside_an_adapter_is_one_the_hub_reads(dense, tmp_path):
    adapter_of(dense).save(tmp_path / "a")
    read = ModelCard.load(tmp_path / "a" / "README.md")
    assert read.data.base_model == "someone/tiny"
    assert read.data.to_dict()["base_model_relation"] == "adapter"
    assert read.data.library_name == "mlx"
    assert {"lora", "mlxlora"} <= set(read.data.tags)
    for text in (
        "train: 1,200 chat rows in train.jsonl",
        "2.5000 before, 1.2500 after",
        "mlxlora chat --model someone/tiny --adapter .",
        "mlx_lm.generate --model someone/tiny --adapter-path .",
        "PeftModel.from_pretrained",
        r"| lora.targets | \*norm\* |",
        "| rank | 2, alpha 32, scale 16 |",
    ):
        assert text in read.text, text
    points = [line for line in read.text.splitlines() if line.startswith("| 2")]
    assert "| 29 | 0.1000 | 1.0500 |" in points  # the last is always there
    assert read.text.count("\n| ") < 40  # 30 points are thinned


def test_a_base_that_is_a_directory_is_named_but_not_as_a_hub_id(dense):
    base = {"name": "tiny", "revision": "", "quantization": "4 bits"}
    told = {**TOLD, "base": base}
    read = ModelCard(card(Adapter("full", {"model.norm.weight": mx.ones(64)}, provenance=told)))
    assert read.data.base_model is None
    assert "# Every weight for tiny" in read.text
    assert "mlx_lm.generate" not in read.text


def test_mlx_lm_is_not_promised_what_it_refuses(dense):
    assert "mlx_lm.generate" not in card(adapter_of(dense, train_also=("norm",)))


def test_an_adapter_that_tells_nothing_has_a_card_all_the_same():
    read = ModelCard(card(Adapter("lora", {"a.lora_a": mx.ones((2, 2))}, 2, 1.0)))
    assert "--model BASE" in read.text and "Result" not in read.text


@pytest.mark.parametrize(
    "text", ["<script>x</script>", "a | b", "[x](javascript:y)", "`x`", "\n# x"]
)
def test_what_strangers_tell_stays_words(text):
    told = {**TOLD, "base": {"name": text}, "run": {"lora": {"targets": [text]}}}
    told["data"] = {"files": {"train": {"path": text, "rows": 1}}}
    made = card(Adapter("lora", {"a.lora_a": mx.ones((2, 2))}, 2, 1.0, provenance=told))
    plain = card(Adapter("lora", {"a.lora_a": mx.ones((2, 2))}, 2, 1.0, provenance=TOLD))
    assert "<script" not in made and "](java" not in made and text not in made
    assert made.count("\n# ") == plain.count("\n# ") == 1
    lines = [line for line in made.splitlines() if line.startswith("|")]
    assert all(line.count("|") in (3, 4) for line in lines)


def test_facts_name_the_method_it_was_trained_by(dense):
    told = dict(facts(adapter_of(dense)))
    assert told["method"] == "rslora" and told["update"] == "30 of 40"
    assert len(told["curve"]) == 30
