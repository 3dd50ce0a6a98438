"""Model directories from strangers: loaded, or one ModelError; none of their code runs."""

import json
import os
import shutil
import tempfile
import warnings
from pathlib import Path

import mlx.core as mx
import pytest
from conftest import write_rows
from hostile import JSON_TEXTS, NAMES, damaged, json_text, mutated, nothing_written, value_or_error
from hypothesis import given
from hypothesis import strategies as st

from mlxlora.base import load
from mlxlora.chat import Conversation
from mlxlora.config import DataConfig
from mlxlora.data.records import open_splits
from mlxlora.data.render import Renderer
from mlxlora.errors import DataError, MlxLoraError, ModelError
from mlxlora.generate import stream
from mlxlora.model_files import check_directory
from mlxlora.serve.engine import Engine

INDEX = "model.safetensors.index.json"
FILES = ["config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"]


@pytest.fixture(scope="module", params=["dense_path", "quantized_path", "experts_path"])
def good(request) -> Path:
    return request.getfixturevalue(request.param)


def use(what: str, good: Path, name: str, data: bytes) -> None:
    """Replace one file of the model, then load it, render a row and answer."""
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # transformers' own, of strange tokenizers
        directory = shutil.copytree(good, Path(folder) / "inner" / "model")
        (directory / name).write_bytes(data)
        rows = write_rows(Path(folder) / "rows.jsonl", [{"prompt": "a", "completion": "b"}] * 9)
        with nothing_written(Path(folder)), value_or_error(what, MlxLoraError):
            base = load(directory)
            renderer = Renderer(base.tokenizer, DataConfig())
            for record in open_splits(DataConfig(path=str(rows), valid_fraction=0), 0).train:
                renderer(record)
            with Engine(base) as engine:
                list(Conversation(engine, max_tokens=2).say("hi"))


@given(st.data())
def test_damaged_files(good, data):
    name = data.draw(st.sampled_from([*FILES, "model.safetensors"]))
    whole = (good / name).read_bytes()
    use(f"model: damaged {name}", good, name, data.draw(damaged(whole)))


@given(st.data())
def test_config_with_something_wrong_anywhere(good, data):
    tree = data.draw(mutated(json.loads((good / "config.json").read_text())))
    use("model: config wrong anywhere", good, "config.json", json_text(tree).encode())


@given(st.data())
def test_tokenizer_with_something_wrong_anywhere(good, data):
    name = data.draw(st.sampled_from(["tokenizer.json", "tokenizer_config.json"]))
    tree = json.loads((good / name).read_text())
    if name == "tokenizer_config.json":
        tree |= {"chat_template": "{{ messages }}", "model_max_length": 5, "bos_token": "a"}
        tree |= {"added_tokens_decoder": {"5": {"content": "x", "special": True}}}
    use(f"model: {name} wrong anywhere", good, name, json_text(data.draw(mutated(tree))).encode())


@given(st.data())
def test_index_with_something_wrong_anywhere(dense_path, data):
    tree = {"metadata": {"total_size": 1}, "weight_map": {"a": "model.safetensors", "b": "x"}}
    whole = json_text(data.draw(mutated(tree))).encode()
    use("model: index wrong anywhere", dense_path, INDEX, whole)


