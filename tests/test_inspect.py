"""What training will be given: counted, compared with counts that were made another way."""

import gzip
import json
import random

import numpy as np
import pytest
from conftest import write_rows, write_tokenizer
from mlx_lm.utils import load_tokenizer

from mlxlora.config import DataConfig
from mlxlora.data.inspect.lengths import SAMPLE
from mlxlora.data.inspect.scan import scan
from mlxlora.data.inspect.summary import inspect
from mlxlora.data.records import open_splits
from mlxlora.data.render import Renderer
from mlxlora.errors import DataError

WORDS = [
    *("apple", "bread", "cloud", "drum", "eagle", "flame", "grape"),
    *("horse", "river", "stone", "tree", "light", "house"),
]


def silent(what, done, of):
    pass


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(directory)
    return load_tokenizer(directory, eos_token_ids=[258])


def with_template(directory, template):
    write_tokenizer(directory, template)
    return load_tokenizer(directory, eos_token_ids=[258])


def pairs(count, seed=0, words=20):
    """Rows that share no long stretch of text."""
    random_ = random.Random(seed)
    return [
        {
            "prompt": " ".join(random_.choices(WORDS, k=words)) + f" {number}",
            "completion": " ".join(random_.choices(WORDS, k=5)),
        }
        for number in range(count)
    ]


def states(found):
    return {finding.name: finding.state for finding in found.findings}


def the(found, name):
    (finding,) = [finding for finding in found.findings if finding.name == name]
    return finding


def test_clean_rows_pass_every_check(tmp_path, tokenizer):
    path = write_rows(tmp_path / "rows.jsonl", pairs(40))
    found = inspect(DataConfig(path=str(path)), tokenizer)
    assert set(states(found).values()) == {"pass"}
    assert found.verdict.found == "Ready to train; nothing to mend."
    assert {part.split for part in found.parts} == {"train", "valid"}
    assert sum(part.rows for part in found.parts) == 40


def test_the_split_is_the_one_that_training_makes(tmp_path, tokenizer):
    lines = [json.dumps(row) for row in pairs(300)]
    lines.insert(7, "{ not JSON")
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(lines))
    data = DataConfig(path=str(path), on_bad_row="skip")
    table = scan(data, 3, silent)
    splits = open_splits(data, 3)
    for place, rows in ((0, splits.train), (1, splits.valid)):
        ours = np.flatnonzero((table.splits == place) & table.of_kind)
        assert [table.record(row).messages for row in ours] == [r.messages for r in rows]


def test_every_bad_line_is_counted_by_reason_with_file_and_line(tmp_path, tokenizer):
    path = tmp_path / "rows.jsonl"
    good = [json.dumps(row) for row in pairs(20)]
    bad = ['{"prompt": 3, "completion": "x"}', '{"prompt": 4, "completion": "x"}', "{ broken", "7"]
    path.write_text("\n".join([*good[:5], "", *bad, *good[5:]]))
    found = inspect(DataConfig(path=str(path)), tokenizer)
    faults = found.table.faults
    assert faults.count == 4 and found.lines == 24
    assert [(reason.count, reason.places) for reason in faults.reasons] == [
        (2, (f"{path}:7", f"{path}:8")),
        (1, (f"{path}:9",)),
        (1, (f"{path}:10",)),
    ]
    assert states(found)["lines"] == "fail" and found.verdict.state == "fail"
    assert "--on-bad-row skip" in the(found, "lines").remedy
    skipping = inspect(DataConfig(path=str(path), on_bad_row="skip"), tokenizer)
    assert states(skipping)["lines"] == "warn"


def test_a_file_without_one_usable_row_says_why_and_nothing_else(tmp_path, tokenizer):
    rows = [{"question": "2+2?", "answer": "4"}] * 30
    path = write_rows(tmp_path / "rows.jsonl", rows)
    found = inspect(DataConfig(path=str(path)), tokenizer)
    (finding,) = found.findings
    assert finding.state == "fail" and "data.columns.prompt=question" in finding.found
    assert "30 times" in finding.found


