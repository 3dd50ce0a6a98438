"""Is this the base that the adapter was trained on? Point by point, also where all is well.

That the weights are those that were saved, Adapter.load has checked already.
"""

from dataclasses import dataclass

from mlxlora.base import Base
from mlxlora.errors import AdapterError
from mlxlora.lora.adapter import Adapter
from mlxlora.lora.attach import attach, detach
from mlxlora.lora.provenance import COMPARED

SAME, DIFFERS, UNKNOWN = "same", "differs", "not known"
NAMES = {
    "fingerprint": "base",
    "quantization": "bits",
    "tokenizer": "tokenizer",
    "template": "template",
}
SHOWN = 28  # of a hash


@dataclass(frozen=True)
class Check:
    what: str
    found: str  # SAME, DIFFERS or UNKNOWN
    detail: str = ""


def verify(adapter: Adapter, base: Base) -> list[Check]:
    """What was compared, and how it turned out."""
    trained_on, here = adapter.provenance.get("base") or {}, base.identity.to_dict()
    checks = [_hash(adapter)]
    for key in COMPARED:
        known, own = trained_on.get(key), here[key]
        if known is None:
            checks.append(Check(NAMES[key], UNKNOWN, "the adapter does not tell"))
        elif known == own:
            checks.append(Check(NAMES[key], SAME, f"the same, {own[:SHOWN]}"))
        else:
            detail = f"trained on {known[:SHOWN]}\nhere {own[:SHOWN]}"
            checks.append(Check(NAMES[key], DIFFERS, detail))
    return [*checks, _fit(adapter, base)]


def _hash(adapter: Adapter) -> Check:
    told = adapter.provenance.get("weights_sha256")
    if told is None:
        return Check("weights", UNKNOWN, "no hash was saved with them")
    return Check("weights", SAME, f"as they were saved, {str(told)[:SHOWN]}")


def _fit(adapter: Adapter, base: Base) -> Check:
    try:
        attach(base.model, adapter)
    except AdapterError as error:
        first, *others = (s.strip() for s in str(error).splitlines() if s.startswith("  "))
        return Check("shapes", DIFFERS, first + " (among others)" * bool(others))
    finally:
        detach(base)
    whole = f", {len(adapter.whole)} whole weights" if adapter.whole else ""
    return Check("shapes", SAME, f"{len(adapter.modules)} layers{whole} fit")
