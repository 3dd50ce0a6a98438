"""A run that was cut off goes on as if nothing had happened: bytes, log and best are the same."""

import json
import random
import shutil
from pathlib import Path

import mlx.core as mx
import pytest
from conftest import write_rows
from test_loop import config, of
from test_loop import run as trained

from mlxlora.errors import CheckpointError, TrainError
from mlxlora.lora.adapter import Adapter
from mlxlora.train import loop
from mlxlora.train.checkpoint import ARRAYS, HASHES, PROGRESS
from mlxlora.train.events import Done, Resumed, Step
from mlxlora.train.places import checkpoints_in
from mlxlora.train.session import Session

EVERY = ("save.every=3", "eval.every=5")


class Killed(BaseException):
    """Raised by whoever reads the events; the generator only closes its files after that."""


def cut_off(base, rows, out, after: int, *overrides) -> None:
    """Train and die right after an update, before anything is made of it."""
    with pytest.raises(Killed):
        for event in loop.train(config(base, rows, out, *EVERY, *overrides), base):
            if isinstance(event, Step) and event.update == after:
                raise Killed


def weights(out: Path) -> bytes:
    return (out / "adapter" / "adapters.safetensors").read_bytes()


def figures(out: Path) -> list[tuple]:
    """What the log says of learning, times left out."""
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    kept = [line for line in lines if line["event"] in ("step", "eval")]
    return [(x["event"], x["update"], x["loss"], x["tokens"]) for x in kept]


WAYS = {
    "plain": (),
    "dropout": ("lora.dropout=0.3",),
    "padded": ("train.packing=false",),
    "checkpointed blocks": ("train.checkpoint_blocks=true", "lora.dropout=0.1"),
    "small pieces": ("train.tokens_per_microbatch=24",),
    "adam": ("train.optimizer=adam",),
    "lion": ("train.optimizer=lion",),
    "adafactor": ("train.optimizer=adafactor",),
    "sgd": ("train.optimizer=sgd", "train.learning_rate=0.1"),
    "muon": ("train.optimizer=muon",),
    "decay": ("train.weight_decay=0.1", "train.schedule=linear"),
    "dora": ("lora.method=dora", "lora.dropout=0.1"),
    "pissa": ("lora.method=pissa", "train.lora_plus_ratio=4"),
    "whole": ('lora.train_also=["embed_tokens", "norm"]', "lora.method=lora-fa"),
    "muon, faster B": ("train.optimizer=muon", "train.lora_plus_ratio=4", "lora.method=olora"),
    "every weight": ("lora.method=full", "lora.rank=16", "train.learning_rate=1e-3"),
}


@pytest.mark.parametrize("name", WAYS)
def test_resumed_is_bitwise_equal_to_uninterrupted(dense, rows, tmp_path, name):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    options = [*WAYS[name], "train.updates=17"]  # into the second epoch
    trained(dense, rows, whole, *EVERY, *options)
    cut_off(dense, rows, cut, 14, *options)
    events = list(loop.resume(cut, dense))
    assert of(Resumed, events)[0].update == 12
    assert of(Step, events)[0].update == 13
    assert isinstance(events[-1], Done) and events[-1].reason == "finished"
    assert weights(cut) == weights(whole)
    assert figures(cut) == figures(whole)


def test_a_quantized_base_and_gzip_rows_resume_the_same(quantized, rows, tmp_path):
    import gzip

    data = tmp_path / "rows.jsonl.gz"
    data.write_bytes(gzip.compress((rows / "train.jsonl").read_bytes()))
    for out in (tmp_path / "whole", tmp_path / "cut"):
        if out.name == "whole":
            trained(quantized, data, out, *EVERY)
        else:
            cut_off(quantized, data, out, 16)
            list(loop.resume(out, quantized))
    assert weights(tmp_path / "cut") == weights(tmp_path / "whole")


def test_being_cut_off_again_and_again_changes_nothing(dense, rows, tmp_path):
    draw = random.Random(4)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    trained(dense, rows, whole, *EVERY)
    cut_off(dense, rows, cut, 2)  # before the first checkpoint
    for _ in range(8):
        left = draw.randrange(1, 9)
        try:
            for number, _ in enumerate(loop.resume(cut, dense)):
                if number == left:
                    raise Killed
        except Killed:
            continue
    list(loop.resume(cut, dense))
    assert weights(cut) == weights(whole)
    assert figures(cut) == figures(whole)


