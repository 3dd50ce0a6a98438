"""Better is said only when it is: verdicts, and results by row."""

import gzip
import json

import numpy as np
import pytest
from conftest import randomized, write_rows
from typer.testing import CliRunner

from mlxlora.cli import app
from mlxlora.config import DataConfig, LoraConfig, RunConfig
from mlxlora.data.records import open_file
from mlxlora.errors import ConfigError, DataError, ExportError
from mlxlora.evaluation.answers import Answer
from mlxlora.evaluation.evaluate import evaluate
from mlxlora.evaluation.losses import Losses
from mlxlora.evaluation.results import Result, compare, estimated
from mlxlora.evaluation.rows import check_place, lines_of, trained_on, worst_rows
from mlxlora.evaluation.rows import write_rows as write_results
from mlxlora.lora.adapter import Adapter
from mlxlora.lora.attach import detach
from mlxlora.lora.fresh import collect, new_layers
from mlxlora.train.loop import train


def result(name: str, losses: np.ndarray, scores: np.ndarray | None = None) -> Result:
    """A model of which every row has one token of these losses."""
    count = len(losses)
    found = Losses(losses.sum(), np.arange(count), losses, np.ones(count, np.int64))
    given = tuple(
        Answer("p", "w", "g", row, {"m": score})
        for row, score in enumerate([] if scores is None else scores)
    )
    interval, metrics = estimated(found, given)
    return Result(name, found.mean, 1.0, count, count, None, given, interval, metrics, found)


def test_a_small_gain_on_every_row_is_better_and_its_mirror_worse():
    losses = np.random.default_rng(0).gamma(2, 1, 60)
    loss, reverse = (
        compare([result("b", losses), result("a", losses - 0.01)])[0],
        compare([result("a", losses - 0.01), result("b", losses)])[0],
    )
    assert (loss.a, loss.b, loss.verdict) == ("a", "b", "better")
    assert loss.difference == pytest.approx(-0.01)
    assert reverse.verdict == "worse"


def test_noise_shows_no_difference_and_neither_do_few_rows():
    random = np.random.default_rng(1)
    losses = random.gamma(2, 1, 60)
    noisy = losses + random.normal(0, 0.2, 60)
    noisy -= (noisy - losses).mean() + 0.01
    assert compare([result("b", losses), result("a", noisy)])[0].verdict == "no difference shown"
    few = compare([result("b", losses[:9]), result("a", losses[:9] - 1)])[0]
    assert few.verdict == "no difference shown"


def test_a_higher_score_is_better_and_no_number_is_neither():
    losses = np.full(40, np.nan)
    low, high = np.zeros(40), np.repeat([0.0, 1.0], 20)
    found = compare([result("b", losses, low), result("a", losses, high)])
    assert [(one.metric, one.verdict) for one in found] == [
        ("loss", "no difference shown"),
        ("m", "better"),
    ]


@pytest.fixture
def adapter(dense):
    new_layers(dense.model, LoraConfig(rank=2), 0)
    randomized(dense.model)
    made = collect(dense.model, LoraConfig(rank=2), {})
    detach(dense.model)
    return made


@pytest.mark.parametrize("tokens", [24, 4096])
def test_losses_by_row_are_those_of_each_row_alone(dense, rows, tmp_path, tokens, monkeypatch):
    monkeypatch.setattr("mlxlora.evaluation.evaluate.token_budget", lambda: tokens)
    path = rows / "valid.jsonl"
    found = next(evaluate(dense, DataConfig(path=str(path))))
    assert found.losses is not None
    assert found.losses.sums.sum() == pytest.approx(found.losses.total, rel=1e-6)
    for row, line in enumerate(path.read_text().splitlines()):
        alone = write_rows(tmp_path / f"{row}.jsonl", [json.loads(line)])
        single = next(evaluate(dense, DataConfig(path=str(alone))))
        assert found.losses.find(row) == pytest.approx((single.loss, single.tokens), rel=1e-5)
    assert found.losses.find(99) is None


def test_rows_are_written_with_place_and_every_models_answer(dense, adapter, tmp_path):
    path = tmp_path / "rows.jsonl"
    lines = [{"prompt": f"say {n}", "completion": "x" * (n + 1)} for n in range(3)]
    path.write_text(
        json.dumps(lines[0]) + "\n\n" + "".join(json.dumps(x) + "\n" for x in lines[1:])
    )
    data = DataConfig(path=str(path))
    options = {"with_base": True, "metrics": ["contains", "json"], "max_tokens": 4}
    results = list(evaluate(dense, data, [("a", adapter)], **options))
    taken = open_file(path, data)
    write_results(tmp_path / "out.jsonl", taken, results)
    written = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [one["row"] for one in written] == [f"{path}:{n}" for n in (1, 3, 4)]
    assert [one["row"] for one in written] == [taken.where(record) for record in taken]
    assert [(one["prompt"], one["wanted"]) for one in written] == [
        (row["prompt"], row["completion"]) for row in lines
    ]
    for row, one in enumerate(written):
        assert list(one["models"]) == ["base", "a"]
        for model in results:
            told = one["models"][model.name]
            assert told["answer"] == model.answers[row].got
            assert told["metrics"] == model.answers[row].scores
            assert (told["loss"], told["tokens"]) == model.losses.find(row)


