import json
import math
import threading
from threading import Event as Flag

import mlx.core as mx
import pytest
from conftest import write_rows
from mlx.utils import tree_flatten

from mlxlora.config import RunConfig
from mlxlora.data.batches import permutation
from mlxlora.data.layout import MAX_SHAPES
from mlxlora.errors import ConfigError, DataError, ExportError, TrainError
from mlxlora.lora.adapter import Adapter
from mlxlora.train import loop
from mlxlora.train.events import Done, Eval, Sample, Saved, Skipped, Start, Step, to_json

GOOD = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
REFUSED = {"messages": [{"role": "nobody", "content": "a"}, *GOOD["messages"][1:]]}
STRICT = "{% for m in messages if m.role == 'nobody' %}{{ raise_exception('who?') }}{% endfor %}"


def config(base, rows, out, *overrides) -> RunConfig:
    given = [f"model={base.path}", f"data.path={rows}", f"out={out}", "lora.rank=4"]
    given += ["train.learning_rate=5e-3", "train.epochs=3", "train.batch_size=4"]
    return RunConfig.load(None, [*given, *overrides])


def run(base, rows, out, *overrides, stop=None) -> list:
    return list(loop.train(config(base, rows, out, *overrides), base, stop=stop))


def of(kind, events):
    return [event for event in events if isinstance(event, kind)]


def test_a_run_learns_keeps_the_best_and_leaves_the_base_as_it_was(dense, rows, tmp_path):
    before = dict(tree_flatten(dense.model.parameters()))
    events = run(dense, rows, tmp_path / "run")
    after = dict(tree_flatten(dense.model.parameters()))
    assert before.keys() == after.keys()
    assert all(mx.array_equal(before[k], after[k]) for k in before)
    start, done = events[0], events[-1]
    assert isinstance(start, Start) and isinstance(done, Done)
    assert (start.rows, start.valid_rows, start.updates) == (40, 8, 30)
    assert [step.update for step in of(Step, events)] == list(range(1, 31))
    evals = of(Eval, events)
    assert evals[0].update == 0
    assert evals[-1].loss < evals[0].loss - 0.5
    best = min((e.loss, e.update) for e in evals[1:])
    assert (done.valid_loss, done.best_update) == best
    adapter = Adapter.load(done.adapter)
    assert adapter.provenance["metrics"]["update"] == best[1]
    assert adapter.provenance["base"] == {**dense.identity.to_dict(), "name": "dense"}
    assert adapter.format == "completion"


def test_the_log_has_every_event_and_the_config_reads_back(dense, rows, tmp_path):
    events = run(dense, rows, tmp_path / "run", "train.updates=5")
    lines = (tmp_path / "run" / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["event"] for line in lines] == [
        type(event).__name__.lower() for event in events
    ]
    assert json.loads(lines[2])["update"] == 1
    assert RunConfig.load(tmp_path / "run" / "run.toml") == config(
        dense, rows, tmp_path / "run", "train.updates=5"
    )


def test_the_same_run_twice_gives_the_same_bytes(dense, rows, tmp_path):
    for name in "ab":
        run(dense, rows, tmp_path / name, "lora.dropout=0.2", "train.updates=7")
    files = [(tmp_path / name / "adapter" / "adapters.safetensors").read_bytes() for name in "ab"]
    assert files[0] == files[1]


def test_micro_batches_do_not_change_the_run(dense, rows, tmp_path):
    losses = []
    for number, tokens in enumerate((16, 10_000)):
        overrides = ["train.updates=5", f"train.tokens_per_microbatch={tokens}"]
        events = run(dense, rows, tmp_path / str(number), *overrides)
        losses.append([step.loss for step in of(Step, events)])
        assert len(events[0].shapes) <= MAX_SHAPES
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_early_stopping_counts_validations_that_are_no_better(dense, rows, tmp_path):
    overrides = ["eval.patience=2", "eval.every=1", "train.optimizer=sgd"]
    events = run(dense, rows, tmp_path / "run", *overrides, "train.learning_rate=1e-30")
    assert (events[-1].reason, events[-1].update, events[-1].best_update) == ("early stop", 3, 1)


