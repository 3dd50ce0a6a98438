"""Adapters from strangers: usable, or one AdapterError; the base stays as it was."""

import json
import os
import shutil
import struct
import tempfile
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from conftest import randomized
from hostile import (
    JSON_TEXTS,
    NAMES,
    damaged,
    json_text,
    mutated,
    nothing_written,
    value_or_error,
    values,
)
from huggingface_hub import ModelCard
from hypothesis import given
from hypothesis import strategies as st
from mlx.utils import tree_flatten

from mlxlora.base import Base, load
from mlxlora.config import LoraConfig
from mlxlora.errors import AdapterError, MlxLoraError
from mlxlora.export.fuse import fuse
from mlxlora.files import hash_file
from mlxlora.lora.adapter import Adapter
from mlxlora.lora.attach import attach, detach
from mlxlora.lora.card import card, facts
from mlxlora.lora.fresh import collect, new_layers

TOKENS = mx.array([[1, 2, 3]])
WEIGHTS, CONFIG, PROVENANCE = "adapters.safetensors", "adapter_config.json", "provenance.json"
PROVEN = {
    "data": {"format": "chat", "files": {"train": {"path": "d/train.jsonl", "rows": 3}}},
    "metrics": {"update": 1, "updates": 2, "valid_loss": 1.5, "valid_loss_before": 2},
    "run": {"lora": {"method": "dora", "targets": ["q_proj"]}, "train": {"updates": 3}},
    "curve": [[1, 2.5, 2.0], [2, 2.0, None], [3, 1.5, 1.5]],
    "versions": {"mlx": "0.32.4"},
}
TYPES = ["F16", "BF16", "F32", "F64", "I8", "U8", "I32", "I64", "BOOL", "C64", "F8_E4M3", "F4", "x"]


@pytest.fixture(scope="module")
def base(dense_path) -> Base:
    return load(dense_path)


@pytest.fixture(scope="module")
def good(base, tmp_path_factory) -> Path:
    """A small adapter in order, with provenance."""
    config = LoraConfig(targets=("q_proj",), rank=2, method="dora", train_also=("norm",))
    new_layers(base.model, config, 0)
    randomized(base.model)
    told = {"base": base.identity.to_dict(), **PROVEN}
    directory = collect(base.model, config, told).save(tmp_path_factory.mktemp("a") / "good")
    detach(base.model)
    return directory


def use(what: str, base: Base, good: Path, name: str, data: bytes, *, hashed: bool = False):
    """Replace one file of the adapter, then do with it everything that can be done."""
    with tempfile.TemporaryDirectory() as folder:
        directory = shutil.copytree(good, Path(folder) / "inner" / "adapter")
        (directory / name).write_bytes(data)
        if hashed:
            told = json.loads((directory / PROVENANCE).read_text())
            told["weights_sha256"] = hash_file(directory / WEIGHTS)
            (directory / PROVENANCE).write_text(json.dumps(told))
        before = dict(tree_flatten(base.model.parameters()))
        with nothing_written(Path(folder)), value_or_error(what, AdapterError):
            adapter = Adapter.load(directory)
            assert all(isinstance(text, str) for fact in facts(adapter) for text in fact)
            json.dumps(adapter.config(), allow_nan=False)
            assert ModelCard(card(adapter)).data.library_name == "mlx"
            attach(base, adapter, force=True)
            mx.eval(base.model(TOKENS))
            attach(base, adapter)
        detach(base.model)
        after = dict(tree_flatten(base.model.parameters()))
        assert all(after[key] is array for key, array in before.items())


