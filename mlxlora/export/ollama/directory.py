"""A directory for `ollama create`: the model as GGUF, and a Modelfile that renders chats right."""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.nn as nn

from mlxlora.base import open_tokenizer
from mlxlora.errors import ExportError, ModelError
from mlxlora.export.fidelity import Fidelity
from mlxlora.export.gguf import adapter as gguf_lora
from mlxlora.export.gguf import model as gguf
from mlxlora.export.ollama.compared import REMEDY, compare
from mlxlora.export.ollama.modelfile import holds, modelfile, parameters, stops
from mlxlora.export.ollama.turns import Prober, Refused, find
from mlxlora.export.ollama.written import go_template
from mlxlora.export.proof import PROOF, Proof
from mlxlora.files import atomic_directory, refuse_existing
from mlxlora.lora.adapter import Adapter
from mlxlora.lora.attach import attach
from mlxlora.model_files import check_directory, read_config
from mlxlora.model_files import find as find_model
from mlxlora.readers import read_json

MODEL, ADAPTER, MODELFILE = "model.gguf", "adapter.gguf", "Modelfile"
QUANT = "q8_0"
PROMPT = "{{ .Prompt }}"  # what Ollama itself takes for a model without a template
SHOWN = 3  # conversations that are named


@dataclass
class Template:
    """A TEMPLATE, the Modelfile's system message, and how it was checked."""

    text: str
    system: str = ""
    equal: int = 0  # conversations that render exactly as with the chat template
    tried: int = 0  # that the chat template takes
    different: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@dataclass
class Exported:
    """What write() wrote."""

    path: str
    bytes: int  # of model and adapter
    quant: str
    equal: int
    tried: int
    different: list[str]
    create: list[str]  # the command to go on with
    notes: list[str]
    fidelity: Fidelity | None = None


def write(
    model: str | Path,
    adapter: Adapter | None,
    out: str | Path,
    quant: str = QUANT,
    *,
    keep_adapter: bool = False,
    proof: Proof | None = PROOF,
    force: bool = False,
    trust_remote_code: bool = False,
) -> Exported:
    """Write the directory, whole or not at all.

    keep_adapter: the base and the adapter as files of their own, instead of one merged. proof:
    what the GGUF of the model is measured by, which is the base alone with keep_adapter. Raises
    ExportError for a chat template of which not even one question comes out the same, and what
    gguf.write and gguf_lora.write raise.
    """
    out = Path(out)
    refuse_existing(out)
    if keep_adapter and adapter is None:
        raise ExportError("there is no adapter to keep apart; pass --adapter")
    source, _ = find_model(model)
    check_directory(source)
    config = read_config(source)
    tokenizer = open_tokenizer(source, config, trust_remote_code)
    template = template_of(tokenizer)
    text = modelfile(
        template.text,
        model=MODEL,
        adapter=ADAPTER if keep_adapter else "",
        system=template.system,
        stops=stops(tokenizer),
        parameters=parameters(_generation_config(source), config),
    )
    options = {"force": force, "trust_remote_code": trust_remote_code}
    with atomic_directory(out) as temporary:
        notes = list(template.notes)
        if keep_adapter and adapter is not None:  # first: it is small, and may be refused
            notes += gguf_lora.write(model, adapter, temporary / ADAPTER, **options).notes
        merged = None if keep_adapter else adapter
        done = gguf.write(model, merged, temporary / MODEL, quant, proof=proof, **options)
        (temporary / MODELFILE).write_text(text, "utf-8")
        size = sum(file.stat().st_size for file in temporary.glob("*.gguf"))
    return Exported(
        path=str(out),
        bytes=size,
        quant=quant,
        equal=template.equal,
        tried=template.tried,
        different=template.different,
        create=["ollama", "create", model_name(out), "-f", str(out / MODELFILE)],
        notes=[*notes, *done.notes],
        fidelity=done.fidelity,
    )


def written(
    out: Path, source: Path, adapter: Adapter | None = None, trust_remote_code: bool = False
) -> nn.Module:
    """The model in source with the weights that write() wrote. adapter: the one kept apart."""
    model = gguf.written(out / MODEL, source, trust_remote_code)
    if adapter is not None:
        attach(model, adapter)
    return model


def template_of(tokenizer: Any) -> Template:
    """The TEMPLATE for this tokenizer's chat template, checked. Raises ExportError."""
    if not tokenizer.has_chat_template:
        note = "this model has no chat template; its TEMPLATE is the bare prompt"
        return Template(PROMPT, notes=[note])
    prober = Prober(tokenizer)
    try:
        turns = find(prober)
    except Refused as error:
        raise ExportError(f"no Ollama TEMPLATE can be made: {error}; {REMEDY}") from error
    text = go_template(turns)
    system = turns.system.default if turns.system is not None else ""
    if not holds(system):  # then the TEMPLATE alone has it
        system = ""
    done = compare(prober, text, system)
    notes = list(turns.notes)
    if done.different:
        others = len(done.different) - SHOWN
        named = "; ".join(done.different[:SHOWN]) + (f"; {others} more" if others > 0 else "")
        notes.append(f"not as the chat template renders it: {named}. {done.first}")
    tried = len(done.equal) + len(done.different)
    return Template(text, system, len(done.equal), tried, done.different, notes)


def model_name(out: Path) -> str:
    """A name that Ollama takes, from that of the directory."""
    name = re.sub(r"[^a-z0-9._-]+", "-", out.resolve().name.lower()).strip("-._")
    return name[:80] or "tuned"


def _generation_config(source: Path) -> dict[str, Any]:
    file = source / "generation_config.json"
    return read_json(file, ModelError) if file.is_file() else {}
