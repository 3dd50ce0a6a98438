"""Adapters made by Hugging Face PEFT, and by what builds on it (TRL, Unsloth, axolotl).

read() makes an Adapter of such a directory, over the base it is for. The tensors are used as PEFT
would use them under their config; whatever cannot be placed, does not fit or would mean something
else here is refused by name. Pickles are never opened, and neither torch nor PEFT is needed.
Writing is export/peft.py.
"""

from pathlib import Path

from mlxlora.base import Base
from mlxlora.errors import AdapterError
from mlxlora.files import hash_file
from mlxlora.lora.adapter import Adapter
from mlxlora.lora.names import Names
from mlxlora.lora.peft_config import read_peft_config
from mlxlora.lora.peft_outer import place_outer
from mlxlora.lora.peft_place import Placed, place_modules
from mlxlora.lora.peft_tensors import find_weights, read_tensors
from mlxlora.lora.targets import natural
from mlxlora.lora.updates import common, tensors
from mlxlora.readers import expanded


def read(directory: str | Path, base: Base) -> Adapter:
    """The PEFT adapter in this directory, over this base.

    Raises AdapterError naming every tensor or field that cannot be used, and why.
    """
    place = expanded(directory)
    file = find_weights(place)
    config = read_peft_config(place)
    found = read_tensors(file)
    placed = Placed(base, config, Names(base.model, base.config))
    place_modules(placed, found.modules)
    place_outer(placed, found)
    if not placed.faults and not placed.updates and not placed.whole:
        placed.faults.append("it adapts nothing")
    if placed.faults:
        raise AdapterError(_refusal(file, placed))
    imported = {"format": "peft", "path": place.name, "sha256": hash_file(file)}
    imported |= {"base": config.base, "peft_version": config.version}
    return _adapter(
        placed,
        {
            "base": {**base.identity.to_dict(), "name": base.identity.public_name},
            "imported": imported,
        },
    )


def _adapter(placed: Placed, provenance: dict[str, dict[str, str]]) -> Adapter:
    """One rank and one scale: smaller ranks are padded, and other scales are in B."""
    rank, scale = common(placed.updates.values())
    weights = dict(placed.whole)
    for path in sorted(placed.updates, key=natural):
        update = placed.updates[path].at(rank, scale)
        weights |= tensors(path, placed.names.modules[path], update)
    return Adapter(
        "dora" if placed.config.dora else "lora",
        weights,
        rank,
        scale,
        float(placed.config.dropout),
        len(getattr(placed.base.model, "layers", ())),
        provenance,
    )


def _refusal(file: Path, placed: Placed) -> str:
    shown = "\n".join(f"  {fault}" for fault in placed.faults[:12])
    more = f"\n  and {len(placed.faults) - 12} more" if len(placed.faults) > 12 else ""
    made_for = f"\nIt was made for {placed.config.base}." if placed.config.base else ""
    return f"{file} cannot be used over {placed.base.identity.name}:\n{shown}{more}{made_for}"
