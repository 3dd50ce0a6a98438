"""The formats of `mlxlora export`: a function each, and one line in FORMATS."""

from collections.abc import Callable, Set
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlxlora.errors import ConfigError
from mlxlora.verbs.fuse import told

if TYPE_CHECKING:
    from mlxlora.export.fidelity import Fidelity, Open
    from mlxlora.export.proof import Proof
    from mlxlora.export.speakers import Speaker
    from mlxlora.lora.adapter import Adapter

    Program = Callable[[Set[int]], Speaker]  # of the tokens that end an answer


@dataclass(frozen=True)
class Order:
    """What is to be written, as the command line says it."""

    model: str
    source: Path  # the model's directory
    adapter: "Adapter | None"
    out: Path
    quant: str | None
    proof: "Proof | None"
    check: bool  # it is to be asked afterwards
    keep_adapter: bool
    force: bool
    trust_remote_code: bool
    progress: Callable[[str, int, int], None]  # (what, done, of)

    @property
    def needed(self) -> "Adapter":
        """The adapter. Raises ConfigError if there is none, or an option that is for models."""
        check_adapter(self.adapter, self.quant)
        assert self.adapter is not None
        if self.proof is not None and (self.proof.rows or self.proof.max_kl is not None):
            raise ConfigError(
                "adapters are written as they are and not measured; --data and --max-kl are for "
                "the formats of models"
            )
        if self.check:
            raise ConfigError(
                "an adapter alone cannot be asked; --check its model: --format gguf or hf"
            )
        return self.adapter

    @property
    def options(self) -> dict[str, Any]:
        return {"force": self.force, "trust_remote_code": self.trust_remote_code}


@dataclass(frozen=True)
class Outcome:
    """What was written, what is to be said of it, and who can be asked about it."""

    lines: list[str]
    result: dict[str, Any]  # for --json
    fidelity: "Fidelity | None" = None
    opened: "Open | None" = None  # the written weights as a model of this program
    programs: dict[str, "Program"] = field(default_factory=dict)  # by packages
    command: list[str] = field(default_factory=list)  # to go on with


def mlx(order: Order) -> Outcome:
    from mlxlora.export.fuse import Bits, fuse, wished
    from mlxlora.export.proof import written

    if order.adapter is None:
        raise ConfigError("--format mlx fuses an adapter; pass --adapter")
    bits: Bits = "auto" if order.quant is None else wished(order.quant, "--format mlx: --quant")
    done = fuse(
        order.model,
        order.adapter,
        order.out,
        bits,
        progress=order.progress,
        proof=order.proof,
        **order.options,
    )
    opened = partial(written, order.out, order.trust_remote_code)
    return Outcome(told(done), _plain(done), done.fidelity, opened)


def hf(order: Order) -> Outcome:
    from mlxlora.console import size
    from mlxlora.export.hf.directory import write
    from mlxlora.export.proof import written
    from mlxlora.export.speakers import InTransformers

    done = write(
        order.model, order.adapter, order.out, order.quant, proof=order.proof, **order.options
    )
    lines = [f"{done.path}: {size(done.bytes)}, {done.tensors} tensors, {done.dtype}", *done.notes]
    return Outcome(
        lines,
        _plain(done),
        done.fidelity,
        partial(written, order.out, order.trust_remote_code),
        {"torch transformers": partial(InTransformers, order.out)},
    )


def gguf(order: Order) -> Outcome:
    from mlxlora.console import size
    from mlxlora.export.gguf.model import write, written
    from mlxlora.export.speakers import InLlamaCpp

    quant = order.quant or "f16"
    done = write(order.model, order.adapter, order.out, quant, proof=order.proof, **order.options)
    lines = [f"{done.path}: {size(done.bytes)}, {done.quant}, {done.tensors} tensors", *done.notes]
    return Outcome(
        lines,
        _plain(done),
        done.fidelity,
        partial(written, order.out, order.source, order.trust_remote_code),
        {"llama-cpp-python": partial(InLlamaCpp, order.out)},
    )


def gguf_lora(order: Order) -> Outcome:
    from mlxlora.console import size
    from mlxlora.export.gguf.adapter import write

    done = write(order.model, order.needed, order.out, **order.options)
    first = f"{done.path}: {size(done.bytes)}, {done.layers} layers, rank {done.rank}"
    return Outcome([first, *done.notes], _plain(done))


def ollama(order: Order) -> Outcome:
    from mlxlora.console import size
    from mlxlora.export.ollama import directory as writer
    from mlxlora.export.speakers import InLlamaCpp

    done = writer.write(
        order.model,
        order.adapter,
        order.out,
        order.quant or writer.QUANT,
        keep_adapter=order.keep_adapter,
        proof=order.proof,
        **order.options,
    )
    lines = [f"{done.path}: {size(done.bytes)}, {done.quant}"]
    if done.tried:
        share = f"{done.equal} of {done.tried} conversations"
        lines.append(f"the TEMPLATE renders {share} as the chat template does")
    own = order.adapter if order.keep_adapter else None
    model, apart = order.out / writer.MODEL, order.out / writer.ADAPTER if own else None
    return Outcome(
        [*lines, *done.notes],
        _plain(done),
        done.fidelity,
        partial(writer.written, order.out, order.source, own, order.trust_remote_code),
        {"llama-cpp-python": partial(InLlamaCpp, model, adapter=apart)},
        done.create,
    )


def peft(order: Order) -> Outcome:
    from mlxlora.base import open_base
    from mlxlora.export.peft import write
    from mlxlora.files import refuse_existing
    from mlxlora.lora.attach import check_base

    adapter = order.needed
    refuse_existing(order.out)
    base = open_base(order.model, trust_remote_code=order.trust_remote_code)
    if not order.force:
        check_base(base, adapter)
    done = write(adapter, base, order.out, beside=adapter.home)
    first = f"{done.path}: {done.modules} layers, rank {done.rank}, lora_alpha {done.alpha}"
    return Outcome([first, *done.notes], _plain(done))


def check_adapter(adapter: object, quant: str | None) -> None:
    """Raise ConfigError unless a format of adapters has one, and no type of weights."""
    if adapter is None:
        raise ConfigError("this format writes an adapter; pass --adapter")
    if quant is not None:
        raise ConfigError("adapters are written in float32; there is no --quant for them")


def _plain(done: Any) -> dict[str, Any]:
    """A result for --json; its fidelity is told apart."""
    return {name: value for name, value in asdict(done).items() if name != "fidelity"}


OF_ADAPTERS = ("peft", "gguf-lora")
FORMATS: dict[str, Callable[[Order], Outcome]] = {
    "mlx": mlx,
    "hf": hf,
    "peft": peft,
    "gguf": gguf,
    "gguf-lora": gguf_lora,
    "ollama": ollama,
}