def test_an_interrupted_run_goes_on_from_its_last_update(dense, rows, tmp_path):
    """Also where the interruption came just before a validation, and leaves nothing beside it."""
    from threading import Event as Flag

    whole, cut, stop = tmp_path / "whole", tmp_path / "cut", Flag()
    trained(dense, rows, whole, "eval.every=5")
    for event in loop.train(config(dense, rows, cut, "eval.every=5"), dense, stop=stop):
        if isinstance(event, Step) and event.update == 10:
            stop.set()
    assert (cut / "last-00000010").is_dir()
    events = list(loop.resume(cut, dense))
    assert of(Resumed, events)[0].update == 10
    assert weights(cut) == weights(whole)
    assert figures(cut) == figures(whole)
    assert not (cut / "last-00000010").exists()
    done = list(loop.resume(cut, dense))
    assert done == [events[-1]]  # finished: said again, nothing done


def test_early_stopping_remembers_the_validations_before(dense, rows, tmp_path):
    options = ["eval.patience=3", "eval.every=2", "train.learning_rate=1e-30", "save.every=1"]
    options += ["train.optimizer=sgd"]
    events = trained(dense, rows, tmp_path / "whole", *options)
    cut_off(dense, rows, tmp_path / "cut", 7, *options)
    again = list(loop.resume(tmp_path / "cut", dense))
    assert again[-1].reason == events[-1].reason == "early stop"
    assert again[-1].update == events[-1].update == 8


def test_many_validation_rows_measured_later_resume_the_same(dense, rows, tmp_path, monkeypatch):
    monkeypatch.setattr("mlxlora.train.session.QUICK_ROWS", 0)
    trained(dense, rows, tmp_path / "whole", *EVERY)
    cut_off(dense, rows, tmp_path / "cut", 4)  # the base is not measured yet
    list(loop.resume(tmp_path / "cut", dense))
    assert figures(tmp_path / "cut") == figures(tmp_path / "whole")


def test_old_checkpoints_are_pruned_but_never_the_best(dense, rows, tmp_path):
    options = ["save.every=1", "save.keep=2", "eval.every=4", "train.updates=10"]
    # A rate that grows until it does harm: the first validation is the best.
    options += ["train.learning_rate=0.1", "train.warmup=10"]
    assert trained(dense, rows, tmp_path / "run", *options)[-1].best_update == 4
    found = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert found == ["step-00000004", "step-00000009", "step-00000010"]
    assert Adapter.load(tmp_path / "run/adapter").provenance["metrics"]["update"] == 4


def flip(path: Path, place: int = -7) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("name", [ARRAYS, PROGRESS, HASHES])
@pytest.mark.parametrize("harm", ["flip", "cut", "gone"])
def test_a_damaged_checkpoint_falls_back_to_the_one_before(dense, rows, tmp_path, name, harm):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    trained(dense, rows, whole, *EVERY)
    cut_off(dense, rows, cut, 14)
    file = cut / "checkpoints" / "step-00000012" / name
    if harm == "flip":
        flip(file, 20)
    elif harm == "cut":
        file.write_bytes(file.read_bytes()[:30])
    else:
        file.unlink()
    events = list(loop.resume(cut, dense))
    (resumed,) = of(Resumed, events)
    assert resumed.update == 10  # with the best
    assert len(resumed.notes) == 1 and "step-00000012" in resumed.notes[0]
    assert weights(cut) == weights(whole)
    assert figures(cut) == figures(whole)


def test_no_whole_checkpoint_is_refused_and_says_which(dense, rows, tmp_path):
    cut = tmp_path / "cut"
    cut_off(dense, rows, cut, 8)
    for path in (cut / "checkpoints").iterdir():
        flip(path / ARRAYS)
    with pytest.raises(CheckpointError, match=r"(?s)step-00000006.*step-00000005.*begin"):
        list(loop.resume(cut, dense))
    shutil.rmtree(cut / "checkpoints")
    assert list(loop.resume(cut, dense))[-1].reason == "finished"


