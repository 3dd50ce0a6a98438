"""Push and pull, against a local server that speaks the Hub's API."""

import hashlib
import json
import shlex
import shutil
import subprocess
import sys
import types

import mlx.core as mx
import pytest
from documents import blocks, guide
from hub_server import READ_ONLY, TOKEN, environment, serving, use
from mlx.utils import tree_flatten
from typer.testing import CliRunner

import mlxlora
from mlxlora.cli import app
from mlxlora.errors import AdapterError, ExportError, MlxLoraError, ModelError
from mlxlora.export import hub as export_hub
from mlxlora.export import shards as writer
from mlxlora.export.hub import pull, push
from mlxlora.lora.adapter import Adapter
from mlxlora.skeleton import open_skeleton

NAME = "someone/thing"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A Hub, and this process logged in there; who waits for it does not wait."""
    with serving() as hub:
        use(monkeypatch, hub.endpoint, tmp_path / "home", TOKEN)
        for module in ("huggingface_hub.utils._http", "huggingface_hub.file_download"):
            __import__(module)
            clock = types.SimpleNamespace(**{**vars(sys.modules[module].time)})
            clock.sleep = lambda seconds: None
            monkeypatch.setattr(sys.modules[module], "time", clock)
        yield hub


@pytest.fixture
def adapter(tmp_path):
    """An adapter's directory; its weights are a large file there."""
    return an_adapter(tmp_path / "made" / "adapter", 1)