def test_stopping_saves_and_says_where(dense, rows, tmp_path):
    stop = threading.Event()
    events = []
    overrides = ["eval.every=2"]
    for event in loop.train(config(dense, rows, tmp_path / "run", *overrides), dense, stop=stop):
        events.append(event)
        if isinstance(event, Step) and event.update == 3:
            stop.set()
    assert events[-1].reason == "interrupted" and events[-1].update == 3
    saved = of(Saved, events)
    assert [(s.update, s.why) for s in saved] == [
        (2, "best"),
        (2, "checkpoint"),
        (3, "checkpoint"),
        (3, "interrupted"),
    ]
    assert Adapter.load(saved[-1].path).provenance["metrics"]["update"] == 3


def test_without_validation_rows_the_last_weights_are_kept(dense, rows, tmp_path):
    (rows / "valid.jsonl").unlink()
    events = run(dense, rows, tmp_path / "run", "train.updates=4")
    assert not of(Eval, events)
    assert Adapter.load(events[-1].adapter).provenance["metrics"]["update"] == 4


def test_prompts_are_answered_before_training_and_at_each_validation(dense, rows, tmp_path):
    overrides = ['eval.prompts=["apple 1"]', "eval.max_tokens=4", "train.updates=2", "eval.every=1"]
    samples = of(Sample, run(dense, rows, tmp_path / "run", *overrides))
    assert [(s.update, s.prompt) for s in samples] == [(n, "apple 1") for n in (0, 1, 2)]


def poisoned(base, rows, out, at: int, *overrides) -> list:
    """The events of a run whose base turns infinite after an update, as an overflow would."""
    events = []
    for event in loop.train(config(base, rows, out, *overrides), base):
        events.append(event)
        if isinstance(event, Step) and event.update == at:
            layer = base.model.layers[0].input_layernorm
            layer.weight = layer.weight * float("inf")
    return events


def test_losses_that_are_no_number_in_a_row_stop_with_the_last_good_weights(dense, rows, tmp_path):
    with pytest.raises(TrainError) as error:
        poisoned(dense, rows, tmp_path / "run", 2, "save.every=1")
    text = str(error.value)
    assert "update 5: the loss is" in text
    assert "train.jsonl:" in text
    adapter = Adapter.load(tmp_path / "run" / "adapter")
    # Update 2 itself is in doubt: nothing was computed with its weights.
    assert adapter.provenance["metrics"]["update"] == 1
    assert all(mx.isfinite(array).all() for array in adapter.weights.values())
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    skipped = [line for line in lines if line["event"] == "skipped"]
    assert [line["update"] for line in skipped] == [3, 4, 5]
    assert all(len(line["rows"]) == 4 and "train.jsonl:" in line["rows"][0] for line in skipped)


def test_an_update_that_is_no_number_is_skipped_and_training_goes_on(dense, rows, tmp_path):
    """The same run with update 3 poisoned ends as if its rows had not been there."""
    events = []
    settings = config(dense, rows, tmp_path / "run", "train.updates=6", "eval.every=6")
    layer = dense.model.layers[0].input_layernorm
    weight = layer.weight
    for event in loop.train(settings, dense):
        events.append(event)
        if isinstance(event, Step):
            layer.weight = weight * float("inf") if event.update == 2 else weight
    assert [e.update for e in of(Skipped, events)] == [3]
    losses = [e.loss for e in of(Step, events)]
    assert math.isnan(losses[2]) and all(math.isfinite(x) for x in losses[:2] + losses[3:])
    assert events[-1].reason == "finished"
    assert events[-1].valid_loss < events[-1].valid_loss_before


def test_full_training_saves_every_weight_and_restores_the_base(dense, rows, tmp_path):
    before = dict(tree_flatten(dense.model.parameters()))
    overrides = ["lora.method=full", "lora.rank=16", "train.learning_rate=1e-3", "train.updates=6"]
    events = run(dense, rows, tmp_path / "run", *overrides)
    after = dict(tree_flatten(dense.model.parameters()))
    assert all(mx.array_equal(before[k], after[k]) for k in before)
    adapter = Adapter.load(events[-1].adapter)
    assert adapter.weights.keys() == before.keys()
    assert events[-1].valid_loss < events[-1].valid_loss_before


