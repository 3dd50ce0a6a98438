"""LoRA fine-tuning on MLX: from a JSONL file to a tuned model you chat with, serve and export.

    import mlxlora
    base = mlxlora.load("mlx-community/Qwen3-0.6B-4bit")
    run = mlxlora.RunConfig.load("recipe.toml", ["lora.rank=32"])
    for event in mlxlora.train(run, base): ...  # or mlxlora.resume("runs/sql", base)
    adapter = mlxlora.Adapter.load("runs/sql/adapter")
    mlxlora.attach(base, {"sql": adapter, "terse": other}); mlxlora.switch(base, "terse")
    mlxlora.detach(base)
    mlxlora.fuse(base, adapter, "fused/")

Names are imported when first used, so that `import mlxlora` and `mlxlora --help` are instant.
"""

import importlib
from typing import TYPE_CHECKING, Any

from mlxlora.machine import load_openblas

__version__ = "0.1.0"

load_openblas()  # before anything imports mlx

_HOMES = {
    "Adapter": "mlxlora.lora.adapter",
    "Base": "mlxlora.base",
    "MlxLoraError": "mlxlora.errors",
    "RunConfig": "mlxlora.config",
    "attach": "mlxlora.lora.attach",
    "detach": "mlxlora.lora.attach",
    "evaluate": "mlxlora.evaluation.evaluate",
    "fuse": "mlxlora.export.fuse",
    "load": "mlxlora.base",
    "merge": "mlxlora.lora.merge",
    "pull": "mlxlora.export.hub",
    "push": "mlxlora.export.hub",
    "quantize": "mlxlora.export.quantize",
    "resume": "mlxlora.train.loop",
    "switch": "mlxlora.lora.attach",
    "train": "mlxlora.train.loop",
}
__all__ = ["Adapter", "Base", "MlxLoraError", "RunConfig", "__version__", "attach", "detach"]
__all__ += ["evaluate", "fuse", "load", "merge", "pull", "push", "quantize", "resume", "switch"]
__all__ += ["train"]

if TYPE_CHECKING:
    from mlxlora.base import Base, load
    from mlxlora.config import RunConfig
    from mlxlora.errors import MlxLoraError
    from mlxlora.evaluation.evaluate import evaluate
    from mlxlora.export.fuse import fuse
    from mlxlora.export.hub import pull, push
    from mlxlora.export.quantize import quantize
    from mlxlora.lora.adapter import Adapter
    from mlxlora.lora.attach import attach, detach, switch
    from mlxlora.lora.merge import merge
    from mlxlora.train.loop import resume, train


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'mlxlora' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