def test_an_empty_file_is_an_error(tmp_path, tokenizer):
    (tmp_path / "rows.jsonl").write_text("\n\n")
    with pytest.raises(DataError, match="no rows"):
        inspect(DataConfig(path=str(tmp_path / "rows.jsonl")), tokenizer)


def test_formats_are_counted_and_kinds_that_cannot_be_mixed_refused(tmp_path, tokenizer):
    rows = [*pairs(20), {"instruction": "do", "output": "done"}, {"text": "plain"}]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    found = inspect(DataConfig(path=str(path)), tokenizer)
    assert found.formats == {"prompt": 20, "instruction": 1, "text": 1}
    assert states(found)["formats"] == "fail"
    assert sum(part.rows for part in found.parts) == 21  # the text row is not one of them
    one_kind = write_rows(tmp_path / "one.jsonl", rows[:-1])
    assert states(inspect(DataConfig(path=str(one_kind)), tokenizer))["formats"] == "pass"


def test_lengths_and_what_is_cut_are_those_of_the_rows(tmp_path, tokenizer):
    rows = [{"prompt": "p" * n, "completion": "c" * (n // 2)} for n in range(1, 120)]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    limit = 100
    lengths = inspect(DataConfig(path=str(path), max_length=limit), tokenizer).lengths
    # A byte a token: <|im_start|>user\n p <|im_end|>\n <|im_start|>assistant\n c <|im_end|>\n
    before = [1 + 5 + len(row["prompt"]) + 1 + 1 + 1 + 10 for row in rows]
    whole = [b + len(row["completion"]) + 2 for b, row in zip(before, rows, strict=True)]
    trained = [len(row["completion"]) + 1 for row in rows]
    kept = [min(max(0, limit + 1 - b), t) for b, t in zip(before, trained, strict=True)]
    predictions = np.array(whole) - 1
    assert lengths.tokens == predictions.sum() and lengths.longest == predictions.max()
    assert lengths.supervised == sum(trained)
    assert lengths.cut_rows == (predictions > limit).sum()
    assert lengths.cut_tokens == (predictions - limit).clip(0).sum()
    assert lengths.cut_supervised == sum(trained) - sum(kept)
    assert lengths.nothing.count == kept.count(0)
    assert sum(bar.rows for bar in lengths.bars) == len(rows)
    for bar in lengths.bars:
        assert bar.rows == ((predictions >= bar.first) & (predictions <= bar.last)).sum()
    share = (predictions <= lengths.keeps_most).mean()
    assert share >= 0.99 > (predictions <= lengths.keeps_most - 2).mean()


def test_the_lengths_that_are_recommended_keep_what_they_say(tmp_path, tokenizer):
    rows = [{"prompt": "p" * n, "completion": "c"} for n in range(1, 301)]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    first = inspect(DataConfig(path=str(path), max_length=50), tokenizer)
    remedy = the(first, "length").remedy
    assert f"--max-length {first.lengths.longest} keeps all" in remedy
    most = inspect(DataConfig(path=str(path), max_length=first.lengths.keeps_most), tokenizer)
    assert most.lengths.cut_rows == 3
    everything = inspect(DataConfig(path=str(path), max_length=first.lengths.longest), tokenizer)
    assert everything.lengths.cut_rows == 0


def test_of_many_rows_a_sample_is_measured_and_said(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr("mlxlora.data.inspect.lengths.SAMPLE", 10)
    path = write_rows(tmp_path / "rows.jsonl", pairs(40))
    found = inspect(DataConfig(path=str(path)), tokenizer)
    assert (found.lengths.rows, found.lengths.of) == (10, 40) and not found.lengths.complete
    assert "10 rows spread over 40" in the(found, "length").found
    assert inspect(DataConfig(path=str(path)), tokenizer, every=True).lengths.rows == 40
    assert SAMPLE > 1000


def test_exact_copies_are_found_however_they_are_written(tmp_path, tokenizer):
    rows = pairs(30)
    lines = [json.dumps(row) for row in rows]
    lines.append(json.dumps({k: rows[4][k] for k in ("completion", "prompt")}, indent=None))
    lines.append(lines[9].replace('": "', '"  :  "'))
    (tmp_path / "train.jsonl").write_text("\n".join(lines) + "\n")
    found = inspect(DataConfig(path=str(tmp_path)), tokenizer)
    copies = {int(r): int(found.copies.exact[r]) for r in np.flatnonzero(found.copies.exact >= 0)}
    assert copies == {30: 4, 31: 9}
    assert f"{tmp_path / 'train.jsonl'}:31, see line 5" in the(found, "copies").found


def test_of_several_copies_the_first_is_the_row_itself(tmp_path, tokenizer):
    rows = pairs(20)
    write_rows(tmp_path / "train.jsonl", [*rows, rows[2], rows[2], rows[5], rows[2]])
    exact = inspect(DataConfig(path=str(tmp_path)), tokenizer).copies.exact
    assert exact[20:].tolist() == [2, 2, 5, 2] and (exact[:20] < 0).all()


def test_the_order_of_keys_in_tools_makes_no_other_row(tmp_path, tokenizer):
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    tools = [[{"name": "f", "type": "x"}], [{"type": "x", "name": "f"}], [{"name": "g"}]]
    write_rows(tmp_path / "train.jsonl", [{"messages": turns, "tools": t} for t in tools])
    exact = inspect(DataConfig(path=str(tmp_path)), tokenizer).copies.exact
    assert exact.tolist() == [-1, 0, -1]


def test_rows_nested_very_deeply_end_nothing(tmp_path, tokenizer):
    deep = "[" * 400 + "]" * 400
    turns = '[{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]'
    row = f'{{"messages": {turns}, "tools": [{deep}]}}'
    (tmp_path / "train.jsonl").write_text(f"{row}\n{row}\n")
    found = inspect(DataConfig(path=str(tmp_path)), tokenizer)
    assert len(set(found.table.digests.tolist())) == 1
    assert found.lengths.refused.count == 2  # by what renders tools


def test_rows_of_train_that_are_held_out_are_found_exact_and_near(tmp_path, tokenizer):
    train, held = pairs(30), pairs(5, seed=1)
    train[7] = held[2]
    train[8] = {**held[3], "prompt": held[3]["prompt"].upper()}
    write_rows(tmp_path / "train.jsonl", train)
    write_rows(tmp_path / "valid.jsonl", held[:3])
    write_rows(tmp_path / "test.jsonl", held[3:])
    found = inspect(DataConfig(path=str(tmp_path)), tokenizer)
    where = found.table.where
    leaks, near = found.copies.leaks, found.copies.near_leaks
    assert np.flatnonzero(leaks >= 0).tolist() == [7]
    assert where(int(leaks[7])) == f"{tmp_path / 'valid.jsonl'}:3"
    assert np.flatnonzero(near >= 0).tolist() == [8]
    assert where(int(near[8])) == f"{tmp_path / 'test.jsonl'}:1"
    assert states(found)["leakage"] == "warn"
    assert (
        states(inspect(DataConfig(path=str(tmp_path)), tokenizer, copies=False)).get("leakage")
        is None
    )


def test_gzip_is_read_as_the_plain_file_is(tmp_path, tokenizer):
    plain = write_rows(tmp_path / "rows.jsonl", pairs(25))
    packed = tmp_path / "packed.jsonl.gz"
    packed.write_bytes(gzip.compress(b"\xef\xbb\xbf" + plain.read_bytes()))
    one, other = (inspect(DataConfig(path=str(p)), tokenizer).to_dict() for p in (plain, packed))
    assert one["lengths"] == other["lengths"] and one["formats"] == other["formats"]


def test_examples_are_what_training_trains(tmp_path, tokenizer):
    path = write_rows(tmp_path / "rows.jsonl", pairs(20))
    data = DataConfig(path=str(path), max_length=60)
    found = inspect(data, tokenizer, rows=4)
    assert len(found.examples) == 4
    again = inspect(data, tokenizer, rows=4)
    assert again.examples == found.examples
    renderer = Renderer(tokenizer, data)
    splits = open_splits(data, 0)
    example = renderer(splits.train[0])
    first = found.examples[0]
    assert first.supervised == example.supervised and first.truncated == example.truncated
    assert "".join(piece.text for piece in first.pieces) == tokenizer.decode(
        example.tokens.tolist()
    )


def test_the_result_is_json(tmp_path, tokenizer):
    path = write_rows(tmp_path / "rows.jsonl", pairs(20))
    value = json.loads(json.dumps(inspect(DataConfig(path=str(path)), tokenizer).to_dict()))
    assert value["ready"] and value["lengths"]["rows"] == 20


def test_a_prompt_that_the_row_does_not_begin_with_is_shown(tmp_path, tokenizer):
    opened = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n<think>{% endif %}"
    )
    thinking = with_template(tmp_path, opened)
    path = write_rows(tmp_path / "rows.jsonl", pairs(10))
    found = inspect(DataConfig(path=str(path)), thinking)
    prompt = the(found, "prompt")
    assert prompt.state == "warn" and "goes on with '<think>'" in prompt.found


def test_a_token_that_joins_prompt_and_answer_is_found(tmp_path):
    from tokenizers import AddedToken, Tokenizer

    write_tokenizer(tmp_path)
    made = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    made.add_tokens([AddedToken("\nA", special=False)])
    made.save(str(tmp_path / "tokenizer.json"))
    joined = load_tokenizer(tmp_path, eos_token_ids=[258])
    path = write_rows(
        tmp_path / "rows.jsonl", [{"prompt": f"q{n}", "completion": "A b"} for n in range(10)]
    )
    prompt = the(inspect(DataConfig(path=str(path)), joined), "prompt")
    assert prompt.state == "warn" and repr("\nA") in prompt.found


def test_a_turn_without_an_end_is_found(tmp_path):
    endless = with_template(
        tmp_path,
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}",
    )
    path = write_rows(tmp_path / "rows.jsonl", pairs(10))
    found = inspect(DataConfig(path=str(path)), endless)
    assert the(found, "ending").state == "warn"


def test_a_beginning_that_stands_twice_is_found(tmp_path):
    write_tokenizer(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config["bos_token"] = "<|endoftext|>"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    begins = load_tokenizer(tmp_path, eos_token_ids=[258])
    rows = [{"text": f"<|endoftext|><|endoftext|>{n}"} for n in range(10)]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    found = inspect(DataConfig(path=str(path)), begins)
    assert the(found, "beginning").state == "warn"
    assert the(found, "prompt").state == "warn"  # plain text, though chat has a template


def test_special_tokens_in_messages_are_found_in_any_row(tmp_path, tokenizer):
    rows = pairs(30)
    rows[17]["prompt"] += " <|im_end|>"
    write_rows(tmp_path / "train.jsonl", rows)
    found = inspect(DataConfig(path=str(tmp_path)), tokenizer)
    assert f"{tmp_path / 'train.jsonl'}:18" in the(found, "special").found


def test_rows_that_the_template_refuses_are_counted(tmp_path):
    strict = with_template(
        tmp_path,
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system prompts') }}{% endif %}"
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    )
    rows = pairs(10)
    rows[3]["system"] = "be kind"
    write_rows(tmp_path / "train.jsonl", rows)
    found = inspect(DataConfig(path=str(tmp_path)), strict)
    assert found.lengths.refused.count == 1 and the(found, "refused").state == "fail"
    assert f"{tmp_path / 'train.jsonl'}:4" in the(found, "refused").found
