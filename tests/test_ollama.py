"""The directory for `ollama create`: its files, what the Modelfile says, what is refused."""

import json
import shlex
import shutil
from functools import partial

import mlx.core as mx
import numpy as np
import pytest
from chat_templates import CHATML_DEFAULT, FAMILIES, QWEN_DEFAULT, tokenizer_of
from conftest import DENSE, randomized, worst, write_model, write_tokenizer
from gguf import GGUFReader
from test_modelfile import parsed
from typer.testing import CliRunner

from mlxlora.base import load
from mlxlora.cli import app
from mlxlora.config import LoraConfig
from mlxlora.errors import ConfigError, ExportError
from mlxlora.export.gguf import model as gguf
from mlxlora.export.ollama import directory as writer
from mlxlora.export.ollama.compared import rendered
from mlxlora.export.ollama.directory import model_name, template_of
from mlxlora.lora.adapter import Adapter
from mlxlora.lora.attach import attach
from mlxlora.lora.fresh import collect, new_layers

write = partial(writer.write, proof=None)  # random adapters gain nothing


@pytest.fixture(scope="module")
def model(dense_path, tmp_path_factory):
    """A base whose template has a system message by default, and that says how to sample."""
    path = shutil.copytree(dense_path, tmp_path_factory.mktemp("ollama") / "base")
    write_tokenizer(path, CHATML_DEFAULT)
    (path / "generation_config.json").write_text(json.dumps({"temperature": 0.6, "top_k": 20}))
    return path


@pytest.fixture(scope="module")
def adapter(model, tmp_path_factory):
    base, config = load(model), LoraConfig(rank=4)
    new_layers(base.model, config, 0)
    randomized(base.model)
    out = tmp_path_factory.mktemp("adapters") / "adapter"
    collect(base.model, config, {"base": base.identity.to_dict()}).save(out)
    return out


def modelfile(directory) -> list[tuple[str, str]]:
    return parsed((directory / "Modelfile").read_text("utf-8"))


def weights(file) -> dict[str, np.ndarray]:
    return {tensor.name: np.array(tensor.data) for tensor in GGUFReader(str(file)).tensors}


def test_the_directory_has_the_merged_model_and_a_modelfile(model, adapter, tmp_path):
    done = write(model, Adapter.load(adapter), tmp_path / "My tune", "f16")
    assert sorted(f.name for f in (tmp_path / "My tune").iterdir()) == ["Modelfile", "model.gguf"]
    said = modelfile(tmp_path / "My tune")
    template = dict(said)["template"]
    assert said == [
        ("from", "./model.gguf"),
        ("template", template),
        ("system", QWEN_DEFAULT),
        ("stop", "<|im_end|>"),
        ("temperature", "0.6"),
        ("top_k", "20"),
        ("num_ctx", "512"),
    ]
    asked = [{"role": "user", "content": "Hi."}]
    expected = load(model).tokenizer.apply_chat_template(
        asked, tokenize=False, add_generation_prompt=True
    )
    assert rendered(template, asked, QWEN_DEFAULT) == rendered(template, asked) == expected
    assert (done.equal, done.tried, done.different) == (37, 37, [])
    assert done.create == [
        "ollama", "create", "my-tune", "-f", str(tmp_path / "My tune" / "Modelfile")
    ]  # fmt: skip
    gguf.write(model, Adapter.load(adapter), tmp_path / "same.gguf", "f16", proof=None)
    ours, theirs = weights(tmp_path / "My tune" / "model.gguf"), weights(tmp_path / "same.gguf")
    assert ours.keys() == theirs.keys()
    assert all(np.array_equal(ours[name], theirs[name]) for name in ours)


def test_an_adapter_can_be_a_file_of_its_own(model, adapter, tmp_path):
    write(model, Adapter.load(adapter), tmp_path / "out", "f16", keep_adapter=True)
    assert modelfile(tmp_path / "out")[:2] == [
        ("from", "./model.gguf"),
        ("adapter", "./adapter.gguf"),
    ]
    gguf.write(model, None, tmp_path / "base.gguf", "f16", proof=None)
    ours, bare = weights(tmp_path / "out" / "model.gguf"), weights(tmp_path / "base.gguf")
    assert all(np.array_equal(ours[name], bare[name]) for name in bare)
    assert any(name.endswith(".lora_a") for name in weights(tmp_path / "out" / "adapter.gguf"))


@pytest.mark.parametrize("apart", [False, True])
def test_what_was_written_computes_what_base_and_adapter_do(model, adapter, apart, tmp_path):
    base, own = load(model), Adapter.load(adapter)
    attach(base, own)
    write(model, own, tmp_path / "out", "f32", keep_adapter=apart)
    again = writer.written(tmp_path / "out", model, own if apart else None)
    tokens = mx.array([[1, 2, 3, 4, 5, 6]])
    assert worst(again(tokens), base.model(tokens)) < 1e-4


