"""Which files make an adapter or a model: those are sent to the Hub and fetched from it.

A file goes only if one of the patterns here names it, so what a run, an editor or a login leaves
in a directory stays where it is; so do links, which may lead anywhere.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from mlxlora.errors import ExportError
from mlxlora.hub_files import TOKEN, token
from mlxlora.lora.adapter import CONFIG, WEIGHTS, Adapter
from mlxlora.model_files import INDEX, check_directory
from mlxlora.readers import LARGEST_JSON, expanded, read_json, safetensors_header
from mlxlora.train.places import ADAPTER

PEFT_WEIGHTS = "adapter_model.safetensors"
BINARY = ("*.safetensors", "*.gguf", "*.model")
# Besides weights and configuration.
COMPANIONS = (
    *("README.md", "LICENSE*", "NOTICE*", "provenance.json", "fidelity.json"),
    *("tokenizer*.json", "*.model", "*.tiktoken", "tekken.json", "vocab.json", "vocab.txt"),
    *("merges.txt", "added_tokens.json", "special_tokens_map.json"),
    *("chat_template.jinja", "chat_template.json", "*.gguf", "Modelfile"),
)
EXPECTED = (
    f"an adapter ({CONFIG} and {WEIGHTS} or {PEFT_WEIGHTS}) or a model (config.json and "
    "model*.safetensors)"
)


@dataclass(frozen=True)
class Kind:
    """What a directory may be, by the file that tells it and the weights it must have."""

    name: str  # with its article
    mark: str
    weights: tuple[str, ...]
    others: tuple[str, ...] = ()

    def is_told_by(self, names: Iterable[str]) -> bool:
        """Whether files of these names are one of this kind."""
        names = list(names)
        return self.mark in names and any(self.replaces(name) for name in names)

    def owns(self, name: str) -> bool:
        """Whether a file of this name goes along."""
        patterns = (self.mark, *self.weights, *self.others, *COMPANIONS)
        return not name.startswith(".") and matches(name, patterns)

    def replaces(self, name: str) -> bool:
        """Whether it holds weights, so that others of before may not stay beside new ones."""
        return matches(name, self.weights)


KINDS = (
    Kind("an adapter", CONFIG, (WEIGHTS, PEFT_WEIGHTS)),
    Kind(
        "a model",
        "config.json",
        ("model*.safetensors", INDEX),
        (
            *("*_config.json", "configuration_*.py", "modeling_*.py"),
            *("tokenization_*.py", "processing_*.py"),
        ),
    ),
)


@dataclass(frozen=True)
class Parcel:
    """A directory with what of it is sent."""

    directory: Path
    kind: Kind
    files: tuple[Path, ...]
    left_out: tuple[str, ...]  # names; of a directory with a slash


def pack(path: str | Path) -> Parcel:
    """What is to be sent of a directory; of a run's, what is in its adapter/.

    Raises ExportError for anything but one whole adapter or model, and for files that hold a
    token or are links; AdapterError, ModelError for damaged ones.
    """
    directory = _source(path)
    kind = kind_of(directory, (entry.name for entry in directory.iterdir()))
    files, left_out = [], []
    for entry in sorted(directory.iterdir()):
        if not kind.owns(entry.name) or entry.is_dir():
            left_out.append(entry.name + "/" * entry.is_dir())
        elif entry.is_symlink() or not entry.is_file():
            raise ExportError(f"{entry} is a link, or no file at all; put a copy in its place")
        else:
            files.append(entry)
    check(directory, kind)
    _refuse_tokens(files)
    return Parcel(directory, kind, tuple(files), tuple(left_out))


def kind_of(place: object, names: Iterable[str]) -> Kind:
    """Which kind files of these names are. Raises ExportError unless it is exactly one."""
    names = list(names)
    kinds = [kind for kind in KINDS if kind.is_told_by(names)]
    if not kinds:
        raise ExportError(f"{place} is neither of what is expected: {EXPECTED}")
    if len(kinds) > 1:
        raise ExportError(f"{place} holds both an adapter and a model; expected is one of them")
    return kinds[0]


def check(directory: Path, kind: Kind) -> None:
    """Raise AdapterError, ModelError or ExportError unless it is whole."""
    if kind.mark != CONFIG:
        check_directory(directory)
    elif (directory / WEIGHTS).exists():
        Adapter.load(directory)
    else:
        read_json(directory / CONFIG, ExportError)
        safetensors_header(directory / PEFT_WEIGHTS, ExportError)


def matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _source(path: str | Path) -> Path:
    """The directory that path names, or the adapter's if it is a run's."""
    directory = expanded(path)
    if not directory.is_dir():
        what = "is a file" if directory.exists() else "does not exist"
        raise ExportError(f"{directory} {what}; a push takes the directory of {EXPECTED}")
    inner = directory / ADAPTER
    if (inner / CONFIG).is_file() and not (directory / CONFIG).exists():
        return inner
    return directory


def _refuse_tokens(files: Iterable[Path]) -> None:
    """Raise ExportError if a text among the files holds a Hub token."""
    own = token()
    for file in files:
        if matches(file.name, BINARY) or file.stat().st_size > LARGEST_JSON:
            continue
        text = file.read_text(encoding="utf-8", errors="replace")
        if TOKEN.search(text) or (own and own in text):
            raise ExportError(f"{file} holds a Hub token; take it out (and revoke it) first")
