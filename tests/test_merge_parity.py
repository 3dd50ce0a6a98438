"""Merged adapters against PEFT's add_weighted_adapter, which we did not write (run with -s)."""

import mlx.core as mx
import numpy as np
import pytest

from mlxlora.lora import mixing
from mlxlora.lora.adapter import Adapter
from mlxlora.lora.merge import merge
from mlxlora.lora.mixing import METHODS

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]

VOCABULARY, WIDTH, INNER = 19, 16, 24
EMBEDDING = "embed"
ALL = ("embed", "first", "second", "third")


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(VOCABULARY, WIDTH)
        self.first = torch.nn.Linear(WIDTH, INNER)
        self.second = torch.nn.Linear(INNER, WIDTH)
        self.third = torch.nn.Linear(WIDTH, WIDTH)

    def forward(self, tokens):
        x = self.embed(tokens)
        return self.third(self.second(self.first(x).relu()))


# (rank, alpha, modules) of three adapters; the last is not over all of the modules.
ALIKE = [(4, 8.0, ALL), (4, 2.0, ALL), (4, 5.0, ("embed", "second"))]
RANKS = [(4, 8.0, ALL), (2, 3.0, ALL), (6, 5.0, ("embed", "second"))]
WEIGHTS = [[0.7, 0.3, 0.5], [1.5, -0.4, 2.0], [-1.0, -0.2, 0.3]]


def both_sides(specs):
    """The same random adapters in PEFT, over one model, and here."""
    torch.manual_seed(0)
    configs = [
        peft.LoraConfig(r=r, lora_alpha=alpha, target_modules=list(modules), lora_dropout=0.0)
        for r, alpha, modules in specs
    ]
    model = peft.get_peft_model(Model(), configs[0], adapter_name="0")
    for number, config in enumerate(configs[1:], 1):
        model.add_adapter(str(number), config)
    ours = []
    for number, (rank, alpha, modules) in enumerate(specs):
        tensors = {}
        for path in modules:
            a, b = factors(model, path, str(number))
            for tensor in (a, b):
                tensor.data.normal_()
            tensors[f"{path}.lora_a"] = mx.array(a.detach().numpy().T)
            tensors[f"{path}.lora_b"] = mx.array(b.detach().numpy().T)
        ours.append(Adapter("lora", tensors, rank, alpha / rank))
    return model, ours


def factors(model, path, name):
    layer = getattr(model.base_model.model, path)
    if path == EMBEDDING:
        return layer.lora_embedding_A[name], layer.lora_embedding_B[name]
    return layer.lora_A[name].weight, layer.lora_B[name].weight


def differences(model, ours) -> tuple[float, float]:
    """(largest difference of a delta, of a factor up to sign), relative to the largest number."""
    deltas, both = [], []
    for path in ALL:
        layer = getattr(model.base_model.model, path)
        expected = layer.get_delta_weight("merged").detach().double().numpy()
        a, b = (np.array(ours.weights[f"{path}.lora_{x}"], np.float64) for x in "ab")
        delta = a @ b * ours.scale
        deltas.append(relative(delta if path == EMBEDDING else delta.T, expected))
        their_a, their_b = (x.detach().double().numpy().T for x in factors(model, path, "merged"))
        sizes = np.abs(their_b).max(1)
        used = sizes > 1e-4 * sizes.max()  # directions beyond the sum's rank are anything
        both.append(relative(np.abs(a[:, used]), np.abs(their_a[:, used])))
        both.append(relative(np.abs(b[used]), np.abs(their_b[used])))
    return max(deltas), max(both)


def relative(ours, expected) -> float:
    return float(np.abs(ours - expected).max() / np.abs(expected).max())


def drop_what_we_dropped(monkeypatch):
    """Let PEFT drop what we drop: masks are found by the numbers they were drawn for."""
    masks = {}
    drawn = mixing.at_random

    def noted(tensor, density, key):
        thinned = drawn(tensor, density, key)
        masks[np.array(tensor).tobytes()] = np.array(thinned) != 0
        return thinned

    def pruned(tensor, density, rescale):
        assert rescale
        mask = masks[tensor.numpy().tobytes()]
        return tensor * torch.tensor(mask) / density

    monkeypatch.setattr(mixing, "at_random", noted)
    monkeypatch.setattr("peft.utils.merge_utils.random_pruning", pruned)


DENSITIES = (0.2, 0.9, 1.0)
# method -> PEFT's name of it, and what is tried: adapters, what is chosen here, and there
CASES = {
    "linear": ("linear", [(ALIKE, {}, {})]),
    "cat": ("cat", [(ALIKE, {}, {}), (RANKS, {}, {})]),
    "svd": (
        "svd",
        [(ALIKE, {}, {}), *((RANKS, {"rank": r}, {"svd_rank": r}) for r in (None, 1, 3, 11))],
    ),
    "ties": ("ties", [(ALIKE, {"density": d}, {"density": d}) for d in DENSITIES]),
    "dare": (
        "dare_linear",
        [(ALIKE, {"density": d, "seed": 3}, {"density": d}) for d in DENSITIES],
    ),
}


@pytest.mark.parametrize("method", CASES)
def test_merged_adapters_are_those_of_peft(method, monkeypatch):
    drop_what_we_dropped(monkeypatch)
    their_name, cases = CASES[method]
    worst = []
    for weights in WEIGHTS:
        for specs, chosen, theirs in cases:
            model, ours = both_sides(specs)
            merged = merge(ours, weights, method, **chosen)
            names = [str(number) for number in range(len(specs))]
            model.add_weighted_adapter(names, weights, "merged", their_name, **theirs)
            worst.append(differences(model, merged))
    deltas, both = map(max, zip(*worst, strict=True))
    print(f"\n{method:<8}{len(worst)} mixtures: deltas {deltas:.1e}, factors {both:.1e}", end="")
    assert deltas < 1e-5 and both < 5e-5


def test_every_method_is_compared():
    assert set(CASES) == set(METHODS)
