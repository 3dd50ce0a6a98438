"""The two decoders: one prompt continued greedily with an adapter attached.

Random models have no tokenizer, so both sides stand on mlx-lm's generate_step, which is
what its generate and ours run on; what differs is the layers.
"""

import time
from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.generate import generate_step

from mlxlora.bench.attached import attach_mlx_lm, attach_ours
from mlxlora.bench.job import MLX_LM, OURS, Job
from mlxlora.quantized import use_own_products

PROMPT_TOKENS = 32
NEW_TOKENS = 64


def prepare_ours(model: nn.Module, job: Job) -> None:
    use_own_products(model)
    attach_ours(model, job.rank, trained=True)


def prepare_mlx_lm(model: nn.Module, job: Job) -> None:
    attach_mlx_lm(model, job.rank, trained=True)


PREPARATIONS: dict[str, Callable[[nn.Module, Job], None]] = {
    OURS: prepare_ours,
    MLX_LM: prepare_mlx_lm,
}


def decode(model: nn.Module, words: int) -> tuple[list[int], float]:
    """(new tokens, seconds from the first to the last); done twice, the second measured."""
    model.eval()
    prompt = np.random.default_rng(0).integers(0, words, PROMPT_TOKENS)
    for _ in range(2):
        mx.synchronize()
        mx.reset_peak_memory()
        tokens: list[int] = []
        began = ended = 0.0
        for token, _ in generate_step(mx.array(prompt), model, max_tokens=NEW_TOKENS):
            ended = time.perf_counter()
            began = began or ended
            tokens.append(int(token))
    return tokens, ended - began
