"""An adapter in words: facts for a screen, and the model card that lies beside its weights.

The card is README.md with front matter that the Hugging Face Hub understands: what the adapter
was trained on, with what, how well, and how it is loaded. All of it comes from the adapter's
config and provenance; what they do not tell is left out. What an adapter of strangers tells is
put where it can be nothing but text.
"""

import json
import shlex
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, cast

from mlxlora.hub_files import HUB_ID
from mlxlora.lora.markdown import code, joined, plain, section, table
from mlxlora.sparkline import sparkline

ROWS = 12  # of the curve's table, at most


class Described(Protocol):
    """What is read of an Adapter."""

    @property
    def method(self) -> str: ...
    @property
    def weights(self) -> Mapping[str, Any]: ...
    @property
    def rank(self) -> int: ...
    @property
    def scale(self) -> float: ...
    @property
    def alpha(self) -> float: ...
    @property
    def modules(self) -> list[str]: ...
    @property
    def whole(self) -> Mapping[str, Any]: ...
    @property
    def provenance(self) -> Mapping[str, Any]: ...


def facts(adapter: Described) -> list[tuple[str, str]]:
    """What a person wants to know of it: label and value."""
    told = adapter.provenance
    base, metrics = told.get("base") or {}, told.get("metrics") or {}
    found = [("method", _method(adapter)), ("layers", f"{len(adapter.modules)}")]
    if adapter.modules:
        found.append(("rank", f"{adapter.rank}, alpha {adapter.alpha:g} (scale {adapter.scale:g})"))
    if adapter.modules and adapter.whole:
        found.append(("trained whole", _shortened(whole_modules(adapter))))
    found.append(("parameters", f"{sum(a.size for a in adapter.weights.values()):,}"))
    if base:
        found.append(("base", f"{base.get('name')} ({base.get('quantization')})"))
    if told.get("imported"):
        found.append(("imported", " ".join(_origin(told["imported"]))))
    found += [(f"{name} rows", text) for name, text in _rows(told)]
    if metrics:
        found.append(("update", f"{metrics.get('update')} of {metrics.get('updates')}"))
    losses = _losses(told)
    if losses:
        found.append(("validation loss", losses))
    curve = _curve(told)
    if len(curve) > 2:
        found.append(("curve", sparkline([point[2] or point[1] for point in curve])))
    found += _merged(told)
    found += [(name, str(text)) for name, text in (told.get("versions") or {}).items()]
    if not told:
        found.append(("provenance", "none (not written by mlxlora)"))
    return found


def whole_modules(adapter: Described) -> list[str]:
    """Paths of the modules that were trained whole."""
    return list(dict.fromkeys(name.rpartition(".")[0] for name in adapter.whole))


def card(adapter: Described) -> str:
    """README.md of the adapter's directory."""
    kind = "lora" if adapter.modules else "full-fine-tune"
    return joined(
        front_matter(adapter, "adapter", "mlx", kind),
        f"# {_title(adapter)}\n\n{_summary(adapter)}",
        section("How to use it", _usage(adapter)),
        training(adapter),
        section("Weights", table(["", ""], _hashes(adapter))),
    )


def training(adapter: Described) -> str:
    """The sections on what it was trained on, how, and how well it turned out."""
    told = adapter.provenance
    rows = "\n".join(f"- {plain(f'{name}: {found}')}" for name, found in _rows(told))
    return joined(
        section("Trained on", rows),
        section("Merged", table(["", ""], _merged(told))),
        section("Result", _result(told)),
        section("How", table(["option", "value"], _options(adapter))),
    ).rstrip()


def front_matter(adapter: Described, relation: str, library: str, *tags: str) -> str:
    """In YAML, by the Hub's own library; a base that is no Hub id is not named there.

    relation: to the base, in the Hub's words; library: that loads it.
    """
    from huggingface_hub import ModelCardData

    base = base_of(adapter)
    known = bool(base.get("revision")) and HUB_ID.fullmatch(str(base.get("name") or ""))
    named = {"base_model": str(base["name"]), "base_model_relation": relation} if known else {}
    data = ModelCardData(
        library_name=library,
        pipeline_tag="text-generation",
        tags=[library, "mlxlora", *tags],
        **cast(Any, named),
    )
    return f"---\n{data.to_yaml()}\n---"


def _title(adapter: Described) -> str:
    name = base_of(adapter).get("name")
    what = {"full": "Every weight", "dora": "A DoRA adapter"}.get(adapter.method, "A LoRA adapter")
    return f"{what} for {plain(name)}" if name else what


def _summary(adapter: Described) -> str:
    size = sum(array.size for array in adapter.weights.values())
    sentences = [f"{size:,} trained parameters"]
    if adapter.modules:
        sentences[0] += f" over {len(adapter.modules)} layers of a frozen base model"
    base = base_of(adapter)
    if base.get("quantization"):
        told = str(base["quantization"])
        sentences.append(f"the base is {'unquantized' if told == 'none' else f'at {plain(told)}'}")
    losses = _losses(adapter.provenance)
    if losses:
        sentences.append(f"validation loss {losses}")
    return "; ".join(sentences) + ". Written by mlxlora."


