"""What can go wrong with the user's input, each kind once.

Every message says what is wrong, where (file:line, tensor, option) and what to do.
The command line prints the message alone and exits with 2; anything that is not a
MlxLoraError is a fault of ours and keeps its traceback.
"""

import re

# Escape sequences would act on the terminal; halves of surrogate pairs cannot be written at all.
_NO_TEXT = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff]")


def printable(text: str) -> str:
    """Text from a file or a model as it may be shown: control characters are spelled out."""
    return _NO_TEXT.sub(lambda found: repr(found.group())[1:-1], text)


class MlxLoraError(Exception):
    """The user's input cannot be used as it is."""

    def __str__(self) -> str:
        return printable(super().__str__())


class ConfigError(MlxLoraError):
    """An unknown option, a wrong type, an impossible value."""


class DataError(MlxLoraError):
    """Rows that cannot be read or would train nothing."""


class ModelError(MlxLoraError):
    """A base model that is incomplete, damaged or of an unknown kind."""


class AdapterError(MlxLoraError):
    """An adapter that is damaged or belongs to another base."""


class TrainError(MlxLoraError):
    """Training cannot go on (for example a loss that is not a number)."""


class CheckpointError(MlxLoraError):
    """A run that cannot go on from where it was: damaged, changed, or in use."""


class ExportError(MlxLoraError):
    """A target that exists, a format that cannot hold the model."""