def test_an_adapter_that_is_not_given_is_not_kept_apart(model, tmp_path):
    with pytest.raises(ExportError, match="pass --adapter"):
        write(model, None, tmp_path / "out", keep_adapter=True)


def test_a_chat_template_that_cannot_be_said_leaves_nothing(model, tmp_path):
    source = shutil.copytree(model, tmp_path / "shouting")
    write_tokenizer(source, "{% for m in messages %}{{ m.content | upper }}{% endfor %}")
    with pytest.raises(ExportError, match=r"even one question.*export --format gguf instead"):
        write(source, None, tmp_path / "out")
    write_tokenizer(source, "{% for m in messages %}{{ m.content * 2 }}{% endfor %}")
    with pytest.raises(ExportError, match=r"every message once.*export --format gguf instead"):
        write(source, None, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_without_a_chat_template_the_prompt_is_bare(model, tmp_path):
    source = shutil.copytree(model, tmp_path / "plain")
    (source / "chat_template.jinja").unlink()
    done = write(source, None, tmp_path / "out")
    assert dict(modelfile(tmp_path / "out"))["template"] == "{{ .Prompt }}"
    assert "no chat template" in done.notes[0]


def test_a_default_that_a_modelfile_cannot_hold_is_in_the_template_alone(model, tmp_path):
    source = shutil.copytree(model, tmp_path / "odd")
    write_tokenizer(source, CHATML_DEFAULT.replace(QWEN_DEFAULT, 'Say\u00a0"""yes"""\nor no.'))
    done = write(source, None, tmp_path / "out")
    said = dict(modelfile(tmp_path / "out"))
    assert "system" not in said and (done.equal, done.different) == (37, [])
    text = rendered(said["template"], [{"role": "user", "content": "Hi."}])
    assert text.startswith('<|im_start|>system\nSay\u00a0"""yes"""\nor no.<|im_end|>\n')


def test_conversations_that_differ_are_said_in_one_note(tmp_path):
    found = template_of(tokenizer_of(tmp_path, FAMILIES["llama 3, dated"]))
    assert "not as the chat template renders it: a system message later on." in found.notes[-1]


@pytest.mark.parametrize(
    ("name", "expected"),
    [("Ünï x", "n-x"), ("q_w-1.5", "q_w-1.5"), (".hidden", "hidden"), ("日本", "tuned")],
)
def test_the_name_is_one_that_ollama_takes(name, expected, tmp_path):
    assert model_name(tmp_path / name) == expected


def test_the_last_line_is_the_command_to_go_on_with(model, adapter, tmp_path):
    out = tmp_path / ("a long way, " * 12) / "it's mine"
    words = ["export", "--model", model, "--adapter", adapter, "--format", "ollama"]
    words = [str(word) for word in [*words, "--no-fidelity", "--out", out]]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    last = done.output.splitlines()[-1]
    assert last.startswith("ollama create it-s-mine -f ")
    assert shlex.split(last)[-1] == str(out / "Modelfile")
    assert "renders 37 of 37 conversations as" in done.output


def test_keep_adapter_is_for_ollama_alone(model, adapter, tmp_path):
    words = [
        "export",
        "--model",
        model,
        "--adapter",
        adapter,
        "--format",
        "peft",
        "--out",
        tmp_path,
    ]
    done = CliRunner().invoke(app, [*map(str, words), "--keep-adapter"])
    assert isinstance(done.exception, ConfigError)
    assert "--keep-adapter is for --format ollama" in str(done.exception)


@pytest.mark.llama
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["chatml", "llama 2", "llama 3", "gemma", "zephyr"])
def test_llama_cpp_sees_the_tokens_that_were_trained(name, tmp_path):
    """What Ollama hands to llama.cpp, beside what training makes of the same conversation."""
    pytest.importorskip("llama_cpp")
    import llama

    family = FAMILIES[name]
    source = write_model(tmp_path / "model", {**DENSE, "vocab_size": 270})
    tokenizer = tokenizer_of(source, family)
    write(source, None, tmp_path / "out", "f16")
    said = dict(modelfile(tmp_path / "out"))
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi there!"},
        {"role": "assistant", "content": "Hello."},
        {"role": "user", "content": "Bye."},
    ]
    render = tokenizer.apply_chat_template
    text = render(messages, tokenize=False, add_generation_prompt=True)
    trained = tokenizer._tokenizer.encode(text, add_special_tokens=False)
    prompt = rendered(said["template"], messages, said.get("system", "")).encode()
    with llama.loaded(tmp_path / "out" / "model.gguf") as model:
        seen = model.tokenize(prompt, add_bos=True, special=True)  # a BOS if the GGUF wants one
    if name == "zephyr":  # which is said in a note: its tokenizer adds one, its template does not
        assert seen[0] == tokenizer._tokenizer.bos_token_id
        seen = seen[1:]
    assert seen == trained
