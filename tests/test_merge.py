"""Merging adapters: the methods against numpy in float64, the refusals, the program."""

import json
import sys

import mlx.core as mx
import numpy as np
import pytest
from conftest import randomized, worst
from mlx_lm import load as mlx_lm_load

from mlxlora.cli import main
from mlxlora.config import LoraConfig
from mlxlora.errors import AdapterError, ConfigError
from mlxlora.lora.adapter import Adapter
from mlxlora.lora.attach import attach, detach
from mlxlora.lora.card import facts
from mlxlora.lora.fresh import collect, new_layers
from mlxlora.lora.merge import merge
from mlxlora.lora.mixing import METHODS
from mlxlora.verbs.merge import numbers, spread

TOKENS = mx.array([[1, 2, 3, 4, 5, 6]])
SHAPES = {"a.linear": (20, 12), "a.narrow": (9, 3), "b.experts": (4, 14, 10)}  # (..., in, out)
BASE = {"name": "m", "fingerprint": "f1", "quantization": "none", "template": "t1"}


def adapter(seed, rank=4, scale=2.0, modules=tuple(SHAPES), **more) -> Adapter:
    random = np.random.default_rng(seed)
    tensors = {}
    for path in modules:
        *experts, width, out = SHAPES[path]
        a = (*experts, rank, width) if experts else (width, rank)
        b = (*experts, out, rank) if experts else (rank, out)
        for leaf, shape in (("lora_a", a), ("lora_b", b)):
            tensors[f"{path}.{leaf}"] = mx.array(random.normal(size=shape).astype(np.float32))
    return Adapter("lora", tensors, rank, scale, **more)


def delta(one: Adapter, path: str) -> np.ndarray:
    """(..., out, in), in float64; zeros where the adapter lacks the module."""
    *experts, width, out = SHAPES[path]
    own = {leaf: np.array(x, np.float64) for leaf, x in one.tensors(path).items()}
    if not own:
        return np.zeros((*experts, out, width))
    product = own["lora_b"] @ own["lora_a"] if experts else (own["lora_a"] @ own["lora_b"]).T
    return one.scale * product


def weighted(adapters, weights, path) -> np.ndarray:
    return sum(w * delta(one, path) for one, w in zip(adapters, weights, strict=True))


def largest(difference, reference) -> float:
    return float(np.abs(difference).max() / np.abs(reference).max())


RANKS = [adapter(1), adapter(2, rank=2, scale=0.5), adapter(3, rank=6, modules=("a.linear",))]
ALIKE = [adapter(1), adapter(2, scale=0.5), adapter(3, modules=("a.linear", "b.experts"))]
WEIGHTS = [0.7, -0.4, 1.5]


def test_cat_is_the_weighted_sum_and_its_rank_the_sum_of_ranks():
    merged = merge(RANKS, WEIGHTS, "cat")
    assert (merged.rank, merged.scale) == (12, 1.0)
    for path in SHAPES:
        expected = weighted(RANKS, WEIGHTS, path)
        assert largest(delta(merged, path) - expected, expected) < 1e-6, path
    assert merged.provenance["merge"]["distance"] < 1e-6


def product(tensors):
    """What an adapter adds to a weight, or its transpose."""
    a, b = (np.array(tensors[name], np.float64) for name in ("lora_a", "lora_b"))
    return a @ b if a.ndim == 2 else b @ a


@pytest.mark.parametrize("method", ["linear", "cat", "ties", "dare"])
def test_a_lower_rank_keeps_the_best_of_what_a_method_makes(method):
    pair = [adapter(1), adapter(2)]
    whole, lower = merge(pair, [0.7, 0.3], method), merge(pair, [0.7, 0.3], method, rank=2)
    assert lower.rank == 2
    for path in lower.modules:
        made, kept = (product(one.tensors(path)) for one in (whole, lower))
        u, s, v = np.linalg.svd(made, full_matrices=False)
        best = (u[..., :2] * s[..., None, :2]) @ v[..., :2, :]
        assert np.allclose(kept, best, atol=1e-4 * s.max())


