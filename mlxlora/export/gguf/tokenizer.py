"""A tokenizer as a GGUF holds it: tokens, their types, merges or scores, what is put around text.

Read from what the Hugging Face tokenizer runs on (its tokenizer.json, or what it makes of older
files), and from what it does with a letter. llama.cpp has two algorithms that matter here: merges
over bytes ("gpt2") and, after SentencePiece, the pair whose union has the best score ("llama").
What neither can do is refused by name. No text is normalized by llama.cpp.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from gguf import GGUFWriter, TokenType
from tokenizers import Tokenizer

from mlxlora.base import turn_end
from mlxlora.errors import ExportError
from mlxlora.export.gguf.pre import Pre, recognize

SPACE = "▁"  # of SentencePiece
_INERT = "ĀĀ ĀĀ"  # a merge of symbols that no byte becomes: GGUF has no empty lists


@dataclass
class Vocabulary:
    """What is written under tokenizer.*; tokens and types have one entry for each embedding row."""

    model: str  # "gpt2" or "llama"
    pre: str
    tokens: list[str]
    types: list[TokenType]
    merges: list[str] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    ids: dict[str, int] = field(default_factory=dict)  # bos, eos, eot, unk, pad
    add_bos: bool = False
    add_eos: bool = False
    space_prefix: bool = False
    template: str | None = None
    notes: list[str] = field(default_factory=list)

    def add_to(self, writer: GGUFWriter) -> None:
        writer.add_tokenizer_model(self.model)
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.types)
        if self.model == "gpt2":
            writer.add_token_merges(self.merges or [_INERT])
        else:
            writer.add_token_scores(self.scores)
        for name, number in self.ids.items():
            getattr(writer, f"add_{name}_token_id")(number)
        writer.add_add_bos_token(self.add_bos)
        writer.add_add_eos_token(self.add_eos)
        writer.add_add_space_prefix(self.space_prefix)
        if self.template is not None:
            writer.add_chat_template(self.template)


def vocabulary(tokenizer: Any, rows: int) -> Vocabulary:
    """Of mlx-lm's wrapper around a Hugging Face tokenizer, for a model of so many embedding rows.

    Raises ExportError for a tokenizer that llama.cpp cannot be.
    """
    theirs = tokenizer._tokenizer
    backend = getattr(theirs, "backend_tokenizer", None)
    if backend is None:
        raise ExportError(
            f"a tokenizer of class {type(theirs).__name__} runs its own Python and has no "
            "tokenizer.json, which GGUF is made from; export with --format hf instead"
        )
    whole = json.loads(backend.to_str())
    model = whole["model"]
    _check_model(model)
    bytes_of_text = "ByteLevel" in json.dumps(whole.get("pre_tokenizer"))
    found = (_byte_level if bytes_of_text else _sentence_piece)(whole, theirs)
    _fill(found, whole, rows)
    _ends(found, tokenizer, rows)
    return found


def _check_model(model: Mapping[str, Any]) -> None:
    if model.get("type") != "BPE":
        raise ExportError(
            f"the tokenizer's algorithm is {model.get('type')}; only BPE is written to GGUF. "
            "Export with --format hf instead"
        )
    for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(name):
            raise ExportError(f"the tokenizer has {name}, which llama.cpp has not")


def _byte_level(whole: Mapping[str, Any], theirs: Any) -> Vocabulary:
    model = whole["model"]
    pre = _choose(recognize(whole.get("pre_tokenizer")), whole)
    notes = [pre.but] if pre.but else []
    for kind in _kinds(whole.get("normalizer"), "normalizers"):
        if kind["type"] != "NFC":
            raise ExportError(f"the tokenizer normalizes text ({kind['type']}); llama.cpp does not")
        notes.append(
            "the tokenizer composes accented characters (NFC) before it cuts text and llama.cpp "
            "does not: decomposed text gives other tokens there"
        )
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    return Vocabulary("gpt2", pre.name, [], [], merges=merges, notes=notes)


def _choose(candidates: tuple[Pre, ...], whole: Mapping[str, Any]) -> Pre:
    """The one that treats whole words as the tokenizer does, or for which it makes no difference.

    Raises ExportError if there is none.
    """
    ignores = bool(whole["model"].get("ignore_merges"))
    for pre in candidates:
        if pre.ignores_merges == ignores:
            return pre
    if not _merges_reach_every_word(whole["model"]):
        raise ExportError(
            f"the tokenizer {'takes' if ignores else 'does not take'} whole words before it merges"
            f", unlike llama.cpp's {candidates[0].name}; export with --format hf instead"
        )
    return candidates[0]


def _merges_reach_every_word(model: Mapping[str, Any]) -> bool:
    bare = {"version": "1.0", "model": {**model, "ignore_merges": False}}
    words = list(model["vocab"])
    encoded = Tokenizer.from_str(json.dumps(bare)).encode_batch(words)
    return all(one.ids == [model["vocab"][word]] for one, word in zip(encoded, words, strict=True))


def _sentence_piece(whole: Mapping[str, Any], theirs: Any) -> Vocabulary:
    model = whole["model"]
    if not model.get("byte_fallback"):
        raise ExportError(
            "the tokenizer works neither on bytes nor with bytes to fall back on, so llama.cpp "
            "has nothing like it; export with --format hf instead"
        )
    found = Vocabulary("llama", "default", [], [])
    found.space_prefix = _space_prefix(whole, theirs, found.notes)
    ranks = _ranks(model)
    found.scores = [-float(len(ranks))] * (1 + max(model["vocab"].values()))
    for token, rank in ranks.items():
        found.scores[model["vocab"][token]] = -float(rank)
    return found


def _space_prefix(whole: Mapping[str, Any], theirs: Any, notes: list[str]) -> bool:
    """Whether llama.cpp is to put a space before text (it does so after special tokens too)."""
    steps = [
        *_kinds(whole.get("normalizer"), "normalizers"),
        *_kinds(whole.get("pre_tokenizer"), "pretokenizers"),
    ]
    replaced, scheme, kind = False, "never", ""
    for step in steps:
        kind = step["type"]
        if kind == "Prepend" and step.get("prepend") == SPACE:
            scheme = "always"
        elif kind == "Replace" and (step.get("pattern"), step.get("content")) == (
            {"String": " "},
            SPACE,
        ):
            replaced = True
        elif kind == "Metaspace" and step.get("replacement") == SPACE:
            replaced, scheme = True, str(step.get("prepend_scheme", "always"))
            if step.get("split", True) and any(SPACE in t[1:] for t in whole["model"]["vocab"]):
                raise ExportError("the tokenizer cuts at spaces that its own tokens cross")
        elif kind == "Split" and replaced and step.get("pattern") == {"String": " "}:
            continue  # there are none left
        else:
            raise ExportError(
                f"the tokenizer has a step {kind} that llama.cpp has not; export with --format hf "
                "instead"
            )
    if not replaced:
        raise ExportError(f"the tokenizer does not write spaces as {SPACE}, as llama.cpp does")
    if scheme == "first":  # and llama.cpp knows only: everywhere, or nowhere
        chats = bool(getattr(theirs, "chat_template", None))
        notes.append(
            "the tokenizer puts a space before a text's first word, but not after special tokens; "
            + (
                "written is that llama.cpp puts none, as chats begin with special tokens"
                if chats
                else "llama.cpp puts one after those too"
            )
        )
        return not chats
    if scheme == "always" and kind == "Metaspace":
        notes.append(
            "before text that begins with a space llama.cpp puts another, and this tokenizer none"
        )
    return scheme == "always"


def _ranks(model: Mapping[str, Any]) -> dict[str, int]:
    """Token -> the rank of the merges that make it.

    llama.cpp joins any two neighbours whose union is a token, best score first. That is the same
    as merging if every such pair is a merge, and all that make one token stand together.
    """
    vocab = model["vocab"]
    pairs = [tuple(pair.split(" ") if isinstance(pair, str) else pair) for pair in model["merges"]]
    ranks: dict[str, int] = {}
    last = ""
    for rank, (left, right) in enumerate(pairs):
        token = left + right
        if token != last and token in ranks:
            raise ExportError(_NOT_SCORES)
        last = token
        ranks.setdefault(token, rank)
    known = set(pairs)
    for token in ranks:
        for cut in range(1, len(token)):
            pair = token[:cut], token[cut:]
            if pair not in known and pair[0] in vocab and pair[1] in vocab:
                raise ExportError(_NOT_SCORES)
    return ranks


_NOT_SCORES = (
    "the tokenizer's merges are not those of a SentencePiece model, so llama.cpp, which joins by "
    "score, would give other tokens; export with --format hf instead"
)


def _fill(found: Vocabulary, whole: Mapping[str, Any], rows: int) -> None:
    """Tokens and types by number, as many as there are rows."""
    model = whole["model"]
    byte_tokens = {f"<0x{byte:02X}>" for byte in range(256)} if found.model == "llama" else set()
    texts: dict[int, str] = {number: token for token, number in model["vocab"].items()}
    types = {n: TokenType.BYTE if t in byte_tokens else TokenType.NORMAL for n, t in texts.items()}
    for added in whole.get("added_tokens", ()):
        texts[added["id"]] = added["content"]
        types[added["id"]] = TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED
    if found.model == "llama" and model.get("unk_token") in model["vocab"]:
        types[model["vocab"][model["unk_token"]]] = TokenType.UNKNOWN
    beyond = sorted(number for number in texts if number >= rows)
    if beyond:
        found.notes.append(
            f"{len(beyond)} tokens have no embedding and are left out, from {texts[beyond[0]]!r} on"
        )
    taken = set(texts.values())
    for number in range(rows):
        text = texts.get(number)
        if text is None:
            text = f"[PAD{number}]"
            while text in taken:
                text = f"[{text}]"
        found.tokens.append(text)
        found.types.append(types.get(number, TokenType.UNUSED))
    if found.scores:
        lowest = min(found.scores)
        found.scores = (found.scores + [lowest] * rows)[:rows]


def _ends(found: Vocabulary, tokenizer: Any, rows: int) -> None:
    """Special tokens by role, and what is put around a text."""
    theirs = tokenizer._tokenizer
    alone = theirs.encode("a", add_special_tokens=False)
    around = theirs.encode("a", add_special_tokens=True)
    start = next(i for i in range(len(around)) if around[i : i + len(alone)] == alone)
    before, after = around[:start], around[start + len(alone) :]
    roles = {role: getattr(theirs, f"{role}_token_id") for role in ("bos", "eos", "unk", "pad")}
    if roles["bos"] is None and len(before) == 1:
        roles["bos"] = before[0]
    found.add_bos = bool(before) and before == [roles["bos"]]
    found.add_eos = bool(after) and after == [roles["eos"]]
    for tokens, added in ((before, found.add_bos), (after, found.add_eos)):
        if tokens and not added:
            found.notes.append(
                f"the tokenizer puts {theirs.decode(tokens)!r} around a text and llama.cpp will not"
            )
    others = [n for n in sorted(tokenizer.eos_token_ids) if n != roles["eos"]]
    closing = theirs.convert_tokens_to_ids(turn_end(tokenizer) or "")
    roles["eot"] = closing if closing in others else next(iter(others), None)
    found.ids = {role: int(n) for role, n in roles.items() if n is not None and 0 <= n < rows}
    template = getattr(theirs, "chat_template", None)
    if isinstance(template, dict):
        template = template.get("default")
    found.template = template if isinstance(template, str) else None


def _kinds(node: Mapping[str, Any] | None, parts: str) -> list[Mapping[str, Any]]:
    """The steps of a normalizer or pre_tokenizer, flat."""
    if node is None:
        return []
    if node.get("type") == "Sequence":
        return [step for part in node.get(parts, ()) for step in _kinds(part, parts)]
    return [node]
