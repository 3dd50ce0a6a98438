import json
import shutil

import pytest
from conftest import randomized

from mlxlora.config import DataConfig, LoraConfig, RunConfig
from mlxlora.errors import ConfigError, DataError, ExportError
from mlxlora.export.fidelity import Change, Fidelity
from mlxlora.export.fuse import fuse, wished
from mlxlora.export.proof import Proof
from mlxlora.lora.adapter import Adapter
from mlxlora.lora.fresh import collect, new_layers
from mlxlora.train.loop import train
from mlxlora.verbs.fidelity import proof as asked_for
from mlxlora.verbs.fidelity import show
from mlxlora.verbs.formats import FORMATS, Order


@pytest.fixture
def learned(quantized, rows, tmp_path):
    """An adapter over four bits that has learned its rows."""
    run = {
        "model": str(quantized.path),
        "out": str(tmp_path / "run"),
        "data": {"path": str(rows)},
        "lora": {"rank": 4},
        "train": {"updates": 30, "learning_rate": 1e-2},
    }
    for _ in train(RunConfig.from_dict(run), quantized):
        pass
    return Adapter.load(tmp_path / "run" / "adapter")


def test_what_is_kept_of_the_training_is_told_with_the_model(quantized, learned, tmp_path):
    done = fuse(quantized.path, learned, tmp_path / "fused")
    found = done.fidelity
    assert found.own_rows and "kept for validation" in found.rows
    assert found.loss_adapter < found.loss_base - 1
    assert found.kept > 0.95 and found.kl < 0.1 < found.kl_base
    told = json.loads((tmp_path / "fused" / "fidelity.json").read_text())
    assert told["kl"] == found.kl and len(told["layers"]) == 14
    card = (tmp_path / "fused" / "README.md").read_text()
    assert f"{found.kept:.1%} of what training gained is kept" in card
    assert f"| this model | {found.loss_written:.4f} |" in card


def test_a_model_that_lost_what_was_trained_is_not_left(quantized, dense, tmp_path):
    """So small a change that four bits round it away."""
    config = LoraConfig(rank=4)
    new_layers(quantized.model, config, 0)
    randomized(quantized.model)
    adapter = collect(quantized.model, config, {"base": quantized.identity.to_dict()})
    faint = Adapter(adapter.method, adapter.weights, 4, adapter.scale / 10, provenance={})
    with pytest.raises(ExportError, match="too far from base") as refused:
        fuse(quantized.path, faint, tmp_path / "fused", "keep", proof=Proof(max_kl=1e-6))
    assert "--bits 8 keeps more" in str(refused.value)
    assert not list(tmp_path.glob("*fused*")) and not list(tmp_path.glob(".*"))
    allowed = fuse(quantized.path, faint, tmp_path / "fused", "keep", proof=Proof(max_kl=9))
    exact = fuse(quantized.path, faint, tmp_path / "exact", "none", proof=Proof(max_kl=1e-6))
    assert exact.fidelity.kl < 1e-6 < allowed.fidelity.kl
    assert not allowed.fidelity.own_rows


def test_rows_of_the_users_choice(quantized, learned, rows, tmp_path):
    proof = Proof(rows=DataConfig(path=str(rows)))
    done = fuse(quantized.path, learned, tmp_path / "fused", proof=proof)
    assert done.fidelity.rows == "8 rows of valid.jsonl"


def test_without_a_proof_nothing_is_measured(quantized, learned, tmp_path):
    done = fuse(quantized.path, learned, tmp_path / "fused", proof=None)
    assert done.fidelity is None and not (tmp_path / "fused" / "fidelity.json").exists()
    assert "What is kept" not in (tmp_path / "fused" / "README.md").read_text()


def test_tokens_that_the_model_has_no_embedding_of_are_refused(quantized, learned, tmp_path):
    file = quantized.path / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    strange = {**tokenizer["added_tokens"][-1], "id": 5000, "content": "<strange>"}
    rows = tmp_path / "strange.jsonl"
    rows.write_text('{"prompt": "a", "completion": "<strange>"}\n')
    base = shutil.copytree(quantized.path, tmp_path / "base")
    tokenizer["added_tokens"].append(strange)
    (base / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(DataError, match=r"no row of strange\.jsonl has a token"):
        proof = Proof(rows=DataConfig(path=str(rows)))
        fuse(base, learned, tmp_path / "fused", proof=proof, force=True)
    assert not (tmp_path / "fused").exists()


def test_figures_of_another_model_do_not_come_along(quantized, learned, tmp_path):
    base = shutil.copytree(quantized.path, tmp_path / "base")
    (base / "fidelity.json").write_text("{}")
    fuse(base, learned, tmp_path / "fused", "keep", proof=None, force=True)
    assert not (tmp_path / "fused" / "fidelity.json").exists()


@pytest.mark.parametrize("text", ["7", "²", "", "99999999999999999999", "Auto"])
def test_bits_that_are_none_are_refused(text):
    with pytest.raises(ConfigError, match="known are auto, keep, none, 4, 5, 6, 8"):
        wished(text, "--bits")


def test_options_of_the_measurement_are_used_or_refused(tmp_path):
    with pytest.raises(DataError, match="no data at"):
        asked_for(str(tmp_path / "none.jsonl"), None, True, False)
    with pytest.raises(ConfigError, match="--no-fidelity measures nothing"):
        asked_for(None, 0.1, False, False)


@pytest.mark.parametrize("kind", ["peft", "gguf-lora"])
@pytest.mark.parametrize(
    "proof, check, says",
    [(Proof(max_kl=0.1), False, "--max-kl are for the formats"), (None, True, "--check its model")],
)
def test_formats_of_adapters_refuse_what_is_for_models(kind, proof, check, says, tmp_path):
    adapter = Adapter("lora", {}, 4, 2.0, provenance={})
    order = Order(
        *("base", tmp_path, adapter, tmp_path / "out", None),
        proof=proof,
        check=check,
        keep_adapter=False,
        force=False,
        trust_remote_code=False,
        progress=lambda what, done, of: None,
    )
    with pytest.raises(ConfigError, match=says):
        FORMATS[kind](order)
    assert not (tmp_path / "out").exists()


def test_a_change_that_was_lost_is_not_shown_as_kept():
    tables = []

    class Screen:
        def say(self, *words):
            pass

        def table(self, head, rows):
            tables.append(rows)

    layers = (Change("lost", 0.0, 1.0, 0.0, 1.0), Change("uncalled", 0.5, 0.1))
    show(Screen(), Fidelity("rows", True, 1, 2, 1, 2, 1, 1, 0.5, 0.5, layers), "fused")
    lost, uncalled = tables[-1]
    assert lost == ["lost", "100.0%", "100.0%", "0.0000"]
    assert uncalled[2:] == ["-", "-"]