@pytest.fixture
def model(dense_path, adapter, tmp_path):
    """A fused model."""
    mlxlora.fuse(dense_path, Adapter.load(adapter), tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def sharded(dense, dense_path, tmp_path, monkeypatch):
    """A model in several files, and their names."""
    out = tmp_path / "sharded"
    tensors = iter(tree_flatten(dense.model.parameters()))
    config = json.loads((dense_path / "config.json").read_text())
    with monkeypatch.context() as small:
        small.setattr(writer, "SHARD_BYTES", 100_000)
        writer.write_model(out, tensors, config, dense_path, 0)
    return out, sorted(file.name for file in out.glob("model-*.safetensors"))


def an_adapter(path, seed):
    key = mx.random.key(seed)
    weights = {"model.layers.0.self_attn.q_proj.lora_a": mx.random.normal((64, 40), key=key)}
    weights["model.layers.0.self_attn.q_proj.lora_b"] = mx.zeros((40, 64))
    return Adapter("lora", weights, rank=40, scale=2.0, blocks=2).save(path)


def bytes_of(directory):
    return {file.name: file.read_bytes() for file in directory.iterdir() if file.is_file()}


def states(pushed):
    return {file.name: file.state for file in pushed.files}


def sha256(content):
    return hashlib.sha256(content).hexdigest()


def run(*arguments):
    return CliRunner().invoke(app, list(map(str, arguments)))


def test_an_adapter_comes_back_byte_for_byte(hub, adapter, tmp_path):
    pushed = push(adapter, NAME, message="hello")
    assert (pushed.kind, pushed.created, pushed.private) == ("an adapter", True, False)
    assert set(states(pushed).values()) == {"new"} and set(states(pushed)) == set(bytes_of(adapter))
    assert pushed.commit == hub.repos[NAME].commit("main") and pushed.commit in pushed.url
    assert hub.repos[NAME].messages[-1] == "hello"
    assert hub.files(NAME).items() >= bytes_of(adapter).items()
    pulled = pull(NAME, out=tmp_path / "back")
    assert bytes_of(tmp_path / "back") == bytes_of(adapter)
    assert (pulled.path, pulled.kind, pulled.commit) == (
        tmp_path / "back",
        "an adapter",
        pushed.commit,
    )
    assert pulled.bytes == sum(map(len, bytes_of(adapter).values()))
    assert sorted(path.name for path in tmp_path.glob(".back*")) == []


def test_a_model_comes_back_and_loads(hub, model, dense_path, tmp_path):
    push(model, NAME)
    assert hub.received == (model / "model.safetensors").stat().st_size + sum(
        len(content) for name, content in bytes_of(model).items()
        if name != "model.safetensors" and len(content) >= hub.large
    )  # fmt: skip
    pull(NAME, out=tmp_path / "back")
    assert bytes_of(tmp_path / "back") == bytes_of(model)
    mlxlora.load(tmp_path / "back")


def test_without_out_a_pull_stays_in_the_cache_and_serves_offline(hub, model, monkeypatch):
    push(model, NAME)
    pulled = pull(NAME)
    assert pulled.path.name == pulled.commit and "models--someone--thing" in str(pulled.path)
    assert bytes_of(pulled.path) == bytes_of(model)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert mlxlora.load(NAME).path == pulled.path


def test_an_adapter_is_loaded_by_its_hub_id(hub, adapter, tmp_path, monkeypatch):
    push(adapter, NAME)
    monkeypatch.chdir(tmp_path)
    for offline in (False, True):
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", offline)
        loaded, made = Adapter.load(NAME), Adapter.load(adapter)
        assert loaded.config() == made.config() and loaded.provenance == made.provenance
        assert all(
            mx.array_equal(loaded.weights[name], made.weights[name]) for name in made.weights
        )
    with pytest.raises(AdapterError, match="neither a directory here nor to be had from the Hub"):
        Adapter.load("someone/nothing")
    (tmp_path / "someone" / "thing").mkdir(parents=True)  # a path here comes first
    with pytest.raises(AdapterError, match="not an adapter directory"):
        Adapter.load(NAME)


def test_a_run_is_pushed_as_its_adapter(hub, adapter):
    (adapter.parent / "run.toml").write_text("[data]\n")
    pushed = push(adapter.parent, NAME)
    assert pushed.path == str(adapter)
    assert set(bytes_of(adapter)) == set(hub.files(NAME)) - {".gitattributes"}


def test_an_adapter_of_peft_goes_along(hub, tmp_path):
    directory = tmp_path / "peft"
    directory.mkdir()
    (directory / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    mx.save_safetensors(str(directory / "adapter_model.safetensors"), {"a": mx.zeros((3,))})
    assert push(directory, NAME).kind == "an adapter"
    assert bytes_of(pull(NAME).path) == bytes_of(directory)


def test_only_what_belongs_is_sent(hub, adapter):
    left = ["run.toml", "log.jsonl", ".env", "token", "stored_tokens", "hf_token.json", "notes.txt"]
    for name in [*left, "README.md", "LICENSE", ".a.gguf", "a.gguf"]:
        (adapter / name).write_text("---\nlicense: mit\n---\n")
    (adapter / "checkpoints").mkdir()
    (adapter / "checkpoints" / "README.md").write_text("x")
    pushed = push(adapter, NAME)
    assert {*left, ".a.gguf", "checkpoints/"} == set(pushed.left_out)
    assert set(hub.files(NAME)) - {".gitattributes"} == {
        *("README.md", "LICENSE", "a.gguf", "provenance.json"),
        *("adapter_config.json", "adapters.safetensors"),
    }


def test_a_link_is_refused(hub, adapter, tmp_path):
    (tmp_path / "secret").write_text("x")
    (adapter / "LICENSE").symlink_to(tmp_path / "secret")
    with pytest.raises(ExportError, match=r"LICENSE is a link"):
        push(adapter, NAME)
    assert hub.asked == []


@pytest.mark.parametrize("token", [TOKEN, "hf_" + "AnotherOnes" * 3])
def test_a_file_with_a_token_in_it_is_refused(hub, adapter, token):
    (adapter / "README.md").write_text(f"run with HF_TOKEN={token}\n")
    with pytest.raises(ExportError, match=r"README.md holds a Hub token") as caught:
        push(adapter, NAME)
    assert token not in str(caught.value) and hub.asked == []


def test_a_private_repo_is_only_for_who_is_logged_in(hub, adapter, monkeypatch):
    assert push(adapter, NAME, private=True).private is True
    assert hub.repos[NAME].private
    assert bytes_of(pull(NAME).path) == bytes_of(adapter)
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(ExportError, match="does not exist, or is private and you are not logged"):
        pull(NAME)
    with pytest.raises(ExportError, match="you are not logged in to the Hub"):
        push(adapter, NAME)


def test_private_is_never_a_repo_that_is_public(hub, adapter):
    push(adapter, NAME)
    with pytest.raises(ExportError, match="is there already and is public"):
        push(adapter, NAME, private=True)


def test_a_branch_is_made_and_pulled(hub, adapter, tmp_path):
    push(adapter, NAME)
    other = an_adapter(tmp_path / "other", 2)
    pushed = push(other, NAME, revision="rank/40")
    assert (pushed.revision, pushed.branched, pushed.created) == ("rank/40", True, False)
    assert states(pushed) == {
        "README.md": "changed",
        "adapter_config.json": "there already",
        "adapters.safetensors": "changed",
        "provenance.json": "changed",
    }
    assert bytes_of(pull(NAME, revision="rank/40").path) == bytes_of(other)
    assert bytes_of(pull(NAME, revision=pushed.commit).path) == bytes_of(other)
    assert bytes_of(pull(NAME).path) == bytes_of(adapter)


def test_what_is_there_already_makes_no_commit(hub, adapter):
    first = push(adapter, NAME)
    received, commits = hub.received, len(hub.repos[NAME].commits)
    again = push(adapter, NAME)
    assert set(states(again).values()) == {"there already"} and again.to_send == []
    assert (again.commit, hub.received) == (first.commit, received)
    assert len(hub.repos[NAME].commits) == commits


def test_a_push_cut_off_goes_on_with_what_had_not_arrived(hub, sharded, tmp_path):
    directory, shards = sharded
    assert len(shards) > 1
    content = (directory / shards[-1]).read_bytes()
    hub.cuts[sha256(content)] = 20_000
    with pytest.raises(ExportError, match="same command goes on from here") as caught:
        push(directory, NAME)
    assert "no connection to the Hub" in str(caught.value)
    assert set(hub.files(NAME)) == {".gitattributes"}  # nothing half there for others to see
    hub.cuts.clear()
    hub.received = 0
    push(directory, NAME)
    assert hub.received == len(content)
    pull(NAME, out=tmp_path / "back")
    assert bytes_of(tmp_path / "back") == bytes_of(directory)


def test_a_connection_that_fails_for_a_moment_fails_nothing(hub, adapter, monkeypatch):
    name = sha256((adapter / "adapters.safetensors").read_bytes())
    hub.cuts[name] = 5_000
    clock = sys.modules["huggingface_hub.utils._http"].time
    monkeypatch.setattr(clock, "sleep", lambda seconds: hub.cuts.clear())
    push(adapter, NAME)
    assert hub.files(NAME).items() >= bytes_of(adapter).items() and hub.cuts == {}


def test_large_files_go_in_parts(hub, adapter):
    hub.part = 4_096
    push(adapter, NAME)
    size = (adapter / "adapters.safetensors").stat().st_size
    assert len(hub.parts) == -(-size // hub.part) > 2
    assert bytes_of(pull(NAME).path) == bytes_of(adapter)


def test_a_dry_run_sends_nothing(hub, adapter):
    before = push(adapter, NAME, private=True, dry_run=True)
    assert hub.writes() == [] and hub.repos == {}
    assert (before.created, before.private, before.commit) == (True, True, "")
    sizes = {file.name: file.bytes for file in before.files}
    assert sizes == {name: len(content) for name, content in bytes_of(adapter).items()}
    push(adapter, NAME)
    hub.asked.clear()
    after = push(adapter, NAME, revision="other", dry_run=True)
    assert hub.writes() == [] and list(hub.repos[NAME].branches) == ["main"]
    assert after.to_send == [] and after.created is False and after.private is False


def test_a_commit_of_someone_else_meanwhile_is_not_built_upon(hub, adapter, monkeypatch):
    """What was compared with the branch, and is to be removed from it, was another commit."""
    push(adapter, NAME)
    other = an_adapter(adapter.parent / "other", 2)
    ours = export_hub._operations

    def theirs_first(pushed):
        hub.repos[NAME].add("main", {"README.md": b"theirs"}, "theirs")
        return ours(pushed)

    monkeypatch.setattr(export_hub, "_operations", theirs_first)
    with pytest.raises(ExportError, match=r"answers 412 \(A commit has happened since"):
        push(other, NAME)
    assert hub.files(NAME) == {"README.md": b"theirs"}


def test_weights_of_before_do_not_stay_beside_new_ones(hub, sharded, model, tmp_path):
    directory, shards = sharded
    push(directory, NAME)
    assert push(model, NAME, dry_run=True).removed == tuple(shards)
    pushed = push(model, NAME)
    assert pushed.removed == tuple(shards)
    pull(NAME, out=tmp_path / "back")
    assert bytes_of(tmp_path / "back") == bytes_of(model)


def test_an_adapter_is_not_pushed_into_a_models_repo(hub, model, adapter):
    push(model, NAME)
    with pytest.raises(ExportError, match="holds a model; push an adapter to a repo of its own"):
        push(adapter, NAME)


@pytest.mark.parametrize(
    "make, says",
    [
        (lambda path: None, "does not exist; a push takes"),
        (lambda path: path.write_text("x"), "is a file; a push takes"),
        (lambda path: path.mkdir(), "neither of what is expected: an adapter"),
    ],
)
def test_what_is_neither_adapter_nor_model_is_refused(hub, tmp_path, make, says):
    make(tmp_path / "it")
    with pytest.raises(ExportError, match=says):
        push(tmp_path / "it", NAME)
    assert hub.asked == []


def test_what_is_damaged_or_both_is_refused(hub, adapter, model, tmp_path):
    weights = adapter / "adapters.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(AdapterError, match="truncated"):
        push(adapter, NAME)
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(ModelError, match="truncated"):
        push(model, NAME)
    both = an_adapter(tmp_path / "both", 1)
    for file in model.iterdir():
        shutil.copy(file, both)
    with pytest.raises(ExportError, match="both an adapter and a model"):
        push(both, NAME)
    assert hub.asked == []


@pytest.mark.parametrize("name", ["thing", "datasets/someone/thing", "", "a b/c", "../x", "a--b/c"])
def test_a_name_that_is_none_is_refused(hub, adapter, name):
    for attempt in (lambda: push(adapter, name), lambda: pull(name)):
        with pytest.raises(ExportError, match=r"no name on the Hub|epo id|repo_id"):
            attempt()
    assert hub.asked == []


def test_a_push_goes_to_a_branch(hub, adapter):
    pushed = push(adapter, NAME)
    hub.repos[NAME].tags["v1"] = pushed.commit
    with pytest.raises(ExportError, match="v1 is a tag"):
        push(adapter, NAME, revision="v1")
    with pytest.raises(ExportError, match="is a commit"):
        push(adapter, NAME, revision=pushed.commit)
    assert pull(NAME, revision="v1").commit == pushed.commit


def test_who_may_not_is_told_why(hub, adapter, monkeypatch):
    with pytest.raises(ExportError, match="only under: someone, lab"):
        push(adapter, "stranger/thing")
    push(adapter, "lab/thing")
    monkeypatch.setenv("HF_TOKEN", READ_ONLY)
    with pytest.raises(ExportError, match=r"may not do that \(your token is for reading\)"):
        push(adapter, "someone/new")
    monkeypatch.setenv("HF_TOKEN", "hf_" + "wrong" * 6)
    for attempt in (lambda: push(adapter, NAME), lambda: pull("lab/thing")):
        with pytest.raises(ExportError, match="does not accept your token"):
            attempt()


def test_what_is_not_there_is_told(hub, adapter, tmp_path):
    push(adapter, NAME)
    hub.put("someone/rows", {"rows.jsonl": b"{}"}, kind="dataset")
    hub.put("someone/asked", {"config.json": b"{}"}, gated=True)
    hub.put("someone/pickles", {"config.json": b"{}", "pytorch_model.bin": b"x"})
    for name, revision, says in (
        ("someone/nothing", None, "does not exist, or is private and your token may not see it"),
        (NAME, "v9", "at v9: it has no such branch, tag or commit"),
        ("someone/rows", None, "is a dataset, not a model"),
        ("someone/asked", None, "it is gated; ask for access on its page"),
        ("someone/pickles", None, "neither of what is expected"),
    ):
        with pytest.raises(ExportError, match=says):
            pull(name, revision=revision, out=tmp_path / "back")
    assert not list(tmp_path.glob("*back*"))


def test_no_network_is_one_message(hub, adapter, monkeypatch, tmp_path):
    use(monkeypatch, "http://127.0.0.1:9", tmp_path, TOKEN)
    for attempt in (lambda: push(adapter, NAME), lambda: pull(NAME)):
        with pytest.raises(ExportError, match="no connection to the Hub"):
            attempt()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ExportError, match="HF_HUB_OFFLINE is set"):
        pull(NAME)


def test_a_pull_never_overwrites(hub, adapter, tmp_path):
    push(adapter, NAME)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes").write_text("mine")
    hub.asked.clear()
    with pytest.raises(ExportError, match="never overwritten"):
        pull(NAME, out=tmp_path / "mine")
    assert hub.asked == [] and bytes_of(tmp_path / "mine") == {"notes": b"mine"}


def test_a_pull_cut_off_leaves_nothing_and_goes_on(hub, sharded, tmp_path):
    directory, shards = sharded
    push(directory, NAME)
    hub.cuts[shards[0]] = 30_000
    with pytest.raises(ExportError, match="files that arrived whole are kept"):
        pull(NAME, out=tmp_path / "back")
    assert not (tmp_path / "back").exists()
    hub.cuts.clear()
    hub.asked.clear()
    pull(NAME, out=tmp_path / "back")
    fetched = {path.rpartition("/")[2] for method, path in hub.asked
               if method == "GET" and "/resolve/" in path}  # fmt: skip
    assert fetched == {shards[0]}
    assert bytes_of(tmp_path / "back") == bytes_of(directory)
    assert sorted(path.name for path in tmp_path.glob(".back*")) == []


def test_what_was_fetched_is_checked(hub, adapter, tmp_path):
    push(adapter, NAME)
    files = dict(hub.files(NAME))
    damaged = bytearray(files["adapters.safetensors"])
    damaged[-1] ^= 1
    hub.repos[NAME].add("main", {**files, "adapters.safetensors": bytes(damaged)}, "damage")
    for out in (None, tmp_path / "back"):
        with pytest.raises(AdapterError, match="its hash differs"):
            pull(NAME, out=out)
    assert not list(tmp_path.glob("*back*"))


ECHOES = [
    *(("GET", "/api/models/someone/thing", status) for status in (401, 403, 500)),
    ("POST", "/api/repos/create", 402),
    ("POST", "/preupload/", 403),
    ("POST", "/objects/batch", 422),
    ("POST", "/commit/", 400),
]


@pytest.mark.parametrize("method, path, status", ECHOES)
def test_a_server_that_echoes_the_token_gets_it_nowhere(
    hub, adapter, tmp_path, capfd, method, path, status
):
    hub.echoes[method, path] = status
    done = run("push", adapter, NAME, "--json")
    assert isinstance(done.exception, MlxLoraError), done.output
    text = str(done.exception) + repr(done.exception.__cause__) + done.output
    assert hub.tokens == {TOKEN}  # it was sent, and
    assert TOKEN not in text + "".join(capfd.readouterr())
    assert "cannot push to someone/thing: " in text
    assert ("Bearer hf_..." in text) == (status != 401)  # which says all by itself
    assert ("goes on" in text) == (status >= 500)


@pytest.mark.parametrize("status", [403, 500])
def test_nor_does_one_that_a_model_is_asked_from(hub, capfd, status):
    hub.echoes["GET", "/api/models/"] = status
    for attempt in (pull, mlxlora.load, open_skeleton):
        with pytest.raises(MlxLoraError) as caught:
            attempt(NAME)
        assert TOKEN not in str(caught.value) + "".join(capfd.readouterr())
    assert hub.tokens == {TOKEN}


def test_the_commands_print_what_they_did(hub, adapter, tmp_path):
    (adapter / "notes.txt").write_text("mine")
    dry = run("push", adapter, NAME, "--private", "--dry-run")
    assert dry.exit_code == 0, dry.exception
    assert "a new repo, private" in dry.output and "Nothing was sent" in dry.output
    assert "left out  notes.txt" in dry.output and "adapters.safetensors" in dry.output
    done = run("push", adapter, NAME, "--revision", "side", "--message", "hello", "--json")
    told = json.loads(done.stdout.strip().splitlines()[-1])
    assert (told["repo"], told["revision"], told["dry_run"]) == (NAME, "side", False)
    assert {file["name"] for file in told["files"]} == set(bytes_of(adapter)) - {"notes.txt"}
    assert told["commit"] == hub.repos[NAME].commit("side")
    assert hub.repos[NAME].messages[-1] == "hello"
    assert "branch    side, a new one" in done.stderr
    again = run("push", adapter, NAME, "--revision", "side")
    assert "Nothing to send" in again.output and "a new one" not in again.output
    back = run("pull", NAME, "--revision", "side", "--out", tmp_path / "back", "--json")
    told = json.loads(back.stdout.strip().splitlines()[-1])
    assert (told["path"], told["commit"]) == (
        str(tmp_path / "back"),
        hub.repos[NAME].commit("side"),
    )
    assert TOKEN not in dry.output + done.output + again.output + back.output


def test_the_commands_of_the_guide_run(hub, adapter, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(adapter, "runs/mine/adapter")
    (block,) = (b for b in blocks(guide("exporting"), "sh") if b.startswith("mlxlora push"))
    for line in block.replace("you/", "someone/").splitlines():
        done = run(*shlex.split(line)[1:])
        assert done.exit_code == 0, (line, done.output, done.exception)
    assert bytes_of(tmp_path / "mine") == bytes_of(adapter)
    assert hub.repos["someone/mine"].private


def test_an_interrupted_push_or_pull_says_how_it_goes_on(hub, adapter, monkeypatch):
    def interrupt(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", interrupt)
    for words in (["push", str(adapter), NAME, "--private"], ["pull", NAME]):
        done = run(*words)
        assert done.exit_code == 3
        assert "mlxlora " + " ".join(words) in done.output.replace("\n", " ")


def test_the_program_finds_the_hub_by_hf_endpoint(adapter, tmp_path):
    """In a process of its own, as a user runs it; and the token is written nowhere."""

    def program(*words):
        done = subprocess.run(
            [sys.executable, "-m", "mlxlora.cli", *map(str, words), "--json"],
            capture_output=True,
            text=True,
            env=environment(hub.endpoint, tmp_path / "home", TOKEN),
            timeout=120,
        )
        assert TOKEN not in done.stdout + done.stderr
        return done

    with serving() as hub:
        done = program("push", adapter, NAME, "--private")
        assert done.returncode == 0, done.stderr
        done = program("pull", NAME, "--out", tmp_path / "back")
        assert done.returncode == 0, done.stderr
        hub.echoes["GET", "/api/models/"] = 403
        done = program("pull", NAME)
        assert done.returncode == 2 and "error: cannot pull someone/thing: " in done.stderr
        assert "Bearer hf_..." in done.stderr
        assert hub.tokens == {TOKEN}
    assert bytes_of(tmp_path / "back") == bytes_of(adapter)
    written = {file for file in tmp_path.rglob("*") if file.is_file()}
    assert {tmp_path / "back" / name for name in bytes_of(adapter)} <= written
    assert not [file for file in written if TOKEN.encode() in file.read_bytes()]
