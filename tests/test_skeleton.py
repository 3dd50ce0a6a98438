import json

import pytest
from conftest import DENSE, write_model
from hub_server import serving
from memory import held
from mlx.utils import tree_flatten
from test_hub import NAME, mlxlora

from mlxlora.base import load
from mlxlora.errors import ModelError
from mlxlora.readers import safetensors_header
from mlxlora.skeleton import open_skeleton, write_stand_in


@pytest.fixture(params=["dense_path", "quantized_path", "experts_path"])
def path(request):
    return request.getfixturevalue(request.param)


def shapes(model) -> dict:
    return {name: (a.shape, a.dtype) for name, a in tree_flatten(model.parameters())}


def test_a_skeleton_is_the_base_without_its_weights(path):
    skeleton, base = open_skeleton(path), load(path)
    assert shapes(skeleton.model) == shapes(base.model)
    assert [type(m) for m in skeleton.model.modules()] == [type(m) for m in base.model.modules()]
    assert skeleton.bytes == sum(a.nbytes for _, a in tree_flatten(base.model.parameters()))
    assert skeleton.local and skeleton.tokenizer().eos_token_ids == base.tokenizer.eos_token_ids


def test_no_weight_is_read(tmp_path):
    path = write_model(tmp_path / "wide", {**DENSE, "vocab_size": 40_000})
    before = held()
    skeleton = open_skeleton(path)
    assert skeleton.bytes > 10_000_000
    assert held() - before < 1_000_000


def test_a_stand_in_has_the_header_and_takes_no_room(dense_path, tmp_path):
    tensors = safetensors_header(dense_path / "model.safetensors")
    big = {"dtype": "F32", "shape": [1 << 28], "data_offsets": [0, 1 << 30]}
    write_stand_in(tmp_path / "a.safetensors", tensors)
    write_stand_in(tmp_path / "b.safetensors", {"big": big})
    assert safetensors_header(tmp_path / "a.safetensors") == tensors
    assert safetensors_header(tmp_path / "b.safetensors") == {"big": big}
    assert (tmp_path / "b.safetensors").stat().st_blocks * 512 < 1_000_000


def test_what_is_damaged_is_refused_as_it_is_when_loaded(broken):
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-7])
    with pytest.raises(ModelError, match="truncated"):
        open_skeleton(broken)


@pytest.fixture
def served(tmp_path):
    path = write_model(tmp_path / "served", {**DENSE, "vocab_size": 20_000})
    with serving() as hub:
        hub.put(NAME, {file.name: file.read_bytes() for file in path.iterdir()})
        yield hub, path


def test_a_plan_for_a_hub_id_fetches_headers_alone(served, rows, tmp_path):
    hub, path = served
    endpoint = hub.endpoint
    options = ["--data", rows, "--updates", 2, "--json"]
    remote = mlxlora(endpoint, tmp_path / "cache", "plan", "--model", NAME, *options)
    assert remote.returncode == 0, remote.stderr
    assert 0 < hub.sent["model.safetensors"] < 0.1 * (path / "model.safetensors").stat().st_size
    local = mlxlora(endpoint, tmp_path / "cache", "plan", "--model", path, *options)
    parts = [json.loads(done.stdout.splitlines()[-1])["parts"] for done in (remote, local)]
    assert parts[0]["base"] == parts[1]["base"] and parts[0]["adapter"] == parts[1]["adapter"]


def test_an_unknown_id_is_one_message(served, tmp_path):
    done = mlxlora(served[0].endpoint, tmp_path / "cache", "plan", "--model", "no/body")
    assert done.returncode == 2
    assert "no/body is neither a directory here nor to be had from the Hub" in done.stderr
    assert "Traceback" not in done.stderr
