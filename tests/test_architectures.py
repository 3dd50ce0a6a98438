"""The whole way of an adapter through every text architecture of mlx-lm, tiny and random."""

from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from architectures import FAMILIES, write_model
from conftest import randomized, worst
from mlx.utils import tree_flatten

from mlxlora.base import open_frozen
from mlxlora.config import LoraConfig
from mlxlora.data.batches import pack, pad
from mlxlora.data.render import Example
from mlxlora.export.fuse import fuse
from mlxlora.lora.adapter import Adapter
from mlxlora.lora.attach import attach, detach, low_rank_layers
from mlxlora.lora.fresh import collect, new_layers
from mlxlora.train.forward import Forward, arrays
from mlxlora.train.objectives import sft

CONFIG = LoraConfig(rank=4, alpha=8.0)
TOKENS = mx.array([[5, 3, 8, 1, 9, 2, 7, 4, 6, 11, 10, 12]])
