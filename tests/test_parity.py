"""Gradients and logits against PyTorch + transformers + PEFT, which we did not write."""

import json

import mlx.core as mx
import numpy as np
import pytest
from conftest import CHATML, DENSE, randomized, write_model
from mlx.utils import tree_flatten

from mlxlora.base import load
from mlxlora.config import DataConfig, LoraConfig, TrainConfig
from mlxlora.data.batches import pack, pad
from mlxlora.data.formats import parse
from mlxlora.data.render import Renderer
from mlxlora.lora.fresh import new_layers
from mlxlora.train.optim import make_optimizer
from mlxlora.train.step import Stepper

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore"),
]

RANK, ALPHA = 4, 10.0
ROWS = [
    {"messages": [{"role": "user", "content": "hé"}, {"role": "assistant", "content": "ok then"}]},
    {
        "messages": [
            {"role": "user", "content": "one"},
            {"role": "assistant", "content": "two"},
            {"role": "user", "content": "a longer question"},
            {"role": "assistant", "content": "three"},
        ]
    },
    {"prompt": "p", "completion": "c"},
]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """The same random model here and in transformers."""
    config = {**DENSE, "architectures": ["Qwen3ForCausalLM"]}
    path = write_model(tmp_path_factory.mktemp("parity") / "m", config, CHATML)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    return load(path), theirs


def attached(base, theirs):
    """Our layers and PEFT's over the same modules, with the same A and B."""
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    new_layers(base.model, LoraConfig(rank=RANK, alpha=ALPHA), 0)
    randomized(base.model)
    tuned = peft.get_peft_model(
        theirs, peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=names, lora_dropout=0.0)
    )
    parameters = dict(tuned.named_parameters())
    for name, array in tree_flatten(base.model.trainable_parameters()):
        with torch.no_grad():
            parameters[_peft_name(name)].copy_(torch.tensor(np.array(array).T))
    return tuned, parameters


def _peft_name(name: str) -> str:
    path, _, leaf = name.rpartition(".")
    return f"base_model.model.{path}.{'lora_A' if leaf == 'lora_a' else 'lora_B'}.default.weight"


def test_gradients_of_a_whole_model_are_those_of_pytorch_and_peft(models):
    base, theirs = models
    tuned, parameters = attached(base, theirs)
    examples = [Renderer(base.tokenizer, DataConfig())(parse(row, {})) for row in ROWS]
    stepper = Stepper(base.model, make_optimizer(TrainConfig()), clip=0)
    batches = (pack(examples[:2]), pad(examples[2:]))
    total_loss, summed = stepper.gradients(batches, 0, 1)
    tokens = sum(batch.tokens for batch in batches)

    total, count = torch.tensor(0.0), 0
    for example in examples:  # one row at a time: no padding at all
        ids = torch.tensor(example.tokens[None].astype(np.int64))
        labels = torch.where(torch.tensor(example.mask[None]), ids, -100)
        logits = tuned(ids).logits[:, :-1]
        total = total + torch.nn.functional.cross_entropy(
            logits.reshape(-1, logits.shape[-1]), labels[:, 1:].reshape(-1), reduction="sum"
        )
        count += int((labels[:, 1:] != -100).sum())
    (total / count).backward()

    assert tokens == count
    assert total_loss.item() / tokens == pytest.approx((total / count).item(), rel=1e-5)
    squares = 0.0
    for name, gradient in tree_flatten(summed):
        expected = parameters[_peft_name(name)].grad.numpy().T
        ours = np.array(gradient) / tokens
        squares += float((expected**2).sum())
        assert np.abs(ours - expected).max() < 2e-5 * max(1.0, np.abs(expected).max()), name
    _, norm, _ = stepper.step(batches, 0, 1, rate=0.0)
    assert norm == pytest.approx(squares**0.5, rel=1e-4)
    tuned.unload()


def test_a_fused_model_has_the_logits_of_peft_s_merge(models, tmp_path):
    from mlxlora.export.fuse import fuse
    from mlxlora.lora.attach import detach
    from mlxlora.lora.fresh import collect

    base, theirs = models
    tuned, _ = attached(base, theirs)
    adapter = collect(base.model, LoraConfig(rank=RANK, alpha=ALPHA), {})
    detach(base.model)
    fuse(base, adapter, tmp_path / "fused")
    tokens = [[1, 5, 200, 33, 7]]
    merged = tuned.merge_and_unload()
    with torch.no_grad():
        expected = merged(torch.tensor(tokens)).logits.numpy()
    ours = np.array(load(tmp_path / "fused").model(mx.array(tokens)))
    assert np.abs(ours - expected).max() < 1e-4 * np.abs(expected).max()
    assert json.loads((tmp_path / "fused" / "config.json").read_text())["model_type"] == "qwen3"
