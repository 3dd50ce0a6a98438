import mlx.core as mx
import pytest
from conftest import worst
from mlx_lm import load as mlx_lm_load
from mlx_lm.utils import quantize_model

from mlxlora.base import load
from mlxlora.errors import ExportError
from mlxlora.export.quantize import quantize

TOKENS = mx.array([[1, 2, 3, 4]])


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("name", ["dense_path", "experts_path"])
def test_quantizing_is_mlx_lm_s(name, bits, request, tmp_path):
    path = request.getfixturevalue(name)
    quantize(path, tmp_path / "q", bits=bits, group_size=32)
    ours, _ = mlx_lm_load(str(tmp_path / "q"))
    theirs, _ = mlx_lm_load(str(path))
    theirs, _ = quantize_model(theirs, {}, 32, bits)
    assert worst(ours(TOKENS), theirs(TOKENS)) < 1e-6
    assert load(tmp_path / "q").identity.quantization == f"{bits} bits, groups of 32, affine"


def test_a_quantized_base_or_impossible_bits_are_refused(dense_path, quantized_path, tmp_path):
    with pytest.raises(ExportError, match="quantized already"):
        quantize(quantized_path, tmp_path / "q")
    with pytest.raises(ExportError, match="MLX quantizes to"):
        quantize(dense_path, tmp_path / "q", bits=7)
    assert list(tmp_path.iterdir()) == []
