"""Texts in llama.cpp's tokens beside the Hugging Face tokenizer's, for each kind of tokenizer.

The tokenizers are trained here, with the cuts and normalizers of published ones.
"""

import json
import re
import unicodedata
from functools import partial
from pathlib import Path

import pytest
from conftest import CHATML, DENSE, write_model
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from mlxlora.base import open_tokenizer
from mlxlora.errors import ExportError
from mlxlora.export.gguf import model as gguf
from mlxlora.export.gguf import pre as gguf_pre

llama_cpp = pytest.importorskip("llama_cpp")
import llama  # noqa: E402

write = partial(gguf.write, proof=None)  # of other things than tokens
pytestmark = [pytest.mark.llama, pytest.mark.filterwarnings("ignore")]

TRAINED_ON = [
    "The quick brown fox jumps over the lazy dog, isn't it? I've said: don't; they'll WE'RE.",
    "def main(argv):\n    for i in range(10):\n\t\tprint(f'{i:>3}', end='\\r\\n')\n    return 0\n",
    "Привет, мир! Это проверка. 你好，世界。東京タワー 한국어 문장 مرحبا بالعالم नमस्ते ไทย",
    "3 33 333 3333 33333 1,234.56 2024-01-02 0x1F €5 ½ ² café naïve Ünïcödé",
    "    indented\n\n\n\tTabs\t\tand   many     spaces\n  \n",
    "😀 👩‍👩‍👧‍👦 🏳️‍🌈 ✅ ------==== ... !!! <a href='#'>x</a>",
] * 3
TEXTS = [
    "",
    "a",
    " ",
    "  ",
    "   leading and trailing   ",
    "Hello world! It's they'LL I'VE don't, WE'RE you'd 'Sir' 's",
    "def f(x):\n    return {'a': [1, 2], \"b\": x ** 2}  # why\n\n\tif x:\n\t\tpass\n",
    "line\r\nline\r\n\r\nline\rline\n\n\n  \n x",
    "\n",
    "\n\n",
    "\t",
    " \n ",
    "a\tb\t\tc",
    "a  b   c    d",
    "1 12 123 1234 12345 3.14159 1,000,000 2024-12-31T23:59:59Z ٣٤٥ ²³ ½ Ⅷ",
    "😀 👩‍👩‍👧‍👦 🏳️‍🌈 👍🏽 ☃️ ✅🚀",
    "你好，世界。東京タワーは高い。 한국어 문장입니다",
    "مرحبا بالعالم، كيف حالك؟ שלום עולם नमस्ते दुनिया ภาษาไทย",
    "e\u0301 n\u0303o A\u030a \u0915\u094d\u0937 a\u0300\u0301b",
    "café naïve Ünïcödé ŁÓDŹ ǅ ﬁ",
    "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n",
    "x<|im_end|>y <|im_end|> z<|im_end|>",
    "\u00a0\u2003\u200b\u202e\u0000\x07x\x7f\u3000y",
    "▁ under ▁▁ Ġ Ċ <0x0A> [PAD3] <unk>",
    "https://example.com/a?b=c&d=%20#e user@host.org C:\\dir\\file.txt $HOME/~x",
    "CamelCaseWords HTTPServer iPhone XMLHttpRequest ABCdef aBC",
    "=== --- *** ``` ### ((( ))) ]]] {{{ }}} <<< >>> ||| \\\\\\ ///",
]
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
DIGITS = pre_tokenizers.Digits(individual_digits=True)
WORDS = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)


def split(pattern: str):
    return pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(pattern), "isolated", invert=False), BYTES]
    )


# kind -> (cuts, whether whole words come before merges, normalizer, the name in llama.cpp)
BYTE_LEVEL = {
    "GPT-2": (WORDS, False, None, "gpt-2"),
    "GPT-NeoX": (WORDS, False, normalizers.NFC(), "gpt-2"),
    "SmolLM, StarCoder": (pre_tokenizers.Sequence([DIGITS, WORDS]), False, None, "smollm"),
    "Llama 3": (split(gguf_pre.LLAMA3), True, None, "llama-bpe"),
    "SmolLM3, GLM-4": (split(gguf_pre.LLAMA3), False, None, "smaug-bpe"),
    "GPT-4": (split(gguf_pre.CL100K), False, None, "smaug-bpe"),
    "Qwen2": (split(gguf_pre.QWEN2), False, normalizers.NFC(), "qwen2"),
    "StableLM 2": (split(gguf_pre.QWEN2), True, None, "qwen2"),
    "Qwen3.5": (split(gguf_pre.QWEN35), False, normalizers.NFC(), "qwen35"),
    "GPT-4o": (split(gguf_pre.GPT4O), False, None, "gpt-4o"),
    "Tekken": (split(gguf_pre.TEKKEN), True, None, "tekken"),
    "Seed": (split(gguf_pre.SEED), False, None, "seed-coder"),
}


