"""The README says what the program does: its table, its tree and its commands are checked."""

import ast
import re
import shlex

import pytest
from architectures import guide_section
from conftest import write_rows
from documents import README, ROOT, blocks, guide, section
from typer.main import get_command
from typer.testing import CliRunner

from mlxlora.cli import app
from mlxlora.config import RunConfig
from mlxlora.schema import options, toml_value

MODEL = "mlx-community/Qwen3-0.6B-4bit"


def option_table() -> str:
    lines = ["| option | default | |", "|---|---|---|"]
    for key, kind, field in options(RunConfig):
        default = field.default_factory() if callable(field.default_factory) else field.default
        shown = toml_value(list(default) if isinstance(default, tuple) else default)
        text, unit = field.metadata["help"], field.metadata["unit"]
        choices = [c for c in getattr(kind, "__args__", ()) if isinstance(c, str)]
        if len(choices) > 1:
            text += ": " + ", ".join(f"`{choice}`" for choice in choices)
        text = text.replace("*", r"\*")  # Markdown's own
        lines.append(f"| `{key}` | `{shown}` | {text}{f' [{unit}]' if unit else ''} |")
    return "\n".join(lines) + "\n"


def test_the_option_table_is_the_config():
    assert section(guide("choosing-settings"), "options") == option_table()


def test_the_architectures_are_those_that_are_tested():
    assert section(guide("architectures"), "architectures") == guide_section()


def tree() -> list[str]:
    """The files of the README's tree, in its order, by their paths in the package."""
    files, folders = [], []
    for line in section(README, "tree").splitlines():
        if match := re.match(r"^((?:  )+)([\w.]+)(/?)(  .*)?$", line):
            indent, name, is_folder, _ = match.groups()
            folders = folders[: len(indent) // 2 - 1]
            if is_folder:
                folders.append(name)
            else:
                files.append("/".join([*folders, name]))
    return files


def test_the_tree_names_every_file_and_no_other():
    found = {str(path.relative_to(ROOT / "mlxlora")) for path in (ROOT / "mlxlora").rglob("*.py")}
    named = tree()
    assert sorted(named) == sorted(name for name in found if not name.endswith("__init__.py"))


def test_imports_point_only_up_the_tree():
    order = tree()
    for place, name in enumerate(order):
        parsed = ast.parse((ROOT / "mlxlora" / name).read_text(encoding="utf-8"))
        for node in parsed.body:
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("mlxlora."):
                module = node.module.removeprefix("mlxlora.").replace(".", "/")
                package = (ROOT / "mlxlora" / module).is_dir()
                names = [f"{module}/{n.name}" for n in node.names] if package else [module]
                for wanted in names:
                    assert wanted + ".py" in order[:place], f"{name} imports {wanted} from below"


def test_the_two_commands_that_set_up_are_one_line_each():
    lines = [
        line for block in blocks(README, "sh") for line in block.splitlines() if "venv" in line
    ]
    assert len(lines) == 2
    assert lines[0].endswith("mlxlora quickstart") and lines[1].endswith("-m pytest")


def test_every_command_is_in_the_table_and_the_other_way_round():
    verbs = set()
    for name, command in get_command(app).commands.items():
        inner = getattr(command, "commands", None)
        verbs |= {f"{name} {sub}" for sub in inner} if inner else {name}
    rows = re.findall(r"^\| (`mlxlora .*?) \|", README, re.MULTILINE)
    assert {name for row in rows for name in re.findall("`mlxlora (.*?)`", row)} == verbs


def test_the_commands_run_in_the_order_of_the_readme(quantized_path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pairs = [{"prompt": f"say {n}", "completion": str(n)} for n in range(40)]
    write_rows(tmp_path / "my.jsonl", pairs)
    block = "".join(b for b in blocks(README, "sh") if b.startswith("mlxlora "))
    assert [line.split()[1] for line in block.splitlines()] == ["train", "chat", "eval", "fuse"]
    for line in block.splitlines():
        words = shlex.split(line.replace(MODEL, str(quantized_path)))[1:]
        if words[0] == "chat":
            words += ["--prompt", "say 3", "--max-tokens", "4"]
        result = CliRunner().invoke(app, words)
        assert result.exit_code == 0, (line, result.output, result.exception)
    assert (tmp_path / "fused" / "model.safetensors").exists()


def test_the_python_example_runs(quantized_path, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    pairs = [{"prompt": f"say {n}", "completion": str(n)} for n in range(8)]
    data = write_rows(tmp_path / "my.jsonl", pairs)
    (tmp_path / "recipe.toml").write_text(
        f"model = {toml_value(str(quantized_path))}\nout = 'runs/mine'\n"
        f"[data]\npath = {toml_value(str(data))}\n[train]\nupdates = 2\n"
    )
    (code,) = [block for block in blocks(README, "python") if block.startswith("import mlxlora")]
    exec(compile(code.replace(MODEL, str(quantized_path)), "README.md", "exec"), {})
    assert "Done(" in capsys.readouterr().out
    assert (tmp_path / "fused" / "config.json").exists()


@pytest.mark.parametrize("word", ["TODO", "coming soon", "/home/", "/Users/"])
def test_the_readme_promises_nothing_and_knows_no_machine(word):
    assert word not in README


def test_the_readme_is_read_in_a_minute():
    around = README.replace(section(README, "tree"), "")
    assert len(around.splitlines()) < 350