@pytest.mark.parametrize("name", ["config.json", INDEX, "tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("text", JSON_TEXTS)
def test_texts_that_no_tree_gives(dense_path, name, text):
    use("model: odd texts", dense_path, name, text.encode())


@pytest.mark.parametrize("name", [*NAMES, "/dev/zero", "../model.safetensors", 5, None, ["a"]])
def test_an_index_cannot_name_what_is_not_in_the_directory(broken, name):
    (broken / INDEX).write_text(json_text({"weight_map": {"a": "model.safetensors", "b": name}}))
    with pytest.raises(ModelError):
        check_directory(broken)


@pytest.mark.parametrize("name", [*NAMES, "/dev/zero", "no/such", "../../etc"])
def test_names_that_are_no_model_are_refused(name, monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError):
        load(name)


def test_a_hub_that_never_answers_is_not_waited_for(monkeypatch):
    import socket

    import huggingface_hub.constants
    import huggingface_hub.hf_api

    from mlxlora import hub_files

    monkeypatch.setattr(hub_files, "HUB_SECONDS", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as server:
        endpoint = f"http://127.0.0.1:{server.getsockname()[1]}"
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", endpoint)
        with value_or_error("model: silent hub", ModelError):
            load("nobody/nothing")
            raise AssertionError("it was found")


@pytest.mark.parametrize("name", [*FILES, INDEX, "model.safetensors", "model-2.safetensors", "x"])
def test_a_pipe_or_device_in_the_directory_is_refused_and_not_waited_for(broken, name):
    for make in (os.mkfifo, lambda place: place.symlink_to("/dev/zero")):
        (broken / name).unlink(missing_ok=True)
        make(broken / name)
        with value_or_error("model: pipe or device", ModelError):
            load(broken)
            raise AssertionError("it was read")


@pytest.mark.parametrize("name", [*FILES[:2], "model.safetensors"])
def test_links_to_nothing_and_to_themselves_are_refused(broken, name):
    for target in (broken / "nowhere", broken / name, broken):
        (broken / name).unlink()
        (broken / name).symlink_to(target)
        with pytest.raises(ModelError):
            load(broken)


def test_links_to_files_elsewhere_are_followed(broken, tmp_path):
    """So the Hub's cache is made."""
    for name in (*FILES, "model.safetensors"):
        (broken / name).rename(tmp_path / f"blob-{name}")
        (broken / name).symlink_to(Path("..") / f"blob-{name}")
    load(broken)


@pytest.mark.parametrize(
    "change, says",
    [
        ({"num_hidden_layers": 10**9}, "num_hidden_layers = 1000000000, but there are only"),
        ({"num_hidden_layers": 10**400}, "they do not belong together"),
        ({"text_config": {"num_hidden_layers": 10**9}}, "they do not belong together"),
        ({"hidden_size": 10**12}, "do not fit"),
        ({"vocab_size": -1}, "do not fit"),
        ({"num_attention_heads": 0}, "do not fit"),
        ({"quantization": {"bits": 4}}, "do not fit"),
        ({"quantization": {"bits": 4, "group_size": 0}}, "group_size of a quantization cannot be"),
        ({"quantization": {"bits": 0, "group_size": 64}}, "bits of a quantization cannot be '0'"),
        ({"quantization": {"a": {"group_size": 2**40}}}, "group_size of a quantization cannot be"),
        ({"quantization": "4"}, "quantization must be an object"),
        ({"model_type": "../../evil"}, "does not know"),
        ({"model_type": "base"}, "do not fit"),
        ({"eos_token_id": "evil"}, "eos_token_id"),
        ({"eos_token_id": [-5]}, "eos_token_id"),
    ],
)
def test_impossible_configs_are_named(broken, change, says):
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json_text({**config, **change}))
    with pytest.raises(ModelError, match=says):
        load(broken)


@pytest.mark.parametrize("width", [0, 1, 7, 32, 10**6, -64])
@pytest.mark.parametrize("key", ["hidden_size", "intermediate_size", "head_dim", "vocab_size"])
def test_widths_that_are_not_the_weights_are_named(quantized_path, tmp_path, key, width):
    """Of a width narrower than its groups, MLX would end the process."""
    directory = shutil.copytree(quantized_path, tmp_path / "model")
    edit(directory / "config.json", **{key: width})
    if (key, width) != ("head_dim", 32):
        with pytest.raises(ModelError):
            load(directory)


@pytest.mark.parametrize("dtype", [mx.int32, mx.bool_, mx.complex64])
def test_weights_of_a_type_that_cannot_be_computed_with_are_named(broken, dtype):
    weights = {k: v.astype(dtype) for k, v in mx.load(str(broken / "model.safetensors")).items()}
    mx.save_safetensors(str(broken / "model.safetensors"), weights)
    with pytest.raises(ModelError, match="holds numbers of type"):
        load(broken)


def test_a_directory_whose_name_is_a_pattern_is_named(dense_path, tmp_path):
    with pytest.raises(ModelError, match="in its path"):
        load(shutil.copytree(dense_path, tmp_path / "model[1]"))


def test_a_token_that_the_tokenizer_cannot_spell_is_named(broken):
    """The spelling is taken from the very token that the model answers with."""
    base = load(broken)
    (answer,) = stream(base.model, base.tokenizer, base.tokenizer.encode("hi"), 1)
    tokenizer = json.loads((broken / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    tokenizer["model"]["vocab"] = {k: v for k, v in vocabulary.items() if v != answer.token}
    (broken / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ModelError, match="cannot spell"), Engine(load(broken)) as engine:
        list(Conversation(engine, max_tokens=1, raw=True).say("hi"))


# --- code -------------------------------------------------------------------------------------


def evil(directory: Path) -> Path:
    """Give the model every kind of code that loaders of models have run; return the marker
    that it would write.
    """
    marker = directory.parent / "evil-was-here"
    code = f"__import__('pathlib').Path({str(marker)!r}).touch()\n"
    for name in ("evil.py", "modeling_evil.py", "tokenization_evil.py", "configuration_evil.py"):
        (directory / name).write_text(code)
    (directory / "__init__.py").write_text(code)
    (directory / "custom_generate").mkdir()
    (directory / "custom_generate" / "generate.py").write_text(code)
    pickled = f"cbuiltins\nexec\n(S{code.strip()!r}\ntR.".encode()
    for name in ("pytorch_model.bin", "model.pt", "model.pkl", "training_args.bin", "vocab.pkl"):
        (directory / name).write_bytes(pickled)
    return marker


def edit(file: Path, **changes: object) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def test_code_beside_a_model_does_not_run(broken):
    marker = evil(broken)
    load(broken)
    assert not marker.exists()


@pytest.mark.parametrize(
    "name, changes",
    [
        ("config.json", {"model_file": "evil.py"}),
        ("config.json", {"model_file": "../evil.py"}),
        (
            "config.json",
            {
                "auto_map": {
                    "AutoConfig": "configuration_evil.EvilConfig",
                    "AutoModelForCausalLM": "modeling_evil.Evil",
                    "AutoTokenizer": ["tokenization_evil.Evil", None],
                }
            },
        ),
        ("config.json", {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Evil"}}),
        ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}}),
        (
            "tokenizer_config.json",
            {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", None]}},
        ),
        ("tokenizer_config.json", {"tokenizer_class": "evil.Evil"}),
        ("tokenizer_config.json", {"chat_template_type": "..evil"}),
        ("tokenizer_config.json", {"tool_parser_type": "evil"}),
        ("tokenizer_config.json", {"tokenizer_file": "../evil.py", "vocab_file": "vocab.pkl"}),
    ],
)
def test_code_that_a_model_asks_for_does_not_run(broken, name, changes, monkeypatch):
    monkeypatch.chdir(broken)  # a loader that imports by name would find it here
    marker = evil(broken)
    edit(broken / name, **changes)
    with value_or_error("model: asks for code", ModelError):
        load(broken)
    assert not marker.exists()


def test_code_runs_when_it_is_trusted(broken):
    """The marker is one that running the code would leave."""
    marker = evil(broken)
    edit(broken / "config.json", model_file="evil.py")
    with pytest.raises(ModelError):
        load(broken, trust_remote_code=True)
    assert marker.exists()


TEMPLATES = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ cycler.__init__.__globals__.os.system('touch evil-was-here') }}",
    "{{ messages.__class__.__base__ }}{{ ''['__class__'] }}{{ (1).real.__class__ }}",
    "{{ lipsum.__globals__['os'].popen('touch evil-was-here').read() }}",
    "{% for i in range(10**9) %}x{% endfor %}",
    "{{ raise_exception('no') }}",
    "{{ 'a' * 10**18 }}",
    "{% include '/etc/hosts' %}",
    "{% import 'os' as os %}{{ os }}",
    "{{ strftime_now('%d' * 10) }}{{ messages.append(1) }}",
    "{{ 'x'.format(messages) }}{{ '{0.__class__.__mro__}'.format('') }}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{% if %}",
    "{{ 1 / 0 }}",
    "{" * 5000,
]


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_template_reaches_nothing_outside_its_sandbox(broken, tmp_path, template, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (broken / "chat_template.jinja").write_text(template)
    with value_or_error("model: template"):
        base = load(broken)
        renderer = Renderer(base.tokenizer, DataConfig())
        turns = ({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"})
        text = renderer.template(turns)
        assert "subclasses" not in text and "class '" not in text and "localhost" not in text
    with value_or_error("model: template in chat"), Engine(base) as engine:
        list(Conversation(engine, max_tokens=1).say("hi"))
    assert not (tmp_path / "evil-was-here").exists()


def test_a_template_that_cannot_be_rendered_says_so(broken):
    (broken / "chat_template.jinja").write_text("{% for i in range(10**9) %}x{% endfor %}")
    renderer = Renderer(load(broken).tokenizer, DataConfig())
    with pytest.raises(DataError, match="Range too big"):
        renderer.template([{"role": "user", "content": "a"}])