def test_what_cannot_start_is_refused_before_anything_is_written(dense, quantized, rows, tmp_path):
    out = tmp_path / "run"
    for base, error, says, overrides in (
        (dense, ConfigError, "not given: data.path", ["data.path=''"]),
        (
            dense,
            ConfigError,
            "knows no weight_decay",
            ["train.optimizer=adam", "train.weight_decay=0.1"],
        ),
        (dense, ConfigError, "matches no module", ["lora.targets=['w']"]),
        (quantized, ConfigError, "cannot train quantized", ["lora.method=full", "lora.rank=16"]),
        (dense, ConfigError, "lora.rank: without meaning", ["lora.method=full"]),
        (dense, DataError, "no data at", ["data.path=/nowhere.jsonl"]),
    ):
        with pytest.raises(error, match=says):
            run(base, rows, out, *overrides)
        assert not out.exists()
    out.mkdir()
    (out / "mine").write_text("")
    with pytest.raises(ExportError, match="never overwritten"):
        run(dense, rows, out)


def test_rows_the_template_refuses_stop_the_run_or_are_skipped(dense, tmp_path):
    dense.tokenizer.chat_template = STRICT + dense.tokenizer.chat_template
    path = write_rows(tmp_path / "train.jsonl", [GOOD, GOOD, REFUSED, GOOD])
    with pytest.raises(DataError, match=r"train\.jsonl:3: the chat template refuses .*who\?"):
        run(dense, tmp_path, tmp_path / "run")
    events = run(dense, tmp_path, tmp_path / "run", "data.on_bad_row=skip")
    assert events[-1].dropped_rows == 1
    assert path.exists()


def test_a_row_refused_in_mid_run_keeps_what_was_learned(dense, tmp_path, monkeypatch):
    monkeypatch.setattr("mlxlora.data.batches.SAMPLE_ROWS", 2)  # the first and the last
    dense.tokenizer.chat_template = STRICT + dense.tokenizer.chat_template
    place = next(n for n, row in enumerate(permutation(40, 0, 0)) if 0 < row < 39 and n > 20)
    rows = [GOOD] * 40
    rows[permutation(40, 0, 0)[place]] = REFUSED
    write_rows(tmp_path / "train.jsonl", rows)
    with pytest.raises(DataError, match=r"What was learned before it is in .*adapter"):
        run(dense, tmp_path, tmp_path / "run")
    adapter = Adapter.load(tmp_path / "run" / "adapter")
    assert adapter.provenance["metrics"]["update"] == place // 4


def test_a_validation_row_refused_in_mid_run_keeps_what_was_learned(dense, tmp_path, monkeypatch):
    monkeypatch.setattr("mlxlora.data.batches.SAMPLE_ROWS", 2)  # the first and the last
    monkeypatch.setattr("mlxlora.train.session.QUICK_ROWS", 0)  # none measured before training
    dense.tokenizer.chat_template = STRICT + dense.tokenizer.chat_template
    write_rows(tmp_path / "train.jsonl", [GOOD] * 20)
    write_rows(tmp_path / "valid.jsonl", [GOOD, GOOD, REFUSED, GOOD])
    with pytest.raises(DataError, match=r"valid\.jsonl:3: (.|\n)*What was learned before it is in"):
        run(dense, tmp_path, tmp_path / "run", "eval.every=3")
    adapter = Adapter.load(tmp_path / "run" / "adapter")
    assert adapter.provenance["metrics"]["update"] == 3
    assert any(mx.abs(v).max() > 0 for k, v in adapter.weights.items() if k.endswith("lora_b"))


def test_rows_that_a_run_does_not_need_are_not_read(dense, tmp_path, monkeypatch):
    monkeypatch.setattr("mlxlora.data.batches.SAMPLE_ROWS", 2)
    dense.tokenizer.chat_template = STRICT + dense.tokenizer.chat_template
    place = next(n for n, row in enumerate(permutation(40, 0, 0)) if 0 < row < 39 and n >= 8)
    rows = [GOOD] * 40
    rows[permutation(40, 0, 0)[place]] = REFUSED
    write_rows(tmp_path / "train.jsonl", rows)
    events = run(dense, tmp_path, tmp_path / "run", f"train.updates={place // 4}")
    assert events[-1].reason == "finished" and events[-1].update == place // 4