def safetensors(header: object, data: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json_text(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def parts(file: Path) -> tuple[dict, bytes]:
    whole = file.read_bytes()
    start = 8 + int.from_bytes(whole[:8], "little")
    return json.loads(whole[8:start]), whole[start:]


@given(st.data())
def test_damaged_files(base, good, data):
    name = data.draw(st.sampled_from([WEIGHTS, CONFIG, PROVENANCE]))
    whole = (good / name).read_bytes()
    use(f"adapter: damaged {name}", base, good, name, data.draw(damaged(whole)))
    use("adapter: any bytes", base, good, name, data.draw(st.binary(max_size=100)))


@given(st.data())
def test_config_with_something_wrong_anywhere(base, good, data):
    tree = data.draw(mutated(json.loads((good / CONFIG).read_text())))
    use("adapter: config wrong anywhere", base, good, CONFIG, json_text(tree).encode())


@given(st.data())
def test_provenance_with_something_wrong_anywhere(base, good, data):
    tree = data.draw(mutated(json.loads((good / PROVENANCE).read_text())))
    use("adapter: provenance wrong anywhere", base, good, PROVENANCE, json_text(tree).encode())


@given(
    st.sampled_from(["rank", "scale", "dropout", "keys", "num_layers", "fine_tune_type"]), values
)
def test_any_value_of_any_number(base, good, key, value):
    tree = json.loads((good / CONFIG).read_text())
    (tree if key in tree else tree["lora_parameters"])[key] = value
    use("adapter: any value in config", base, good, CONFIG, json_text(tree).encode())


@given(st.data())
def test_headers_with_something_wrong_anywhere(base, good, data):
    header, rest = parts(good / WEIGHTS)
    tree = data.draw(mutated(header))
    use("adapter: header wrong", base, good, WEIGHTS, safetensors(tree, rest), hashed=True)


@given(st.data())
def test_tensors_of_any_type_and_shape(base, good, data):
    """Files in order as far as safetensors goes, of tensors that fit nothing."""
    names = [*parts(good / WEIGHTS)[0], *NAMES, "lora_a", ".lora_b", "model.lora_a", "norm.lora_a"]
    shape = st.lists(st.integers(0, 65), max_size=4)
    tensors = data.draw(
        st.dictionaries(
            st.sampled_from([name for name in names if name != "__metadata__"]),
            st.tuples(st.sampled_from(TYPES), shape),
            max_size=5,
        )
    )
    width = {"F64": 8, "I64": 8, "C64": 8, "I32": 4, "F32": 4, "F16": 2, "BF16": 2}
    header, end = {}, 0
    for name, (dtype, dims) in tensors.items():
        size = int(np.prod(dims, dtype=np.int64)) * width.get(dtype, 1)
        header[name] = {"dtype": dtype, "shape": dims, "data_offsets": [end, end + size]}
        end += size
    whole = safetensors(header, data.draw(st.sampled_from([b"\0", b"\x3c", b"\x7f"])) * end)
    use("adapter: any tensors", base, good, WEIGHTS, whole, hashed=True)


@pytest.mark.parametrize(
    "place", ["base", "data", "metrics", "versions", "data.files", "base.name"]
)
@pytest.mark.parametrize("inner", ["", ".fingerprint", ".train", ".mlx", ".update"])
def test_null_in_provenance_is_as_good_as_absent(base, good, place, inner):
    tree = node = json.loads((good / PROVENANCE).read_text())
    *path, last = (place + inner).split(".")
    for name in path:
        node = node[name] if isinstance(node.get(name), dict) else node
    node[last] = None
    use("adapter: null in provenance", base, good, PROVENANCE, json_text(tree).encode())


@pytest.mark.parametrize("name", [CONFIG, PROVENANCE])
@pytest.mark.parametrize("text", JSON_TEXTS)
def test_texts_that_no_tree_gives(base, good, name, text):
    use("adapter: odd texts", base, good, name, text.encode())


HEADERS = [
    *(b"", b"\xff" * 8, b"\xff" * 200, struct.pack("<Q", 2**63), struct.pack("<Q", 0) + b"{}"),
    struct.pack("<Q", 2**63) + b"{}",
    struct.pack("<q", -1) + b"{}",
    *(safetensors(text.encode(), b"") for text in JSON_TEXTS),
    safetensors({"__metadata__": {"a": 5}}, b""),
    safetensors({"__metadata__": None}, b""),
]
ENTRIES = [
    ([2], [0, 8], "F32"),
    *(([-1, -2], [0, 8], "F32"), ([2**32 + 2], [0, 8], "F32"), ([0, 2**40], [0, 0], "F32")),
    *(([2], [0, -8], "F32"), ([2], [8, 0], "F32"), ([2], [-8, 0], "F32"), ([2], [4, 12], "F32")),
    *(([2], [0, 2**63], "F32"), ([True, 2], [0, 8], "F32"), ([2.0], [0, 8], "F32")),
    *(([1] * 100, [0, 4], "F32"), ([2**20, 2**20], [0, 2**42], "F32"), ("2", "08", "F32")),
    *(({}, [0, 8], "F32"), ([2], [0, 8, 8], "F32"), ([2], [0], "F32"), ([8], [0, 8], ["U8"])),
]


@pytest.mark.parametrize("whole", HEADERS, ids=range(len(HEADERS)))
def test_headers_that_no_tree_gives(base, good, whole):
    use("adapter: odd headers", base, good, WEIGHTS, whole, hashed=True)


@pytest.mark.parametrize("shape, offsets, dtype", ENTRIES)
def test_entries_that_lie(base, good, shape, offsets, dtype):
    entry = {"dtype": dtype, "shape": shape, "data_offsets": offsets}
    for data in (b"\0" * 8, b"\0" * 16):
        use("adapter: lying entries", base, good, WEIGHTS, safetensors({"a": entry}, data))
    twice = b'{"a": %s, "a": %s}' % ((json.dumps(entry).encode(),) * 2)
    use("adapter: lying entries", base, good, WEIGHTS, safetensors(twice, b"\0" * 8))


def rewritten(good: Path, directory: Path, change) -> Path:
    """A copy of the adapter whose weights change(name, array) replaces; provenance taken away."""
    shutil.copytree(good, directory)
    weights = {name: change(name, array) for name, array in mx.load(str(good / WEIGHTS)).items()}
    mx.save_safetensors(
        str(directory / WEIGHTS), {k: v for k, v in weights.items() if v is not None}
    )
    (directory / PROVENANCE).unlink()
    return directory


@pytest.mark.parametrize(
    "change, says",
    [
        (lambda name, a: a * float("nan"), "NaN or infinity"),
        (lambda name, a: a + float("inf"), "NaN or infinity"),
        (lambda name, a: a.astype(mx.int32), "of type I32, not floating"),
        (lambda name, a: a.astype(mx.bool_), "of type BOOL, not floating"),
        (lambda name, a: a.astype(mx.complex64), "of type C64, not floating"),
        (lambda name, a: None if name.endswith("lora_b") else a, "lora_b is missing"),
        (lambda name, a: None, "holds no LoRA tensor"),
        (lambda name, a: a.T, "does not fit this base"),
        (lambda name, a: mx.zeros((1, 1)), "does not fit this base"),
        (lambda name, a: a[..., None], "does not fit this base"),
    ],
)
def test_weights_that_cannot_be_used_are_named(base, good, tmp_path, change, says):
    directory = rewritten(good, tmp_path / "a", change)
    with pytest.raises(AdapterError, match=says):
        attach(base, Adapter.load(directory))
    with pytest.raises(MlxLoraError):
        fuse(base.path, Adapter.load(directory), tmp_path / "fused")
    assert not (tmp_path / "fused").exists()


@pytest.mark.parametrize(
    "path", ["model", "", "model.norm", "model.layers", "model.layers.0", "no"]
)
def test_modules_that_are_no_layers_are_named(base, tmp_path, path):
    weights = {f"{path}.lora_a": mx.zeros((64, 2)), f"{path}.lora_b": mx.zeros((2, 64))}
    adapter = Adapter("lora", weights, 2, 1.0)
    with pytest.raises(AdapterError, match="no such layer"):
        attach(base, adapter)
    with pytest.raises(AdapterError, match="no such layer"):
        fuse(base.path, adapter, tmp_path / "fused")


def test_a_full_adapter_of_packed_weights_is_refused(quantized, tmp_path):
    name = "model.layers.0.self_attn.q_proj.weight"
    own = dict(tree_flatten(quantized.model.parameters()))[name]
    adapter = Adapter("full", {name: own.astype(mx.float32)})
    with pytest.raises(AdapterError, match=r"adapter \(64, 8\), base \(64, 64\)"):
        attach(quantized, adapter)


@pytest.mark.parametrize("name", [WEIGHTS, CONFIG, PROVENANCE])
def test_what_is_no_file_is_refused_and_not_waited_for(base, good, tmp_path, name):
    directory = shutil.copytree(good, tmp_path / "adapter")
    place = directory / name
    for kind in ("pipe", "loop", "folder", "zero", "nowhere"):
        if place.is_dir() and not place.is_symlink():
            place.rmdir()
        else:
            place.unlink()
        match kind:
            case "pipe":
                os.mkfifo(place)
            case "loop":
                place.symlink_to(place)
            case "folder":
                place.mkdir()
            case "zero":
                place.symlink_to("/dev/zero")
            case "nowhere":
                place.symlink_to(directory / "nowhere")
        with value_or_error("adapter: no file", AdapterError):
            Adapter.load(directory)
            raise AssertionError(f"{kind} was read")


@pytest.mark.parametrize("name", [*NAMES, "/dev/null", "/dev/zero"])
def test_names_that_are_no_directory_are_refused(name):
    with pytest.raises(AdapterError):
        Adapter.load(name)
