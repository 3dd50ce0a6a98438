import pytest
from test_probe import ROWS, ready

from mlxlora.config import RunConfig, TrainConfig
from mlxlora.errors import ConfigError
from mlxlora.train.fitting import ROUGHLY, Fitter, held_by, largest_update, updates_of
from mlxlora.train.forecast import refuse_what_cannot_fit
from mlxlora.train.forward import Forward
from mlxlora.train.probe import Need


@pytest.fixture(scope="module")
def fitter():
    model = ready("llama")
    return Fitter(model, Forward(model), TrainConfig(batch_size=4), ROWS, longest=200)


def test_where_there_is_room_nothing_is_probed(fitter):
    cut = fitter.choose(1 << 40)
    assert cut.need is None and cut.tokens == 2048 and not cut.checkpoint_blocks


def test_a_smaller_budget_gives_smaller_micro_batches_and_then_recomputed_blocks(
    fitter, monkeypatch
):
    def need(prober, sizes, layout, checkpoint):
        tokens = min(layout.tokens, 500)
        return Need(tokens, (100 if checkpoint else 1000) * tokens, 5000, 0, 1.0, 0.0)

    monkeypatch.setattr("mlxlora.train.probe.Prober.__call__", need)
    monkeypatch.setattr(fitter, "_needs", {})
    held = fitter.held.bytes + 5000
    plain = fitter.choose(held + 1000 * 500)
    assert (plain.tokens, plain.checkpoint_blocks) == (2048, False)
    tight = fitter.choose(held + 1000 * 400)
    assert tight.tokens < 2048 and not tight.checkpoint_blocks
    assert fitter.peak(tight.tokens, False) <= held + 1000 * 400
    again = fitter.choose(held + 1000 * 150)
    assert again.checkpoint_blocks and again.tokens == 2048
    least = fitter.choose(0)
    assert least.checkpoint_blocks and least.tokens == 200


def test_what_is_held_is_counted_to_the_byte(fitter):
    model = fitter.model
    trained = sum(a.nbytes for layer in model.layers for a in _lora(layer))
    held = held_by(model, TrainConfig())
    # Weights, their sums of gradients, those before the last update, and two moments.
    assert held.adapter == pytest.approx(5 * trained, abs=100)
    assert held_by(model, TrainConfig(), first=True).adapter - held.adapter == trained


def _lora(layer):
    from mlx.utils import tree_flatten

    return [a for name, a in tree_flatten(layer.trainable_parameters()) if "lora" in name]


def test_the_largest_micro_batch_is_found_in_the_run_s_own_order(fitter):
    sizes = [(10, 5)] * 30 + [(190, 100)]
    train = TrainConfig(batch_size=2, epochs=1.0)
    rows = largest_update(sizes, train, fitter.layout(2048))
    assert (190, 100) in rows
    assert len(list(updates_of(sizes, train))) == 16
    assert len(list(updates_of(sizes, TrainConfig(batch_size=2, updates=40)))) == 40


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_run_that_no_cut_makes_fit_is_refused_before_the_weights_are_loaded(
    dense_path, rows, tmp_path, monkeypatch, method
):
    monkeypatch.setattr("mlxlora.train.forecast.memory_budget", lambda: 1_000_000)
    monkeypatch.setattr("mlxlora.train.forecast.offered_memory", lambda: 1_200_000)
    monkeypatch.setattr("mlxlora.train.forecast.cache_limit", lambda budget: 0)
    places = [f"model='{dense_path}'", f"data.path='{rows}'", f"out='{tmp_path / 'run'}'"]
    run = RunConfig.load(None, [*places, f"lora.method={method}"])
    with pytest.raises(ConfigError, match="cannot fit: it needs about") as caught:
        refuse_what_cannot_fit(run)
    assert "this machine offers 1 MB" in str(caught.value)
    assert "saves" in str(caught.value)
    monkeypatch.setattr("mlxlora.train.forecast.offered_memory", lambda: 1000)
    with pytest.raises(ConfigError, match=r"alone take (.|\n)*At 4 bits they take about"):
        refuse_what_cannot_fit(run)  # without a probe


def test_a_run_that_might_fit_is_let_through(dense_path, rows, tmp_path, monkeypatch):
    monkeypatch.setattr("mlxlora.train.forecast.memory_budget", lambda: 1_000_000)
    places = [f"model='{dense_path}'", f"data.path='{rows}'", f"out='{tmp_path / 'run'}'"]
    refuse_what_cannot_fit(RunConfig.load(None, places))  # the machine itself offers more


def test_a_rough_count_is_more_than_what_is_needed(fitter):
    need = fitter.need(2048, False)
    bound = fitter.bound(fitter.cut(2048, False))
    assert ROUGHLY >= 2 and bound > fitter.held.bytes + need.bytes