@pytest.mark.parametrize("override", ["train.packing=false", "train.checkpoint_blocks=true"])
def test_ways_to_compute_change_nothing_but_rounding(dense, rows, tmp_path, override):
    plain = run(dense, rows, tmp_path / "plain", "train.updates=4")
    other = run(dense, rows, tmp_path / "other", "train.updates=4", override)
    assert (other[0].packed, other[0].checkpoint_blocks) == (
        "packing" not in override,
        "checkpoint" in override,
    )
    losses = [[step.loss for step in of(Step, events)] for events in (plain, other)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_packing_that_cannot_be_honoured_is_refused(dense, rows, tmp_path, monkeypatch):
    monkeypatch.setattr("mlxlora.train.forward.can_pack", lambda *_: False)
    with pytest.raises(ConfigError, match=r"train\.packing = true"):
        run(dense, rows, tmp_path / "run", "train.packing=true")


def test_a_row_that_would_not_fit_has_its_blocks_computed_again(dense, rows, tmp_path, monkeypatch):
    monkeypatch.setattr("mlxlora.train.ways.memory_budget", lambda: 0)
    start = run(dense, rows, tmp_path / "run", "train.updates=1")[0]
    assert start.checkpoint_blocks and start.tokens_per_microbatch < 64


def test_a_run_that_fails_before_it_learned_leaves_no_directory(dense, rows, tmp_path, monkeypatch):
    def broken(self):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("mlxlora.train.session.Session._start", broken)
    with pytest.raises(OSError):
        run(dense, rows, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_options_that_the_rows_cannot_honour_are_refused(dense, tmp_path):
    write_rows(tmp_path / "train.jsonl", [{"text": "abc"}] * 4)
    for override, says in (
        ("data.mask=completion", "rows of {'text'} have none"),
        ("eval.patience=2", "needs validation rows"),
    ):
        with pytest.raises(ConfigError, match=says):
            run(dense, tmp_path, tmp_path / "run", override)


def test_an_interrupted_run_says_where_the_last_and_the_best_are(dense, rows, tmp_path):
    stop = Flag()
    events = []
    settings = config(dense, rows, tmp_path / "run", "eval.every=4")
    for event in loop.train(settings, dense, stop=stop):
        events.append(event)
        if isinstance(event, Step) and event.update == 6:
            stop.set()
    done = events[-1]
    assert done.reason == "interrupted" and done.best_update == 4
    assert Adapter.load(done.adapter).provenance["metrics"]["update"] == 4
    assert Adapter.load(done.last).provenance["metrics"]["update"] == done.update


def test_the_log_is_json_even_where_a_figure_is_no_number():
    step = Step(1, 0.1, math.nan, 0, 1e-4, math.inf, 0.1, 5)
    assert json.loads(to_json(step))["loss"] is None
    assert json.loads(to_json(step))["grad_norm"] is None


@pytest.mark.parametrize("method", ["lora", "full"])
def test_many_validation_rows_are_measured_later_with_the_same_result(
    dense, rows, tmp_path, monkeypatch, method
):
    settings = [f"lora.method={method}", "lora.rank=16", "eval.every=3", "train.updates=6"]
    at_once = run(dense, rows, tmp_path / "a", *settings)
    monkeypatch.setattr("mlxlora.train.session.QUICK_ROWS", 0)
    later = run(dense, rows, tmp_path / "b", *settings)
    assert [type(e) for e in at_once[:3]] == [Start, Eval, Step]
    assert [type(e) for e in later[:6]] == [Start, Step, Step, Step, Eval, Eval]
    losses = [[(e.update, e.loss) for e in of(Eval, events)] for events in (at_once, later)]
    assert losses[0] == losses[1]
    assert [e.loss for e in of(Step, at_once)] == [e.loss for e in of(Step, later)]
    assert later[-1].valid_loss_before == at_once[-1].valid_loss_before