def test_rows_that_changed_are_refused_with_what_changed(dense, rows, tmp_path):
    cut_off(dense, rows, tmp_path / "cut", 4)
    lines = (rows / "train.jsonl").read_text()
    (rows / "train.jsonl").write_text(lines.replace("bread", "broth"))
    with pytest.raises(CheckpointError, match=r"train\.jsonl \(40 rows as before, not all"):
        list(loop.resume(tmp_path / "cut", dense))
    (rows / "train.jsonl").write_text(lines + lines)
    with pytest.raises(CheckpointError, match=r"40 rows then, 80 now"):
        list(loop.resume(tmp_path / "cut", dense))
    (rows / "train.jsonl").write_text(lines)
    (rows / "valid.jsonl").rename(rows / "other.jsonl")
    with pytest.raises(CheckpointError, match="valid rows are gone"):
        list(loop.resume(tmp_path / "cut", dense))


def test_another_base_under_the_same_name_is_refused(dense, experts, rows, tmp_path):
    cut_off(dense, rows, tmp_path / "cut", 4)
    with pytest.raises(CheckpointError, match="other weights"):
        list(loop.resume(tmp_path / "cut", experts))


def test_options_that_changed_are_refused_with_what_changed(dense, rows, tmp_path):
    cut_off(dense, rows, tmp_path / "cut", 4)
    toml = tmp_path / "cut" / "run.toml"
    toml.write_text(toml.read_text().replace("rank = 4", "rank = 8"))
    with pytest.raises(CheckpointError, match="rank: 4 then, 8 now"):
        list(loop.resume(tmp_path / "cut", dense))


def test_rows_that_training_does_not_read_may_change(dense, rows, tmp_path):
    cut_off(dense, rows, tmp_path / "cut", 4)
    shutil.copy(rows / "valid.jsonl", rows / "test.jsonl")
    assert list(loop.resume(tmp_path / "cut", dense))[-1].reason == "finished"


def test_a_moved_run_is_where_it_is_now(dense, rows, tmp_path):
    trained(dense, rows, tmp_path / "a", *EVERY)
    (tmp_path / "a").rename(tmp_path / "b")
    (done,) = loop.resume(tmp_path / "b", dense)
    assert done.adapter == done.last == str(tmp_path / "b" / "adapter")


def test_a_damaged_checkpoint_does_not_count_as_the_newest_for_ever(dense, rows, tmp_path):
    cut_off(dense, rows, tmp_path / "cut", 14)
    flip(tmp_path / "cut" / "checkpoints" / "step-00000012" / ARRAYS)
    events = loop.resume(tmp_path / "cut", dense)
    while not isinstance(next(events), Step):
        pass
    assert max(checkpoints_in(tmp_path / "cut")) == 10
    events.close()


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_resumed_run_holds_no_more_memory(dense, rows, tmp_path, method):
    options = [f"lora.method={method}", "lora.rank=16", "train.updates=16"]

    def held(events) -> int:
        for event in events:
            if isinstance(event, Step) and event.update == 14:
                mx.synchronize()
                return mx.get_active_memory()
        raise AssertionError

    whole = loop.train(config(dense, rows, tmp_path / "whole", *EVERY, *options), dense)
    before = held(whole)
    whole.close()
    cut_off(dense, rows, tmp_path / "cut", 13, *options)
    again = loop.resume(tmp_path / "cut", dense)
    assert held(again) <= 1.02 * before
    again.close()


def test_losses_that_are_no_number_after_a_resume_keep_what_was_learned(dense, rows, tmp_path):
    cut_off(dense, rows, tmp_path / "cut", 4, "eval.every=100")
    layer = dense.model.layers[0].input_layernorm
    weight = layer.weight
    with pytest.raises(TrainError, match="weights as update 3 left them"):
        for event in loop.resume(tmp_path / "cut", dense):
            if isinstance(event, Resumed):
                layer.weight = weight * float("inf")
    layer.weight = weight
    adapter = Adapter.load(tmp_path / "cut" / "adapter")
    assert adapter.provenance["metrics"]["update"] == 3


def test_what_is_no_run_is_refused(dense, tmp_path):
    with pytest.raises(CheckpointError, match="does not exist"):
        list(loop.resume(tmp_path / "none", dense))
    with pytest.raises(CheckpointError, match=r"no start\.json"):
        list(loop.resume(tmp_path, dense))


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"run": 3}', None])
def test_a_damaged_beginning_is_refused(dense, rows, tmp_path, text):
    cut_off(dense, rows, tmp_path / "cut", 4)
    start = tmp_path / "cut" / "start.json"
    changed = start.read_text().replace('"packed": true', '"packed": false')
    start.write_text(changed if text is None else text)
    with pytest.raises(CheckpointError, match=r"start\.json (is|does)"):
        list(loop.resume(tmp_path / "cut", dense))


