"""Each metric by its name, and what is said of one that cannot be used."""

import json
import sys

import pytest

from mlxlora.errors import ConfigError, DataError
from mlxlora.evaluation.metrics import METRICS, metric, metrics

SCHEMA = {
    "type": "object",
    "properties": {"action": {"enum": ["add", "drop"]}, "n": {"type": "integer"}},
    "required": ["action"],
}


@pytest.mark.parametrize(
    ("asked", "wanted", "got", "score"),
    [
        ("exact", " yes ", "yes\n", 1),
        ("exact", "yes", "Yes", 0),
        ("contains", "42", "It is 42, I think.", 1),
        ("contains", "42", "It is 24.", 0),
        (r"regex:^\d+$", "anything", "123", 1),
        (r"regex:^\d+$", "anything", "123 apples", 0),
        (r"regex:#### (\d+)", "3 + 4 = 7\n#### 7", "so #### 6? no, 7. #### 7", 1),
        (r"regex:#### (\d+)", "3 + 4 = 7\n#### 7", "#### 7, or #### 8", 0),
        (r"regex:#### (\d+)", "3 + 4 = 7\n#### 7", "seven", 0),
        ("json", "", '{"a": [1, 2]}', 1),
        ("json", "", '```json\n{"a": 1}\n```', 0),
        ("json", "", "NaN", 0),
        ("json", "", "", 0),
    ],
)
def test_a_metric_scores_an_answer(asked, wanted, got, score):
    assert metric(asked).score("prompt", wanted, got) == score


@pytest.mark.parametrize(
    ("got", "score"),
    [('{"action": "add"}', 1), ('{"action": "add", "n": 1.5}', 0), ('{"n": 1}', 0), ("{", 0)],
)
def test_json_with_a_schema_is_valid_by_it(tmp_path, got, score):
    path = tmp_path / "schema.json"
    path.write_text(json.dumps(SCHEMA))
    assert metric(f"json:{path}").score("", "", got) == score


def test_chrf_is_sacrebleus(tmp_path):
    sacrebleu = pytest.importorskip("sacrebleu")
    wanted, got = "the cat sat on the mat", "a cat is on the mat"
    found = metric("chrf").score("", wanted, got)
    assert found == pytest.approx(sacrebleu.sentence_chrf(got, [wanted]).score / 100)
    assert metric("chrf").score("", wanted, wanted) == pytest.approx(1)


def test_a_function_of_the_users_is_given_prompt_wanted_and_got(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "def same_length(prompt, wanted, got):\n    return len(wanted) == len(got)\n"
        "def words(prompt, wanted, got):\n    return len(prompt.split())\n"
    )
    assert metric(f"python:{path}:same_length").score("p", "abc", "xyz") == 1
    assert metric(f"python:{path}:words").score("two words", "", "") == 2


def test_what_the_users_function_raises_is_told(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "def fails(prompt, wanted, got):\n    return {}[got]\n"
        "def says(prompt, wanted, got):\n    return 'much'\n"
    )
    with pytest.raises(DataError, match=r"mine\.py: fails\(\) raised KeyError: 'x'"):
        metric(f"python:{path}:fails").score("", "", "x")
    with pytest.raises(DataError, match=r"says\(\) gave 'much', which is no number"):
        metric(f"python:{path}:says").score("", "", "x")


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ("exat", "no metric 'exat' (did you mean exact?)"),
        ("exact:x", "exact takes nothing after the colon"),
        ("regex:(", "not a regular expression"),
        ("regex", "needs a pattern"),
        ("json:nowhere.json", "cannot read nowhere.json"),
        ("python:nowhere.py:f", "there is no file nowhere.py"),
        ("python:f", "write it as python:FILE.py:FUNCTION"),
    ],
)
def test_a_metric_that_cannot_be_used_is_refused_by_name(asked, says):
    with pytest.raises(ConfigError) as error:
        metric(asked)
    assert says in str(error.value)


def test_files_that_are_not_what_they_should_be_are_refused(tmp_path):
    schema, code = tmp_path / "schema.json", tmp_path / "mine.py"
    schema.write_text('{"type": "objekt"}')
    with pytest.raises(ConfigError, match="is not a JSON Schema"):
        metric(f"json:{schema}")
    code.write_text("import nothing_of_that_name\n")
    with pytest.raises(ConfigError, match="does not run: ModuleNotFoundError"):
        metric(f"python:{code}:f")
    code.write_text("def score(prompt, wanted, got):\n    return 1\n")
    with pytest.raises(ConfigError, match=r"no function scores \(did you mean score\?\)"):
        metric(f"python:{code}:scores")


def test_a_schema_fetches_nothing(tmp_path):
    schema = tmp_path / "schema.json"
    schema.write_text('{"$ref": "http://127.0.0.1:9/other.json"}')
    with pytest.raises(ConfigError, match="leads outside of the file"):
        metric(f"json:{schema}").score("", "", "{}")


@pytest.mark.parametrize("asked", ["chrf", "json:schema.json"])
def test_a_missing_extra_is_named(asked, monkeypatch, tmp_path):
    for name in ("jsonschema", "sacrebleu", "sacrebleu.metrics"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ConfigError, match=r"pip install 'mlxlora\[metrics\]'"):
        metric(asked)


def test_a_row_that_a_metric_cannot_use_is_known_before_any_answer():
    assert metric("contains").refuses(" ") is not None
    assert metric(r"regex:(\d)").refuses("none") is not None
    assert metric(r"regex:(\d)").refuses("1") is None


def test_metrics_are_taken_once_and_the_table_names_all():
    assert [m.name for m in metrics(["json", "exact", "json"])] == ["json", "exact"]
    assert set(METRICS) == {"exact", "contains", "regex", "json", "chrf", "python"}