def test_lines_are_those_that_messages_name_however_long_the_file_is(tmp_path):
    path = tmp_path / "long.jsonl.gz"
    text = "".join(
        json.dumps({"text": "x" * (n * 137 % 900)}) + "\n" * (1 + n % 3) for n in range(4000)
    )
    path.write_bytes(gzip.compress(text.encode()))
    taken = open_file(path, DataConfig(path=str(path)))
    assert taken.file.offsets[-1] > 1 << 20
    lines = lines_of(taken.file)
    assert all(taken.file.where(row) == f"{path}:{lines[row]}" for row in range(0, 4000, 57))


def test_an_adapter_that_was_trained_on_the_file_is_known(dense_path, dense, rows, tmp_path):
    options = [f"model={dense_path}", f"data.path={rows}", f"out={tmp_path / 'r'}"]
    list(train(RunConfig.load(None, [*options, "train.updates=1"]), dense))
    made = Adapter.load(tmp_path / "r" / "adapter")
    seen, unseen = (open_file(rows / f"{name}.jsonl", DataConfig()) for name in ("train", "valid"))
    assert trained_on(made, seen)
    assert not trained_on(made, unseen)


def test_the_worst_rows_score_least_and_then_lose_most(dense, tmp_path):
    path = write_rows(tmp_path / "r.jsonl", [{"prompt": "p", "completion": "w"}] * 12)
    taken = open_file(path, DataConfig(path=str(path)))
    scores = np.ones(12)
    scores[[3, 5, 7]] = 0
    losses = np.arange(12.0)
    by_metric = worst_rows(taken, [one := result("a", losses, scores)], one, 5)
    assert [bad.where.rpartition(":")[2] for bad in by_metric] == ["8", "6", "4"]
    by_loss = worst_rows(taken, [one := result("a", losses)], one, 2)
    assert [bad.where.rpartition(":")[2] for bad in by_loss] == ["12", "11"]


def test_a_function_that_fails_names_the_row(dense, tmp_path):
    code = tmp_path / "mine.py"
    code.write_text("def f(prompt, wanted, got):\n    return 1 / (prompt != 'b')\n")
    rows = [{"prompt": name, "completion": "x"} for name in "abc"]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    with pytest.raises(DataError, match=r"rows\.jsonl:2: .*f\(\) raised ZeroDivisionError"):
        data = DataConfig(path=str(path))
        list(evaluate(dense, data, metrics=[f"python:{code}:f"], max_tokens=2))


def test_an_adapter_cannot_be_named_like_the_base(dense, adapter, rows):
    with pytest.raises(ConfigError, match="named 'base' like the base"):
        next(evaluate(dense, DataConfig(path=str(rows)), [("base", adapter)], with_base=True))


def test_only_an_earlier_result_is_written_over(tmp_path):
    place = tmp_path / "precious.jsonl"
    write_rows(place, [{"prompt": "p", "completion": "c"}])
    with pytest.raises(ExportError, match="no earlier result"):
        check_place(place, "models")
    write_rows(place, [{"row": "x:1", "models": {}}])
    check_place(place, "models")
    check_place(tmp_path / "new.json", "results")


def test_the_verb_saves_what_it_prints(dense_path, rows, tmp_path, dense, adapter):
    adapter.save(tmp_path / "a")
    named = ["--adapter", f"one={tmp_path / 'a'}", "--adapter", f"two={tmp_path / 'a'}"]
    words = ["eval", "--model", str(dense_path), "--data", str(rows / "train.jsonl"), *named]
    words += ["--with-base", "--force", "--metric", "json", "--generate", "--max-tokens", "3"]
    words += ["--save", str(tmp_path / "s.json"), "--rows-out", str(tmp_path / "r.jsonl")]
    ran = CliRunner().invoke(app, [*words, "--json"])
    assert ran.exit_code == 0, (ran.output, ran.exception)
    printed = json.loads(ran.stdout.splitlines()[-1])
    assert printed == json.loads((tmp_path / "s.json").read_text())
    base, one, two = printed["results"]
    assert [base["name"], one["name"], two["name"]] == ["base", "one", "two"]
    assert one["exact_match"] == one["metrics"]["exact"]["value"]
    low, high = one["loss_interval"]
    assert low < one["loss"] < high
    same = [c for c in printed["comparisons"] if (c["a"], c["b"]) == ("two", "one")]
    assert [c["metric"] for c in same] == ["loss", "exact", "json"]
    assert all(c["difference"] == 0 and c["verdict"] == "no difference shown" for c in same)
    assert len((tmp_path / "r.jsonl").read_text().splitlines()) == 40
    assert CliRunner().invoke(app, [*words, "--worst", "1"]).exit_code == 0  # over its own