@pytest.mark.parametrize("rank", [None, 1, 3, 12])
def test_svd_is_the_best_of_its_rank(rank):
    merged = merge(RANKS, WEIGHTS, "svd", rank=rank)
    assert merged.rank == (rank or 6)
    rest = whole = 0.0
    for path in SHAPES:
        u, values, v = np.linalg.svd(weighted(RANKS, WEIGHTS, path), full_matrices=False)
        kept = merged.rank
        expected = u[..., :kept] * values[..., None, :kept] @ v[..., :kept, :]
        assert largest(delta(merged, path) - expected, expected) < 5e-6, path
        rest += (values[..., kept:] ** 2).sum()
        whole += (values**2).sum()
    distance = merged.provenance["merge"]["distance"]
    assert distance == pytest.approx((rest / whole) ** 0.5, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_the_distance_from_the_weighted_sum_is_the_dense_one(method):
    merged = merge(ALIKE, WEIGHTS, method)
    sums = {path: weighted(ALIKE, WEIGHTS, path) for path in SHAPES}
    rest = sum(((delta(merged, path) - one) ** 2).sum() for path, one in sums.items())
    whole = sum((one**2).sum() for one in sums.values())
    distance = merged.provenance["merge"]["distance"]
    assert distance == pytest.approx((rest / whole) ** 0.5, rel=1e-4, abs=1e-6)


def test_linear_adds_factors_with_the_roots_of_weights_and_the_sign_on_a():
    merged = merge(ALIKE, WEIGHTS, "linear")
    for path in SHAPES:
        for leaf, signed in (("lora_a", True), ("lora_b", False)):
            expected = 0.0
            for one, weight in zip(ALIKE, WEIGHTS, strict=True):
                if path in one.modules:
                    factor = weight * one.scale
                    root = np.sqrt(abs(factor)) * (np.sign(factor) if signed else 1)
                    expected = expected + root * np.array(one.tensors(path)[leaf], np.float64)
            ours = np.array(merged.tensors(path)[leaf])
            assert largest(ours - expected, expected) < 1e-6, (path, leaf)


@pytest.mark.parametrize("method", METHODS)
def test_a_missing_module_counts_as_zero(method):
    zeros = {
        f"a.narrow.{leaf}": mx.zeros_like(array)
        for leaf, array in ALIKE[0].tensors("a.narrow").items()
    }
    filled = Adapter("lora", {**ALIKE[2].weights, **zeros}, 4, 2.0)
    merged = merge(ALIKE, WEIGHTS, method, **({"density": 1.0} if method == "dare" else {}))
    same = merge(
        [*ALIKE[:2], filled], WEIGHTS, method, **({"density": 1.0} if method == "dare" else {})
    )
    assert set(merged.modules) == set(SHAPES)
    for path in SHAPES:
        assert largest(delta(merged, path) - delta(same, path), delta(same, path)) < 5e-6, path


def one_module(numbers_, other) -> list[Adapter]:
    """Two adapters of rank 1 over one module, whose B are 1."""
    return [
        Adapter("lora", {"x.lora_a": mx.array([row]).T, "x.lora_b": mx.ones((1, 1))}, 1, 1.0)
        for row in (numbers_, other)
    ]


def test_ties_keeps_the_largest_numbers_and_averages_those_of_the_elected_sign():
    pair = one_module([5.0, 1.0, -4.0, 3.0], [-2.0, 6.0, -7.0, 0.5])
    merged = merge(pair, [1.0, 1.0], "ties", density=0.5)
    # Kept are [5, 0, -4, 0] and [0, 6, -7, 0]; of B nothing (half of one number).
    assert merged.weights["x.lora_a"].flatten().tolist() == [5.0, 6.0, -5.5, 0.0]
    assert merged.weights["x.lora_b"].item() == 0.0
    merged = merge(pair, [1.0, 1.0], "ties", density=1.0)
    # 5 against -2, and 3 with 0.5: signs are elected by the sum.
    assert merged.weights["x.lora_a"].flatten().tolist() == [5.0, 3.5, -5.5, 1.75]
    assert merged.weights["x.lora_b"].item() == 1.0


def test_an_adapter_s_padding_is_no_part_of_the_density():
    """Directions that are zero in all of a module's adapters."""
    first, second = adapter(1, modules=("a.linear",)), adapter(2, modules=("a.linear",))

    def padded(one):
        a, b = one.tensors("a.linear").values()
        longer = {"a.linear.lora_a": mx.pad(a, [(0, 0), (0, 3)])}
        return Adapter("lora", {**longer, "a.linear.lora_b": mx.pad(b, [(0, 3), (0, 0)])}, 7, 2.0)

    plain = merge([first, second], None, "ties")
    longer = merge([padded(first), padded(second)], None, "ties")
    assert (plain.rank, longer.rank) == (4, 7)
    assert np.array_equal(delta(plain, "a.linear"), delta(longer, "a.linear"))


def test_dare_drops_by_its_seed_and_makes_the_rest_larger():
    def drawn(seed, density=0.5):
        return np.array(merge(one, [1.0], "dare", density=density, seed=seed).weights["x.lora_a"])

    one = [Adapter("lora", {"x.lora_a": mx.ones((4000, 2)), "x.lora_b": mx.ones((2, 3))}, 2, 1.0)]
    assert np.array_equal(drawn(1), drawn(1)) and not np.array_equal(drawn(1), drawn(2))
    assert set(drawn(1, 0.25).flatten()) == {0.0, 4.0}
    assert (drawn(1, 0.25) != 0).mean() == pytest.approx(0.25, abs=0.03)
    assert (drawn(1, 1.0) == 1.0).all()


def test_dare_drops_other_numbers_in_every_adapter_module_and_factor():
    ones = {f"{path}.{leaf}": mx.ones((40, 40)) for path in "xy" for leaf in ("lora_a", "lora_b")}
    pair = [Adapter("lora", ones, 40, 1.0)] * 2
    merged = merge(pair, [1.0, 1e-4], "dare", density=0.5)
    masks = [np.array(array) > 1 for array in merged.weights.values()]  # of the first adapter
    masks += [np.abs(np.array(x) % 2) > 0.01 for x in merged.weights.values()]  # of the second
    flat = [mask.flatten() for mask in masks]
    for number, mask in enumerate(flat):
        assert 0.4 < mask.mean() < 0.6
        for other in flat[:number]:
            assert 0.4 < (mask == other).mean() < 0.6


def test_parents_are_named_without_their_paths():
    names = ["runs/sql/adapter", "/secret/place/terse/", "adapter 3"]
    told = merge(ALIKE, names=names).provenance["merge"]
    assert [parent["name"] for parent in told["parents"]] == ["sql", "terse", "adapter 3"]
    assert "secret" not in json.dumps(told)


def test_weights_are_equal_shares_unless_told():
    merged = merge(ALIKE, None, "cat")
    expected = weighted(ALIKE, [1 / 3] * 3, "a.linear")
    assert largest(delta(merged, "a.linear") - expected, expected) < 1e-6
    assert [p["weight"] for p in merged.provenance["merge"]["parents"]] == [1 / 3] * 3


def trained(base, seed, **lora) -> Adapter:
    config = LoraConfig(rank=4, **lora)
    new_layers(base.model, config, seed)
    randomized(base.model, seed)
    found = collect(base.model, config, {"base": base.identity.to_dict()})
    detach(base.model)
    return found


def logits(base, one: Adapter) -> mx.array:
    attach(base, one)
    found = base.model(TOKENS)
    detach(base.model)
    return found


@pytest.mark.parametrize("method", ["linear", "cat", "svd"])
@pytest.mark.parametrize("name", ["dense", "quantized", "experts"])
@pytest.mark.parametrize("targets", [("all-linear",), ("q_proj", "embed_tokens")])
def test_shares_of_one_adapter_make_it_whole_again(method, name, targets, request, tmp_path):
    base = request.getfixturevalue(name)
    one = trained(base, 3, targets=targets)
    expected = logits(base, one)
    assert worst(expected, base.model(TOKENS)) > 1e-3
    merged = merge([one, one], [0.3, 0.7], "cat")
    if method == "linear":  # (sqrt 0.3 + sqrt 0.7)^2 times, by the products across
        factor = (0.3**0.5 + 0.7**0.5) ** 2
        merged = merge([one, one], [0.3 / factor, 0.7 / factor], method)
    elif method == "svd":
        merged = merge([one, one], [0.3, 0.7], method)
        assert merged.rank == one.rank
    assert worst(logits(base, merged), expected) < 1e-4
    merged.save(tmp_path / "merged")
    model, _ = mlx_lm_load(str(base.path), adapter_path=str(tmp_path / "merged"))
    assert worst(model(TOKENS), expected) < 1e-4


def test_the_same_adapters_and_seed_give_the_same_bytes(tmp_path):
    for method in METHODS:
        for name in "ab":
            merge(ALIKE, WEIGHTS, method).save(tmp_path / method / name)
        for file in ("adapters.safetensors", "adapter_config.json", "provenance.json"):
            one, other = ((tmp_path / method / name / file).read_bytes() for name in "ab")
            assert one == other, (method, file)


@pytest.mark.parametrize(
    "arguments, says",
    [
        ({"method": "sum"}, "no method 'sum' to merge by; there are linear, cat, svd, ties, dare"),
        ({"weights": [1.0, 2.0]}, r"3 adapters and 2 weights \(1 2\)"),
        ({"weights": [1.0, float("nan"), 0.0]}, "must be a finite number, but they are 1 nan 0"),
        ({"method": "linear", "density": 0.5}, "density means nothing to linear, but to ties and"),
        ({"method": "svd", "density": 0.5}, "density means nothing to svd, but to ties and dare"),
        ({"method": "ties", "seed": 0}, "seed means nothing to ties, but to dare"),
        ({"method": "ties", "density": 0.0}, "density must be above 0 and at most 1, not 0"),
        ({"method": "dare", "density": float("nan")}, "density must be above 0"),
        ({"method": "dare", "seed": -1}, "seed must be at least 0, not -1"),
        ({"method": "svd", "rank": 0}, "rank must be at least 1, not 0"),
        ({"method": "svd", "rank": 13}, "more than the adapters have together: 12"),
    ],
)
def test_options_that_cannot_be_are_named(arguments, says):
    with pytest.raises(ConfigError, match=says):
        merge(ALIKE, **arguments)


def test_modules_of_any_name_can_be_merged():
    names = ["layers.\N{SUPERSCRIPT TWO}", "layers." + "9" * 5000, "layers.10", "layers.9"]
    leaves = {"lora_a": mx.ones((3, 2)), "lora_b": mx.ones((2, 3))}
    weights = {f"{name}.{leaf}": array for name in names for leaf, array in leaves.items()}
    merged = merge([Adapter("lora", weights, 2, 1.0)])
    assert merged.modules[-2:] == ["layers.9", "layers.10"] and len(merged.modules) == 4


def test_nothing_to_merge_and_ranks_above_any_are_refused():
    with pytest.raises(ConfigError, match="no adapters"):
        merge([])
    wide = Adapter(
        "lora", {"x.lora_a": mx.zeros((1, 40000)), "x.lora_b": mx.zeros((40000, 1))}, 40000, 1.0
    )
    with pytest.raises(ConfigError, match=r"rank 80,000, above 65,536; --rank lowers it"):
        merge([wide, wide], None, "cat")


def with_magnitudes() -> Adapter:
    one = adapter(2)
    return Adapter("dora", {**one.weights, "a.linear.m": mx.ones((12,))}, 4, 2.0)


@pytest.mark.parametrize(
    "other, says",
    [
        (with_magnitudes(), r"B is DoRA, .*: a\.linear, a\.narrow, b\.experts\nFuse such"),
        (Adapter("full", {"norm.weight": mx.ones(3)}), "B replaces every weight of its base"),
        (
            Adapter("lora", {**adapter(2).weights, "lm_head.weight": mx.ones((3, 3))}, 4, 2.0),
            r"B holds weights that were trained whole: lm_head\.weight\nFuse such",
        ),
        (
            Adapter(
                "lora",
                {"a.linear.lora_a": mx.ones((5, 4)), "a.linear.lora_b": mx.ones((4, 12))},
                4,
                1.0,
            ),
            r"a\.linear: A is over weights \(12, 20\), B over \(12, 5\)",
        ),
        (
            Adapter(
                "lora",
                {"a.linear.lora_a": mx.ones((20, 3)), "a.linear.lora_b": mx.ones((4, 12))},
                4,
                1.0,
            ),
            r"a\.linear: \(20, 3\) and \(4, 12\) in B are no factors of its rank 4",
        ),
        (
            Adapter(
                "lora",
                {"a.linear.lora_a": mx.ones((20,)), "a.linear.lora_b": mx.ones((4, 12))},
                4,
                1.0,
            ),
            r"a\.linear: \(20,\) and \(4, 12\) in B are no factors of its rank 4",
        ),
    ],
)
def test_what_cannot_be_merged_is_named(other, says):
    with pytest.raises(AdapterError, match=says):
        merge([adapter(1), other], None, "cat", names=["A", "B"])


@pytest.mark.parametrize("method", [name for name, how in METHODS.items() if not how.any_ranks])
def test_ranks_that_differ_are_named_with_the_methods_that_allow_it(method):
    with pytest.raises(AdapterError, match=r"A has rank 4\n  B has rank 2\n.*; cat and svd do not"):
        merge([adapter(1), adapter(2, rank=2)], None, method, names=["A", "B"])


@pytest.mark.parametrize(
    "key, says",
    [
        ("fingerprint", "weights: A has f1, C has other"),
        ("quantization", "quantization: A has none, C has other"),
        ("template", "chat template: A has t1, C has other"),
    ],
)
def test_adapters_of_different_bases_are_refused_unless_forced(key, says):
    known = adapter(1, provenance={"base": BASE})
    three = [known, adapter(2), adapter(3, provenance={"base": {**BASE, key: "other"}})]
    with pytest.raises(AdapterError, match=f"{says}\nMerge adapters of one base, or pass --force"):
        merge(three, names=["A", "B", "C"])
    forced = merge(three, names=["A", "B", "C"], force=True)
    assert forced.provenance["base"] == BASE
    assert forced.provenance["merge"]["parents"][2]["base"][key] == "other"
    renamed = [known, adapter(2, provenance={"base": {**BASE, "name": "elsewhere"}})]
    assert merge(renamed).provenance["base"] == BASE


@pytest.mark.parametrize("method", METHODS)
def test_numbers_that_grow_too_large_are_refused(method):
    one = adapter(1, modules=("a.linear",))
    with pytest.raises(AdapterError, match=r"a\.linear: merged, its numbers are too large"):
        merge([one, one], [1e300, 1.0], method)


@pytest.fixture
def run(monkeypatch, capsys):
    """The program in this process: (exit code, stdout, stderr)."""

    def program(*words):
        monkeypatch.setattr(sys, "argv", ["mlxlora", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            main()
        said = capsys.readouterr()
        return ended.value.code or 0, said.out, said.err

    return program


@pytest.fixture
def saved(dense, tmp_path, monkeypatch):
    """Adapters A and B of the dense base, R of another rank, in the working directory."""
    told = {"data": {"format": "chat", "files": {"train": {"path": "rows.jsonl", "rows": 7}}}}
    for name, seed, rank in (("A", 3, 4), ("B", 4, 4), ("R", 5, 2)):
        config = LoraConfig(rank=rank)
        new_layers(dense.model, config, seed)
        randomized(dense.model, seed)
        provenance = {"base": dense.identity.to_dict(), **told}
        collect(dense.model, config, provenance).save(tmp_path / name)
    detach(dense.model)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_merged_adapter_tells_of_its_parents_and_fits_the_base(saved, dense_path, run):
    words = ["adapter", "merge", "A", "B", "--out", "C", "--weights", "0.7", "-0.3", "--json"]
    code, out, err = run(*words)
    assert code == 0, err
    result = json.loads(out)
    assert result["method"] == "svd" and result["weights"] == [0.7, -0.3] and result["rank"] == 4
    assert 0 < result["distance"] < 1 and f"{result['distance']:.1%} off the weighted sum" in err
    code, out, _ = run("adapter", "info", "C")
    for told in ("0.7 times A", "-0.3 times B", "merged by", "7 chat rows in rows.jsonl"):
        assert told in out
    provenance = Adapter.load("C").provenance
    assert {"mlx", "mlxlora"} <= provenance["versions"].keys()
    for name, parent in zip("AB", provenance["merge"]["parents"], strict=True):
        assert parent["weights_sha256"] == Adapter.load(name).provenance["weights_sha256"]
        assert parent["name"] == name
    assert "0.7 times A" in (saved / "C" / "README.md").read_text()
    code, out, err = run("adapter", "verify", "C", "--model", dense_path)
    assert code == 0 and "14 layers fit" in out and "fail" not in out, err


def test_an_adapter_without_provenance_is_known_by_its_hash(saved, run):
    (saved / "B" / "provenance.json").unlink()
    sha = Adapter.load("A").provenance["weights_sha256"]
    assert run("adapter", "merge", "A", "B", "--out", "C", "--method", "cat")[0] == 0
    parents = Adapter.load("C").provenance["merge"]["parents"]
    assert parents[0]["weights_sha256"] == sha and len(parents[1]["weights_sha256"]) == 64
    assert parents[1].keys() == {"name", "weight", "weights_sha256"}


@pytest.mark.parametrize(
    "words",
    [
        "A B --out C --weights 0.7 -0.3",
        "A B --out C --weights 0.7,-0.3",
        "A B --weights 0.7 --weights -0.3 --out C",
        "--weights 0.7 -0.3 --out C A B",
        "--weights=0.7 -0.3 A B --out C",
        "--out C --weights 0.7 -0.3 -- A B",
    ],
)
def test_weights_can_be_written_in_several_ways(words, saved, run):
    code, _, err = run("adapter", "merge", *words.split())
    assert code == 0, err
    assert [p["weight"] for p in Adapter.load("C").provenance["merge"]["parents"]] == [0.7, -0.3]


def test_only_numbers_directly_after_weights_are_weights():
    apart = ["--weights", "1", "--weights", "2", "x", "3"]
    assert spread(["--weights", "1", "2", "x", "3"]) == apart
    assert spread(["--weights", "1", "--", "2"]) == ["--weights", "1", "--", "2"]
    assert spread(["7", "--seed", "8"]) == ["7", "--seed", "8"]
    assert numbers("1e-3,-2,") == [1e-3, -2.0] and numbers("1;2") == numbers("") == []


@pytest.mark.parametrize(
    "words, says",
    [
        ("A B --out C --method sum", "no method 'sum' to merge by"),
        ("A B --out C --weights 1 2 3", "2 adapters and 3 weights (1 2 3)"),
        ("A B --out C --weights half", "--weights must be numbers, as in 0.7 0.3"),
        ("A B --out C --weights --method", "not '--method'"),
        ("A B --out C --weights 1 inf", "must be a finite number"),
        ("A R --out C --method ties", "R has rank 2"),
        ("A none --out C", "none is not an adapter directory"),
        ("A B --out A", "A exists already and is never overwritten"),
        ("A B --out C --density 0.5", "density means nothing to svd"),
        ("A B --out C --rank 0", "--rank"),
        ("A B", "--out"),
        ("--out C", "Missing argument"),
    ],
)
def test_wrong_input_is_one_message_and_writes_nothing(words, says, saved, run):
    code, _, err = run("adapter", "merge", *words.split())
    assert code == 2 and says in err and "Traceback" not in err
    assert sorted(path.name for path in saved.iterdir()) == ["A", "B", "R"]


def test_the_program_refuses_other_bases_and_dora_and_force_goes_on(saved, dense, run):
    record = json.loads((saved / "B" / "provenance.json").read_text())
    record["base"]["fingerprint"] = "0" * 64
    (saved / "B" / "provenance.json").write_text(json.dumps(record))
    words = ["adapter", "merge", "A", "B", "--out", "C"]
    code, _, err = run(*words)
    assert code == 2 and "different bases:\n  weights: A has" in err and "B has 000" in err
    assert run(*words, "--force")[0] == 0
    config = LoraConfig(rank=4, method="dora")
    new_layers(dense.model, config, 0)
    collect(dense.model, config, {}).save(saved / "D")
    detach(dense.model)
    code, _, err = run("adapter", "merge", "A", "D", "--out", "E")
    assert code == 2 and "D is DoRA" in err and "mlxlora fuse" in err and "0.mlp.down_proj, " in err
    assert not (saved / "E").exists()


def test_help_names_exactly_the_methods_and_their_densities(run, monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")
    code, out, _ = run("adapter", "merge", "--help")
    assert code == 0 and "|".join(METHODS) in out
    for name, method in METHODS.items():
        if "density" in method.takes:
            assert f"{name} {method.density}" in out


@pytest.mark.parametrize(
    "told, says",
    [
        ([], "merge must be an object"),
        ({"parents": {}}, "merge.parents must be a list"),
        ({"parents": [None, 3]}, "merge.parents.2 must be an object"),
        ({"parents": [{"weight": "x"}]}, "merge.parents.1.weight is 'x'"),
        ({"parents": [{"base": {"name": 3}}]}, "merge.parents.1.base.name is '3'"),
    ],
)
def test_a_damaged_record_of_parents_is_named(told, says, tmp_path):
    adapter(1).save(tmp_path / "a")
    (tmp_path / "a" / "provenance.json").write_text(json.dumps({"merge": told}))
    with pytest.raises(AdapterError, match=says):
        Adapter.load(tmp_path / "a")


def test_a_record_with_nothing_in_it_can_be_said(tmp_path):
    adapter(1, provenance={"merge": {"parents": [None, {}]}}).save(tmp_path / "a")
    assert ("parent 2", "an adapter") in facts(Adapter.load(tmp_path / "a"))
