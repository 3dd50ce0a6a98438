"""Types of weights in a GGUF: which tensor gets which, and the numbers in them.

Rules: vectors, biases, routers, positions and short convolutions are float32, as llama.cpp wants
them. The matrix that logits come from (output, or the embedding where it is both) is never rounded
to fewer than 8 bits, in the spirit of llama.cpp's own quantizing. A tensor whose rows are no
multiple of 32 cannot be rounded in blocks and is float16. Rounding is the gguf package's
(gguf.quants), some rows at a time.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import mlx.core as mx
import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, LlamaFileType
from gguf.quants import quantize

from mlxlora.errors import ExportError

Q = GGMLQuantizationType
CHUNK = 1 << 22  # numbers that are rounded at once
_PRECISE = ("ffn_gate_inp", "position_embd", "shortconv.conv", "ssm_conv1d")
_FLOAT = {Q.F32, Q.F16, Q.BF16}


@dataclass(frozen=True)
class Quant:
    """A value of --quant."""

    type: GGMLQuantizationType
    file: LlamaFileType


QUANTS = {
    "f32": Quant(Q.F32, LlamaFileType.ALL_F32),
    "f16": Quant(Q.F16, LlamaFileType.MOSTLY_F16),
    "bf16": Quant(Q.BF16, LlamaFileType.MOSTLY_BF16),
    "q8_0": Quant(Q.Q8_0, LlamaFileType.MOSTLY_Q8_0),
    "q5_1": Quant(Q.Q5_1, LlamaFileType.MOSTLY_Q5_1),
    "q5_0": Quant(Q.Q5_0, LlamaFileType.MOSTLY_Q5_0),
    "q4_1": Quant(Q.Q4_1, LlamaFileType.MOSTLY_Q4_1),
    "q4_0": Quant(Q.Q4_0, LlamaFileType.MOSTLY_Q4_0),
}


def known(name: str) -> Quant:
    """Raises ExportError for a type that is not written."""
    if name not in QUANTS:
        raise ExportError(f"--quant {name!r} is not known for GGUF; known are {', '.join(QUANTS)}")
    return QUANTS[name]


def type_for(name: str, shape: tuple[int, ...], quant: Quant, tied: bool) -> GGMLQuantizationType:
    """The type of the tensor of this name in the file. tied: the embedding is the output too."""
    if len(shape) == 1 or name.endswith(".bias") or any(part in name for part in _PRECISE):
        return Q.F32
    wanted = quant.type
    if wanted in _FLOAT:
        return wanted
    if shape[-1] % GGML_QUANT_SIZES[wanted][0]:
        return Q.F16
    head = "token_embd.weight" if tied else "output.weight"
    return Q.Q8_0 if name == head else wanted


def size(shape: tuple[int, ...], kind: GGMLQuantizationType) -> int:
    """Bytes of a tensor."""
    block, width = GGML_QUANT_SIZES[kind]
    return int(np.prod(shape)) // block * width


def chunks(array: mx.array, kind: GGMLQuantizationType, name: str) -> Iterator[bytes]:
    """The tensor's bytes, in pieces. Raises ExportError for numbers that the type cannot hold."""
    rows = array.reshape(-1, array.shape[-1])
    step = max(1, CHUNK // rows.shape[-1])
    for start in range(0, rows.shape[0], step):
        part = np.array(rows[start : start + step].astype(mx.float32))
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
            data = quantize(part, kind)
        if kind == Q.F16 and not np.isfinite(data).all():
            raise ExportError(f"{name} holds numbers beyond float16; use --quant bf16 or f32")
        yield np.ascontiguousarray(data).tobytes()
