"""What can go wrong with the user's input, each kind once.

Every message says what is wrong, where (file:line, tensor, option) and what to do.
The command line prints the message alone and exits with 2; anything that is not a
MlxLoraError is a fault of ours and keeps its traceback.
"""


class MlxLoraError(Exception):
    """The user's input cannot be used as it is."""


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