def byte_level(cuts, ignore_merges: bool, normalizer, bos: str | None = None) -> Tokenizer:
    made = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    made.pre_tokenizer, made.decoder = cuts, decoders.ByteLevel()
    if normalizer is not None:
        made.normalizer = normalizer
    trainer = trainers.BpeTrainer(
        vocab_size=700, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    made.train_from_iterator(TRAINED_ON, trainer)
    made.add_special_tokens([AddedToken(text, special=True) for text in SPECIAL])
    made.add_tokens([AddedToken("<think>", special=False, normalized=False)])
    if bos is not None:
        number = made.token_to_id(bos)
        made.post_processor = processors.TemplateProcessing(
            f"{bos} $A", special_tokens=[(bos, number)]
        )
    return made


def base_with(directory: Path, tokenizer: Tokenizer | None, rows: int, **config) -> Path:
    """A tiny model of so many rows with this tokenizer."""
    write_model(directory, {**DENSE, "vocab_size": rows, "eos_token_id": None})
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "bos_token": "<|endoftext|>",
        "clean_up_tokenization_spaces": False,
        **config,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    if tokenizer is not None:
        tokenizer.save(str(directory / "tokenizer.json"))
    return directory


def exported(path: Path, out: Path):
    """(the file's notes, the Hugging Face tokenizer)."""
    done = write(path, None, out, "f32")
    return done.notes, open_tokenizer(
        path, json.loads((path / "config.json").read_text())
    )._tokenizer


def same_tokens(out: Path, theirs, texts, *, change=lambda text: text) -> None:
    """With and without what is put around a text, special tokens in it parsed."""
    with llama.loaded(out) as model:
        for text in texts:
            data = change(text).encode()
            bare = model.tokenize(data, add_bos=False, special=True)
            assert bare == theirs.encode(text, add_special_tokens=False), repr(text)
            whole = model.tokenize(data, add_bos=True, special=True)
            assert whole == theirs.encode(text), repr(text)


@pytest.mark.parametrize("kind", BYTE_LEVEL)
def test_byte_level_tokenizers(kind, tmp_path):
    cuts, ignore_merges, normalizer, name = BYTE_LEVEL[kind]
    bos = "<|endoftext|>" if kind in ("Llama 3", "Tekken") else None
    made = byte_level(cuts, ignore_merges, normalizer, bos)
    path = base_with(tmp_path / "base", made, made.get_vocab_size() + 5)
    notes, theirs = exported(path, tmp_path / "x.gguf")
    assert field(tmp_path / "x.gguf", "tokenizer.ggml.pre") == name
    composed = (lambda t: unicodedata.normalize("NFC", t)) if normalizer else (lambda t: t)
    assert any("NFC" in note for note in notes) == bool(normalizer)
    limited = any("combining marks" in note for note in notes)
    assert limited == (name in ("gpt-4o", "tekken"))
    texts = [t for t in TEXTS if not (limited and re.search("[\u0900-\u0e7f]", t))]
    same_tokens(tmp_path / "x.gguf", theirs, [*texts, "a<think>b</think>"], change=composed)


def field(path: Path, name: str):
    from gguf import GGUFReader

    return GGUFReader(str(path)).get_field(name).contents()


@pytest.fixture(scope="module")
def sentence_piece(tmp_path_factory) -> Path:
    """A tokenizer.model as of Llama 2: BPE with bytes to fall back on."""
    trainer = pytest.importorskip("sentencepiece").SentencePieceTrainer
    directory = tmp_path_factory.mktemp("pieces")
    (directory / "text").write_text("\n".join(t.replace("\n", " ") for t in TRAINED_ON))
    trainer.train(
        input=str(directory / "text"),
        model_prefix=str(directory / "tokenizer"),
        model_type="bpe",
        vocab_size=600,
        byte_fallback=True,
        character_coverage=0.99,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        minloglevel=2,
    )
    return directory / "tokenizer.model"


def replaced(tokenizer: Tokenizer, **parts) -> Tokenizer:
    """The tokenizer with other parts of its tokenizer.json."""
    return Tokenizer.from_str(json.dumps({**json.loads(tokenizer.to_str()), **parts}))


SPACED = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
PREPENDED = {
    "type": "Sequence",
    "normalizers": [{"type": "Prepend", "prepend": "▁"}, SPACED],
}
BOS = {
    "type": "TemplateProcessing",
    "single": [
        {"SpecialToken": {"id": "<s>", "type_id": 0}},
        {"Sequence": {"id": "A", "type_id": 0}},
    ],
    "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
    "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
}
# kind -> (class, its settings, parts of its tokenizer.json as published)
PIECES = {
    "Llama 2 (tokenizer.model)": ("LlamaTokenizer", {"legacy": True}, None),
    "Llama 2": (
        "PreTrainedTokenizerFast",
        {},
        {"normalizer": PREPENDED, "pre_tokenizer": None, "post_processor": BOS},
    ),
    "Gemma": ("GemmaTokenizer", {}, None),
    "Phi-3": (
        "PreTrainedTokenizerFast",
        {},
        {"normalizer": PREPENDED, "pre_tokenizer": None, "post_processor": BOS},
    ),
}
NAMES = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


@pytest.mark.parametrize("kind", PIECES)
def test_sentence_piece_tokenizers(kind, sentence_piece, tmp_path):
    named, settings, parts = PIECES[kind]
    path = base_with(tmp_path / "base", None, 640, tokenizer_class=named, **NAMES, **settings)
    (path / "tokenizer.json").unlink()
    (path / "tokenizer.model").write_bytes(sentence_piece.read_bytes())
    if parts is not None:
        (path / "tokenizer_config.json").write_text(
            json.dumps({"tokenizer_class": "LlamaTokenizer", **NAMES})
        )
        made = open_tokenizer(path, {})._tokenizer.backend_tokenizer
        made = replaced(made, **parts)
        made.add_special_tokens([AddedToken("<|im_start|>"), AddedToken("<|im_end|>")])
        made.add_tokens([AddedToken("<think>", normalized=False)])
        (path / "tokenizer.model").unlink()
        made.save(str(path / "tokenizer.json"))
        config = {"tokenizer_class": named, **NAMES}
        (path / "tokenizer_config.json").write_text(json.dumps(config))
    notes, theirs = exported(path, tmp_path / "x.gguf")
    assert field(tmp_path / "x.gguf", "tokenizer.ggml.model") == "llama"
    once = any("puts another" in note for note in notes)
    assert once == ("tokenizer.model" in kind)
    texts = [text for text in TEXTS if not (once and text.startswith((" ", "▁")))]
    same_tokens(tmp_path / "x.gguf", theirs, [*texts, "a<s>b</s>c"])


@pytest.mark.parametrize("template", [CHATML, None])
def test_a_space_before_the_first_word_alone(template, sentence_piece, tmp_path):
    """llama.cpp puts it everywhere or nowhere: right for chats, or for texts without a template."""
    path = base_with(
        tmp_path / "base", None, 640, tokenizer_class="LlamaTokenizer", legacy=False, **NAMES
    )
    (path / "tokenizer.json").unlink()
    (path / "tokenizer.model").write_bytes(sentence_piece.read_bytes())
    if template is None:
        (path / "chat_template.jinja").unlink()
    notes, theirs = exported(path, tmp_path / "x.gguf")
    assert any("first word" in note for note in notes)
    texts = [text for text in TEXTS if not text.startswith((" ", "▁"))]
    if template is not None:
        texts = [f"<s>{text}</s>{text}" for text in texts]
    same_tokens(tmp_path / "x.gguf", theirs, texts)


def test_tokens_types_and_special_tokens_are_those_of_the_tokenizer(tmp_path):
    made = byte_level(WORDS, False, None)
    size = made.get_vocab_size()
    path = base_with(tmp_path / "base", made, size + 3)
    exported(path, tmp_path / "x.gguf")
    tokens, types = (
        field(tmp_path / "x.gguf", f"tokenizer.ggml.{name}") for name in ("tokens", "token_type")
    )
    assert tokens[size:] == [f"[PAD{size + n}]" for n in range(3)]
    assert types[size:] == [5, 5, 5]
    assert [types[made.token_to_id(text)] for text in (*SPECIAL, "<think>")] == [3, 3, 3, 4]
    assert set(types[: made.token_to_id(SPECIAL[0])]) == {1}
    with llama.loaded(tmp_path / "x.gguf") as model:
        assert model.token_eos() == made.token_to_id("<|im_end|>")
        assert model.token_bos() == made.token_to_id("<|endoftext|>")
        assert model.metadata["tokenizer.chat_template"] == CHATML
        assert model.detokenize([made.token_to_id("<think>")], special=True) == b"<think>"


def test_tokens_without_an_embedding_are_left_out_and_named(tmp_path):
    made = byte_level(WORDS, False, None)
    path = base_with(tmp_path / "base", made, made.get_vocab_size() - 1)
    notes, _ = exported(path, tmp_path / "x.gguf")
    assert any("'<think>'" in note for note in notes)


@pytest.mark.parametrize(
    "parts, says",
    [
        ({"pre_tokenizer": {"type": "Whitespace"}}, "no cuts|bytes to fall back"),
        (
            {
                "pre_tokenizer": {
                    "type": "Sequence",
                    "pretokenizers": [
                        {"type": "Punctuation", "behavior": "Isolated"},
                        {
                            "type": "ByteLevel",
                            "add_prefix_space": False,
                            "use_regex": True,
                            "trim_offsets": True,
                        },
                    ],
                }
            },
            "no pre-tokenizer of llama.cpp is known .*Punctuation",
        ),
        (
            {
                "pre_tokenizer": {
                    "type": "ByteLevel",
                    "add_prefix_space": True,
                    "use_regex": True,
                    "trim_offsets": True,
                }
            },
            "add_prefix_space=True",
        ),
        ({"normalizer": {"type": "Lowercase"}}, "normalizes text .Lowercase"),
    ],
)
def test_a_tokenizer_that_llama_cpp_cannot_be_is_refused(parts, says, tmp_path):
    made = replaced(byte_level(WORDS, False, None), **parts)
    path = base_with(tmp_path / "base", made, made.get_vocab_size())
    with pytest.raises(ExportError, match=says):
        write(path, None, tmp_path / "x.gguf")
    assert not (tmp_path / "x.gguf").exists()


def test_merges_that_are_no_scores_are_refused(tmp_path):
    """Trained by the tokenizers library, where only one pair of a token's is a merge."""
    made = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    made.normalizer = normalizers.Replace(" ", "▁")
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<unk>"], show_progress=False)
    made.train_from_iterator(TRAINED_ON, trainer)
    made.add_special_tokens([AddedToken(text) for text in SPECIAL])
    path = base_with(tmp_path / "base", made, made.get_vocab_size())
    with pytest.raises(ExportError, match="merges are not those of a SentencePiece model"):
        write(path, None, tmp_path / "x.gguf")


def test_another_algorithm_is_refused(tmp_path):
    made = Tokenizer(models.WordLevel({"a": 0, "<|im_end|>": 1}, unk_token="a"))
    path = base_with(tmp_path / "base", made, 300)
    with pytest.raises(ExportError, match="algorithm is WordLevel"):
        write(path, None, tmp_path / "x.gguf")


def test_whole_words_that_no_merge_reaches_need_a_pre_tokenizer_that_takes_them(tmp_path):
    made = byte_level(split(gguf_pre.QWEN2), True, None)
    whole = json.loads(made.to_str())
    whole["model"]["vocab"]["zqzqzq"] = len(whole["model"]["vocab"]) + 50
    path = base_with(tmp_path / "base", Tokenizer.from_str(json.dumps(whole)), 800)
    with pytest.raises(ExportError, match=r"takes whole words .* unlike llama\.cpp's qwen2"):
        write(path, None, tmp_path / "x.gguf")


@pytest.mark.parametrize(
    "name, known",
    [
        ("GPT2Tokenizer", "gpt-2"),
        ("GPTNeoXTokenizer", "gpt-2"),
        ("Qwen2Tokenizer", "qwen2"),
        ("Qwen3_5Tokenizer", "qwen35"),
        ("CohereTokenizer", "smollm"),
    ],
)
def test_the_cuts_that_transformers_makes_itself_are_known(name, known):
    """By classes that do not read them from tokenizer.json."""
    kind = getattr(pytest.importorskip("transformers"), name, None)
    if kind is None:
        pytest.skip("this transformers has no such class")
    alphabet = {one: n for n, one in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    whole = json.loads(kind(vocab=alphabet, merges=[]).backend_tokenizer.to_str())
    assert [pre.name for pre in gguf_pre.recognize(whole["pre_tokenizer"])] == [known]
