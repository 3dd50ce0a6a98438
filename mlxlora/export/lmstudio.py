"""Models where LM Studio looks for them: <its models>/<publisher>/<name>/, two levels down.

Its home is what ~/.lmstudio-home-pointer says, else ~/.cache/lm-studio if that is there, else
~/.lmstudio; its settings.json may name another folder for models (read in LM Studio's own
command line tool, src/modelsFolder.ts).
"""

import shutil
from pathlib import Path

from mlxlora.errors import ConfigError, ExportError
from mlxlora.export.shards import check_room
from mlxlora.files import atomic_directory, refuse_existing
from mlxlora.readers import read_json, read_text

PUBLISHER = "mlxlora"
POINTER = ".lmstudio-home-pointer"


def models_folder() -> Path:
    """Where LM Studio keeps models on this machine, or would if it were installed."""
    user = Path.home()
    home = user / ".lmstudio"
    if (user / POINTER).is_file():
        home = Path(read_text(user / POINTER, ConfigError).strip())
    elif (user / ".cache" / "lm-studio").is_dir():
        home = user / ".cache" / "lm-studio"
    if (home / "settings.json").is_file():
        told = read_json(home / "settings.json", ConfigError).get("downloadsFolder")
        if isinstance(told, str) and told:
            return Path(told)
    return home / "models"


def place(model: Path) -> Path:
    """Where in there this model directory or GGUF file belongs."""
    whole = model.resolve()
    return models_folder() / PUBLISHER / (whole.stem if whole.suffix == ".gguf" else whole.name)


def install(model: Path) -> Path:
    """Copy a model directory or a GGUF file there, whole or not at all; returns where.

    Raises ExportError if one of that name is there already or the disk is too full.
    """
    target = place(model)
    refuse_existing(target)
    files = [model] if model.is_file() else [f for f in sorted(model.iterdir()) if f.is_file()]
    with atomic_directory(target) as temporary:
        check_room(temporary, sum(file.stat().st_size for file in files), target)
        for file in files:
            try:
                shutil.copyfile(file, temporary / file.name)
            except OSError as error:
                raise ExportError(f"cannot copy {file} to {target}: {error.strerror}") from error
    return target
