import json
import shutil

import pytest
from conftest import randomized

from mlxlora.config import DataConfig, LoraConfig, RunConfig
from mlxlora.errors import DataError, ExportError
from mlxlora.export.fuse import fuse
from mlxlora.export.proof import Proof
from mlxlora.lora.adapter import Adapter
from mlxlora.lora.fresh import collect, new_layers
from mlxlora.train.loop import train


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
