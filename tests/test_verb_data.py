"""mlxlora data, as it is typed: what is shown, in a pipe and in colour, and the exit codes."""

import io
import json

from conftest import write_rows
from rich.console import Console
from test_inspect import pairs
from typer.testing import CliRunner

from mlxlora.cli import app


def run(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


def test_rows_lengths_checks_and_a_verdict_are_shown(dense_path, rows):
    result = run("data", rows, "--model", dense_path, "--rows", 2)
    assert result.exit_code == 0, result.output
    for words in ("As the model sees it", "⟦a<|im_end|>⟧", "Tokens of 48 rows", "█", "Checks"):
        assert words in result.output
    assert result.output.strip().splitlines()[-1].startswith("Ready to train")


def test_what_training_would_refuse_ends_with_2(dense_path, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(pairs(1)[0]) + "\n{ broken\n" + json.dumps(pairs(2)[1]) + "\n")
    result = run("data", path, "--model", dense_path, "--json")
    assert result.exit_code == 2
    value = json.loads(result.stdout.splitlines()[-1])
    assert value["ready"] is False and value["bad_lines"]["count"] == 1
    assert run("data", path, "--model", dense_path, "--on-bad-row", "skip").exit_code == 0


def test_fix_writes_a_copy_and_says_what_is_not_in_it(dense_path, tmp_path):
    rows = pairs(20)
    path = write_rows(tmp_path / "rows.jsonl", [*rows, rows[0]])
    out = tmp_path / "clean.jsonl"
    result = run("data", path, "--model", dense_path, "--fix", out, "--json")
    assert result.exit_code == 0, result.output
    fixed = json.loads(result.stdout.splitlines()[-1])["fixed"]
    assert fixed == {
        "path": str(out),
        "lines": 21,
        "kept": {"clean.jsonl": 20},
        "dropped": {"exact": 1},
    }
    assert len(out.read_text().splitlines()) == 20
    again = run("data", path, "--model", dense_path, "--fix", out)
    assert again.exit_code != 0 and "never overwritten" in str(again.exception)


def test_drop_near_without_fix_is_refused(dense_path, rows):
    result = run("data", rows, "--model", dense_path, "--drop-near")
    assert result.exit_code != 0 and "--fix" in str(result.exception)


def test_in_colour_there_are_no_brackets(dense_path, rows):
    from mlxlora.base import load
    from mlxlora.config import DataConfig
    from mlxlora.console import Screen
    from mlxlora.data.inspect.summary import inspect
    from mlxlora.show_data import show_inspection

    found = inspect(DataConfig(path=str(rows)), load(dense_path).tokenizer, rows=1)
    shown = {}
    terminals = {
        "colour": {"color_system": "standard", "no_color": False},
        "none": {"color_system": None},
        "NO_COLOR": {"color_system": "standard", "no_color": True},
    }
    for name, options in terminals.items():
        screen, file = Screen(), io.StringIO()
        screen._console = Console(file=file, width=80, force_terminal=True, **options)
        show_inspection(screen, found)
        shown[name] = file.getvalue()
    assert "⟦" not in shown["colour"] and "\x1b[32ma" in shown["colour"]  # the letter, green
    assert "⟦a<" in shown["none"] and "⟦" in shown["NO_COLOR"]
    assert max(map(len, shown["none"].splitlines())) <= 80