def _usage(adapter: Described) -> str:
    base = plain(base_of(adapter).get("name") or "BASE")
    word, quoted = shlex.quote(base), json.dumps(base)
    blocks = [
        "In the directory of this file, with mlxlora:",
        code("sh", f"mlxlora chat --model {word} --adapter ."),
        code(
            "python",
            "import mlxlora\n\n"
            f"base = mlxlora.load({quoted})\n"
            'mlxlora.attach(base, mlxlora.Adapter.load("."))',
        ),
    ]
    if adapter.method != "full" and not adapter.whole:
        blocks += [
            "With mlx-lm:",
            code("sh", f'mlx_lm.generate --model {word} --adapter-path . --prompt "..."'),
        ]
    if adapter.method != "full":
        blocks += [
            "With PEFT, vLLM or llama.cpp, after",
            code("sh", f"mlxlora export --model {word} --adapter . --format peft --out peft"),
            code(
                "python",
                "from peft import PeftModel\nfrom transformers import AutoModelForCausalLM\n\n"
                f"model = AutoModelForCausalLM.from_pretrained({quoted})\n"
                'model = PeftModel.from_pretrained(model, "peft")',
            ),
        ]
    return "\n\n".join(blocks)


def _result(told: Mapping[str, Any]) -> str:
    curve = _curve(told)
    rows = [
        (f"{update:,}", *("" if loss is None else f"{loss:.4f}" for loss in losses))
        for update, *losses in _thinned(curve)
    ]
    if not rows:
        return ""
    drawn = sparkline([valid or train for _, train, valid in curve])
    losses = table(["update", "training loss", "validation loss"], rows)
    about = "Mean loss per supervised token"
    return f"{about}, `{drawn}`:\n\n{losses}" if len(curve) > 2 else f"{about}:\n\n{losses}"


def _options(adapter: Described) -> list[tuple[str, str]]:
    run = adapter.provenance.get("run") or {}
    rows = []
    if adapter.modules:
        rows.append(("rank", f"{adapter.rank}, alpha {adapter.alpha:g}, scale {adapter.scale:g}"))
    metrics = adapter.provenance.get("metrics") or {}
    if metrics.get("learning_rate"):
        rows.append(("peak learning rate", f"{metrics['learning_rate']:g}"))
    for group in ("lora", "train", "data"):
        options = run.get(group)
        for name, value in (options if isinstance(options, dict) else {}).items():
            if value not in ("", 0, [], {}, "auto", None):
                rows.append((f"{group}.{name}", _shortened(value)))
    return rows


def _hashes(adapter: Described) -> list[tuple[str, str]]:
    told, base = adapter.provenance, base_of(adapter)
    named = {
        "adapters.safetensors (SHA-256)": told.get("weights_sha256"),
        "base, revision": base.get("revision"),
        "base, weights": base.get("fingerprint"),
        "base, tokenizer": base.get("tokenizer"),
        "base, chat template": base.get("template"),
        **(told.get("versions") or {}),
    }
    return [(name, str(value)) for name, value in named.items() if value]


def _origin(imported: Mapping[str, str]) -> list[str]:
    """Where an imported adapter is from, in words."""
    words = [f"from {imported.get('path')} ({imported.get('format')})"]
    return [*words, f"made for {imported['base']}"] if imported.get("base") else words


def base_of(adapter: Described) -> Mapping[str, Any]:
    return adapter.provenance.get("base") or {}


def _method(adapter: Described) -> str:
    trained = ((adapter.provenance.get("run") or {}).get("lora") or {}).get("method")
    return str(trained or adapter.method)


def _rows(told: Mapping[str, Any]) -> list[tuple[str, str]]:
    data = told.get("data") or {}
    files = ((name, file or {}) for name, file in (data.get("files") or {}).items())
    kind = data.get("format") or ""
    return [
        (n, f"{file.get('rows') or 0:,} {kind} rows in {file.get('path')}") for n, file in files
    ]


def _merged(told: Mapping[str, Any]) -> list[tuple[str, str]]:
    """How several adapters became this one, and what is known of each of them."""
    merge = told.get("merge") or {}
    chosen = [f"{key} {merge[key]:g}" for key in ("density", "seed") if merge.get(key) is not None]
    found = [("merged by", ", ".join([str(merge.get("method")), *chosen]))] if merge else []
    for number, parent in enumerate(merge.get("parents") or (), 1):
        one, weight = parent or {}, (parent or {}).get("weight")
        name = one.get("name") or "an adapter"
        found.append((f"parent {number}", name if weight is None else f"{weight:g} times {name}"))
        facts = [*_rows(one), ("validation loss", _losses(one))]
        found += [(f"parent {number}, {label}", text) for label, text in facts if text]
    return found


def _losses(told: Mapping[str, Any]) -> str:
    metrics = told.get("metrics") or {}
    before, after = metrics.get("valid_loss_before"), metrics.get("valid_loss")
    return "" if before is None or after is None else f"{before:.4f} before, {after:.4f} after"


def _curve(told: Mapping[str, Any]) -> list[tuple[int, float | None, float | None]]:
    """(update, training loss, validation loss) of the points that are told as such."""
    points = told.get("curve")
    found = []
    for point in points if isinstance(points, list) else []:
        if isinstance(point, list) and len(point) == 3 and isinstance(point[0], int):
            losses = [x if isinstance(x, float | int) else None for x in point[1:]]
            found.append((point[0], losses[0], losses[1]))
    return found


def _thinned(curve: Sequence[Any]) -> list[Any]:
    """At most ROWS of them, the first and the last included."""
    if len(curve) <= ROWS:
        return list(curve)
    return [curve[round(i * (len(curve) - 1) / (ROWS - 1))] for i in range(ROWS)]


def _shortened(value: Any) -> str:
    text = ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
