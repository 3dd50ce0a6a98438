import pytest

from mlxlora.bench.memory import SETTINGS, measure


def test_the_grid_has_both_kinds_of_base_and_of_rows():
    assert len(SETTINGS) >= 24
    assert {setting.family for setting in SETTINGS.values()} == {"llama", "qwen3"}
    assert {setting.bits for setting in SETTINGS.values()} == {0, 4}
    assert {setting.rows for setting in SETTINGS.values()} == {"short", "mixed", "long"}
    words = [setting.words for setting in SETTINGS.values()]
    assert min(words) < 4096 and max(words) > 100_000


@pytest.mark.slow
@pytest.mark.parametrize("name", ["small words, mixed rows", "small words, long rows, recomputed"])
def test_the_peak_of_a_run_is_foretold_within_15_percent(name):
    assert 0.85 <= measure(name).ratio <= 1.15