def test_two_processes_cannot_train_in_one_directory(dense, rows, tmp_path):
    events = loop.train(config(dense, rows, tmp_path / "run"), dense)
    next(events)
    with pytest.raises(CheckpointError, match="another process"):
        list(loop.resume(tmp_path / "run", dense))
    events.close()
    assert list(loop.resume(tmp_path / "run", dense))[-1].reason == "finished"


def test_smaller_pieces_are_the_same_updates(dense, rows, tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    trained(dense, rows, whole, *EVERY, "train.tokens_per_microbatch=60")
    cut_off(dense, rows, cut, 14, "train.tokens_per_microbatch=60")
    events = list(loop.resume(cut, dense, smaller=True))
    assert 20 < events[0].tokens_per_microbatch <= 30
    for (_, update, loss, tokens), other in zip(figures(cut), figures(whole), strict=True):
        assert (update, tokens) == (other[1], other[3])
        assert loss == pytest.approx(other[2], rel=1e-3)
    start = json.loads((cut / "start.json").read_text())
    assert start["ways"]["layout"]["tokens"] == events[0].tokens_per_microbatch


def test_relative_paths_are_found_from_elsewhere(dense, rows, tmp_path, monkeypatch):
    monkeypatch.chdir(rows.parent)
    cut_off(dense, Path(rows.name), Path("cut"), 4)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert list(loop.resume(tmp_path / "cut", dense))[-1].reason == "finished"


def test_what_a_killed_writer_left_is_tidied_up(dense, rows, tmp_path):
    cut = tmp_path / "cut"
    cut_off(dense, rows, cut, 8)
    (cut / "checkpoints" / ".step-00000009.tmp-abc").mkdir()
    (cut / ".adapter.tmp-xyz").mkdir()
    (cut / ".start.json.tmp-q").write_text("half")
    old = cut / ".adapter.old-1"
    old.mkdir()
    (cut / "adapter").rename(old / "old")  # killed between two renames
    before = (old / "old" / "adapters.safetensors").read_bytes()
    events = loop.resume(cut, dense)
    next(events)
    assert weights(cut) == before
    assert [p.name for p in cut.rglob(".*")] == []
    events.close()


def test_a_checkpoint_of_another_run_is_refused(dense, rows, tmp_path):
    cut_off(dense, rows, tmp_path / "a", 4)
    cut_off(dense, rows, tmp_path / "b", 4, "train.optimizer=lion")
    shutil.rmtree(tmp_path / "a" / "checkpoints")
    shutil.copytree(tmp_path / "b" / "checkpoints", tmp_path / "a" / "checkpoints")
    with pytest.raises(CheckpointError, match="does not fit this run"):
        list(loop.resume(tmp_path / "a", dense))


def test_a_full_disk_at_the_first_checkpoint_loses_nothing(dense, rows, tmp_path):
    def broken(self, *args):
        raise OSError(28, "No space left on device")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mlxlora.train.checkpoint.save_tensors", broken)
        with pytest.raises(OSError):
            trained(dense, rows, tmp_path / "cut", *EVERY)
    assert not list((tmp_path / "cut" / "checkpoints").iterdir())
    trained(dense, rows, tmp_path / "whole", *EVERY)
    list(loop.resume(tmp_path / "cut", dense))
    assert weights(tmp_path / "cut") == weights(tmp_path / "whole")


def test_nothing_that_changes_is_left_out_of_the_state(dense, rows, tmp_path, monkeypatch):
    """Whatever a session holds that changes must be in its progress, or be made again."""
    sessions: list[Session] = []
    plain = Session.__init__

    def kept(self, *args, **options):
        plain(self, *args, **options)
        sessions.append(self)

    monkeypatch.setattr(Session, "__init__", kept)
    trained(dense, rows, tmp_path / "whole", *EVERY)
    cut_off(dense, rows, tmp_path / "cut", 14)
    list(loop.resume(tmp_path / "cut", dense))
    whole, _, resumed = (s.progress for s in sessions)
    for name, value in vars(whole).items():
        if name not in ("seconds", "log_bytes"):
            assert getattr(resumed, name) == value, name


def test_rows_on_one_line_are_enough(dense, tmp_path):
    write_rows(tmp_path / "train.jsonl", [{"text": "abc"}])
    cut_off(dense, tmp_path, tmp_path / "cut", 2)
    assert list(loop.resume(tmp_path / "cut", dense))[-1].update == 3
