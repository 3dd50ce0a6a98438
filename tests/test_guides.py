"""The guides and recipes/README.md: their commands run, their examples are read, links lead on.

Every line of every ```sh block is run on tiny models, in the order of its guide, or stands in
ELSEWHERE or NOT_RUN with the reason. The README's own run in test_readme.py.
"""

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
from conftest import write_rows
from documents import GUIDES, README, ROOT, blocks, guide
from typer.main import get_command
from typer.testing import CliRunner

from mlxlora.cli import app
from mlxlora.config import RunConfig
from mlxlora.data.formats import parse
from mlxlora.schema import toml_value

MODEL = "mlx-community/Qwen3-0.6B-4bit"
NAMES = sorted(path.stem for path in GUIDES.glob("*.md"))
PAGES = {"README": ROOT / "README.md", "recipes/README": ROOT / "recipes" / "README.md"} | {
    name: GUIDES / f"{name}.md" for name in NAMES
}
ELSEWHERE = {  # run by another test, on what they need
    "mlxlora push": "test_export_hub.py, on a local Hub",
    "mlxlora pull": "test_export_hub.py, on a local Hub",
    "mlxlora serve": "test_serve_clients.py has the server that the curl lines ask",
    "curl": "test_serve_clients.py",
    "mlxlora train --track": "test_track.py, with the trackers' own packages",
}
NOT_RUN = {
    "ollama": "Ollama is not at hand; test_modelfile.py reads what it would be given",
    "python3 -m venv": "installs from the network; CI does the same",
    ".venv/bin/": "runs in what that installs",
    "python recipes/predict.py": "test_recipes.py counts the same",
    "mlxlora plan recipes/": "a published shape takes minutes; test_recipes.py plans narrow ones",
}
MORE = {  # what a tiny model, a test and its patience need besides
    "mlxlora train recipes/": ["--model", MODEL, "--updates", "2"],
    "mlxlora sweep recipes/": ["--model", MODEL, "--updates", "4"],
    "mlxlora eval": ["--max-tokens", "4"],
    "mlxlora chat": ["--prompt", "say 3", "--max-tokens", "4"],
}


def commands(page: str) -> list[str]:
    text = PAGES[page].read_text(encoding="utf-8")
    return [line for block in blocks(text, "sh") for line in block.splitlines()]


def why_not(line: str) -> str | None:
    found = [why for start, why in (ELSEWHERE | NOT_RUN).items() if line.startswith(start)]
    return found[0] if found else None


@pytest.mark.parametrize("page", PAGES)
def test_every_command_is_one_of_the_program(page):
    for line in commands(page):
        if not line.startswith("mlxlora"):
            assert page == "README" or why_not(line), line
            continue
        words = shlex.split(line)[1:]
        command = get_command(app)
        while words and words[0] in getattr(command, "commands", {}):
            command = command.commands[words.pop(0)]
        command.make_context("mlxlora", words, resilient_parsing=False)


@pytest.fixture
def desk(quantized_path, dense_path, experts_path, rows, tmp_path, monkeypatch):
    """A directory as the guides find it: rows, two adapters, recipes."""
    place = tmp_path / "desk"
    place.mkdir()
    monkeypatch.chdir(place)
    pairs = [{"prompt": f"say {n}", "completion": str(n)} for n in range(24)]
    for name in ("my", "voice"):
        write_rows(place / f"{name}.jsonl", pairs)
    write_rows(
        place / "quiz.jsonl",
        [{"question": pair["prompt"], "answer": pair["completion"]} for pair in pairs],
    )
    shutil.copytree(ROOT / "recipes", "recipes", ignore=shutil.ignore_patterns("tiny-base"))
    (place / "recipe.toml").write_text(
        f"model = {toml_value(str(quantized_path))}\nout = 'runs/python'\n"
        "[data]\npath = 'my.jsonl'\n[train]\nupdates = 2\n[lora]\nrank = 4\n"
    )
    return place


@pytest.fixture
def adapters(desk, quantized_path):
    """runs/mine and runs/other, trained a little, and one of them in PEFT's format."""
    for name in ("mine", "other"):
        where = ["--data", "my.jsonl", "--out", f"runs/{name}", "--updates", "2"]
        done = run("train", "--model", str(quantized_path), *where)
        assert done.exit_code == 0, done.output
    source = ["--adapter", "runs/mine/adapter", "--format", "peft", "--out", "their-adapter"]
    assert run("export", "--model", str(quantized_path), *source).exit_code == 0


def run(*words: str):
    return CliRunner().invoke(app, words)


HEAVY = {"exporting": "eight exports"}


@pytest.mark.parametrize(
    "page",
    [pytest.param(p, marks=[pytest.mark.slow] * (p in HEAVY)) for p in PAGES if p != "README"],
)
def test_the_commands_run_in_the_order_of_the_page(page, request, desk, quantized_path):
    lines = [line for line in commands(page) if not why_not(line)]
    if any("adapter" in line for line in lines):
        request.getfixturevalue("adapters")
    for line in lines:
        line = line.replace("--model M ", f"--model {MODEL} ")
        words = shlex.split(line)[1:]
        for start, more in MORE.items():
            words += more if line.startswith(start) else []
        done = run(*[str(quantized_path) if word == MODEL else word for word in words])
        assert done.exit_code == 0, (line, done.output, done.exception)


def test_the_python_of_the_adapters_guide_runs(desk, adapters, quantized_path, capsys):
    (code,) = blocks(guide("adapters"), "python")
    exec(compile(code.replace(MODEL, str(quantized_path)), "adapters.md", "exec"), {})
    assert "Done(" in capsys.readouterr().out
    assert Path("fused/config.json").exists()


def test_the_rows_of_the_data_guide_are_read():
    rows = [json.loads(line) for block in blocks(guide("data-formats"), "json")
            for line in block.splitlines()]  # fmt: skip
    assert [parse(row, {}).kind for row in rows] == ["completion", "chat", "chat", "text"]


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files_and_headings(page):
    text = PAGES[page].read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!https?:)([^)]+)\)", text):
        path, _, heading = target.partition("#")
        file = (PAGES[page].parent / path).resolve() if path else PAGES[page]
        assert file.exists(), f"{page}: {target}"
        if heading:
            titles = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.MULTILINE)
            assert heading in {re.sub(r"[^\w -]", "", t).lower().replace(" ", "-") for t in titles}


@pytest.mark.parametrize("page", NAMES)
def test_a_guide_is_in_both_lists(page):
    assert f"guides/{page}.md" in README
    assert f"guides/{page}.md" in PAGES["recipes/README"].read_text(encoding="utf-8")


@pytest.mark.parametrize("page", PAGES)
@pytest.mark.parametrize("word", ["TODO", "coming soon", "/home/", "/Users/", "@@"])
def test_a_page_promises_nothing_and_knows_no_machine(page, word):
    assert word not in PAGES[page].read_text(encoding="utf-8")


def test_options_in_the_guides_exist():
    """--set KEY=VALUE and `table.key` in the text."""
    known = {f"{t}.{k}" for t, table in RunConfig().to_dict().items() if isinstance(table, dict)
             for k in table}  # fmt: skip
    for page, path in PAGES.items():
        for key in re.findall(r"(?<![\w./])(?:data|lora|train|eval|save)\.\w+(?=[`= ])",
                              path.read_text(encoding="utf-8")):  # fmt: skip
            assert key in known or key.endswith((".json", ".jsonl", ".py", ".toml")), (
                f"{page}: {key}"
            )
