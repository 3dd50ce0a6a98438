"""The model card beside a fused or exported model: README.md, as the Hub reads it.

What it was made of and trained on is the adapter's to tell (lora/card.py); how much of that is in
the model was measured when it was written.
"""

from mlxlora.export.fidelity import Fidelity
from mlxlora.lora.adapter import Adapter
from mlxlora.lora.card import base_of, front_matter, training
from mlxlora.lora.markdown import code, joined, plain, section, table

LIBRARIES = {
    "mlx": (
        ("With mlxlora:", "mlxlora chat --model ."),
        ("With mlx-lm:", 'mlx_lm.generate --model . --prompt "..."'),
    ),
    "transformers": (("With transformers:", 'pipeline("text-generation", model=".")'),),
}


def card(adapter: Adapter, what: str, library: str, found: Fidelity | None) -> str:
    """README.md of the model that adapter and its base became.

    what: how it was written, in words; library: one of LIBRARIES, that loads it.
    """
    name = base_of(adapter).get("name")
    title = f"{plain(name)}, fine-tuned" if name else "A fine-tuned model"
    usage = [
        f"{words}\n\n{code('python' if '(' in line else 'sh', line)}"
        for words, line in LIBRARIES[library]
    ]
    return joined(
        front_matter(adapter, "finetune", library),
        f"# {title}\n\nThe base model and an adapter as one: {plain(what)}. Written by mlxlora.",
        section("How to use it", "In the directory of this file.\n\n" + "\n\n".join(usage)),
        section("What is kept of the training", measured(found) if found else ""),
        training(adapter),
    )


def measured(found: Fidelity) -> str:
    """The figures of fidelity.json, as a table and a sentence."""
    rows = [
        ("base", found.loss_base, found.kl_base, found.agreement_base),
        ("base + adapter", found.loss_adapter, 0.0, 1.0),
        ("this model", found.loss_written, found.kl, found.agreement),
    ]
    told = table(
        ["", "loss per token", "KL from base + adapter, nats per token", "same first choice"],
        [[name, f"{loss:.4f}", f"{kl:.2g}", f"{same:.1%}"] for name, loss, kl, same in rows],
    )
    kept = ""
    if found.own_rows and found.kept is not None:
        kept = f" {found.kept:.1%} of what training gained is kept."
    return f"On {plain(found.rows)}, {found.tokens:,} tokens.{kept}\n\n{told}"
