import dataclasses

import mlx.core as mx
from conftest import randomized

from mlxlora.config import LoraConfig
from mlxlora.lora.adapter import Adapter
from mlxlora.lora.attach import attached
from mlxlora.lora.fresh import collect, new_layers
from mlxlora.lora.verify import DIFFERS, SAME, UNKNOWN, verify


def saved(base, path) -> Adapter:
    new_layers(base.model, LoraConfig(rank=2, train_also=("norm",)), 0)
    randomized(base.model)
    collect(base.model, LoraConfig(rank=2), {"base": base.identity.to_dict()}).save(path)
    return Adapter.load(path)


def found(adapter, base) -> dict[str, str]:
    return {check.what: check.found for check in verify(adapter, base)}


def test_on_its_own_base_everything_is_the_same(dense, tmp_path):
    checks = verify(saved(dense, tmp_path / "a"), dense)
    assert {check.found for check in checks} == {SAME}
    assert checks[-1].detail == "14 layers, 1 whole weights fit"
    assert attached(dense) == ((), None)


def test_each_thing_that_differs_is_named(dense, quantized, tmp_path):
    adapter = saved(dense, tmp_path / "a")
    own = found(adapter, quantized)
    assert {what for what, state in own.items() if state == DIFFERS} == {
        "base",
        "bits",
    }
    for key, what in (("tokenizer", "tokenizer"), ("template", "template")):
        identity = dataclasses.replace(dense.identity, **{key: "other"})
        other = found(adapter, dataclasses.replace(dense, identity=identity))
        assert {name for name, state in other.items() if state == DIFFERS} == {what}


def test_what_an_adapter_does_not_tell_is_not_known(dense):
    weights = {"model.norm.lora_a": mx.zeros((2, 2)), "model.norm.lora_b": mx.zeros((2, 2))}
    own = found(Adapter("lora", weights, 2, 1.0), dense)
    assert own["weights"] == own["base"] == UNKNOWN
    assert own["shapes"] == DIFFERS


def test_what_does_not_fit_is_named_in_order_and_not_as_the_only_one(dense):
    names = [f"model.layers.{n}.self_attn.q_proj.{leaf}" for n in (10, 9) for leaf in "ab"]
    weights = {name.replace("q_proj.", "q_proj.lora_"): mx.zeros((2, 2)) for name in names}
    last = verify(Adapter("lora", weights, 2, 1.0), dense)[-1]
    assert last.detail == (
        "model.layers.9.self_attn.q_proj: the base has no such layer (among others)"
    )
