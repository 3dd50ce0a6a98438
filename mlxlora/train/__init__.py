"""Training. The package itself can be called: mlxlora.train(run, base) is loop.train."""

import sys
import types
from collections.abc import Iterator
from typing import Any


class _Callable(types.ModuleType):
    """mlxlora.train is this package and, as the library promises, a function too."""

    def __call__(self, *args: Any, **options: Any) -> Iterator[Any]:
        from mlxlora.train.loop import train

        return train(*args, **options)


sys.modules[__name__].__class__ = _Callable
