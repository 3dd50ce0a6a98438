"""The command line: each verb parses, makes one library call, and shows the result.

Heavy imports happen inside the verbs, so that --help is instant. Exit codes: 0 done,
1 unexpected, 2 the user's input, 3 interrupted with the weights saved.
"""

import dataclasses
import errno
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, NoReturn

import typer

from mlxlora import __version__
from mlxlora.config import RunConfig
from mlxlora.errors import ConfigError, MlxLoraError
from mlxlora.flags import flags
from mlxlora.schema import toml_value

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="LoRA fine-tuning on the Mac on your desk. Start with: mlxlora quickstart",
)
adapters = typer.Typer(no_args_is_help=True, help="Look at adapters and check them.")
app.add_typer(adapters, name="adapter")

Model = Annotated[str, typer.Option("--model", help="base model: a directory or a Hub id")]
AsJson = Annotated[
    bool, typer.Option("--json", help="the result as JSON on the last line of stdout")
]
Force = Annotated[bool, typer.Option("--force", help="go on with an adapter of another base")]
Sets = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="any option, e.g. lora.rank=32; repeatable"),
]
Trust = Annotated[
    bool, typer.Option("--trust-remote-code", help="run Python that the model brings along")
]

_CANNOT_WRITE = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EROFS),
    *(errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG),
}


def main() -> None:
    """The program: errors of the user's input are one message and exit code 2."""
    try:
        app()
    except MlxLoraError as error:
        _fail(str(error))
    except OSError as error:
        if error.errno not in _CANNOT_WRITE:
            raise
        where = f": {error.filename}" if error.filename else ""
        _fail(f"cannot write{where}: {error.strerror}. Nothing half-written was left behind.")
    except KeyboardInterrupt:
        _fail("interrupted", code=130)


def _fail(message: str, code: int = 2) -> NoReturn:
    from mlxlora.console import fail

    fail(message)
    sys.exit(code)


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="print the version")] = False,
) -> None:
    if version:
        print(f"mlxlora {__version__}")
        raise typer.Exit


@app.command()
def quickstart(
    dir: Annotated[Path, typer.Option("--dir", help="where to write")] = Path("quickstart"),
    as_json: AsJson = False,
) -> None:
    """See the whole story in about a minute, offline, on the bundled tiny base."""
    from mlxlora.quickstart.show import show

    show(dir, as_json)


@app.command()
@flags("lora.", "train.", "data.")
def train(
    overrides: list[str],
    recipe: Annotated[Path | None, typer.Argument(help="TOML file of options")] = None,
    model: Annotated[str, typer.Option("--model", help="base: a directory or a Hub id")] = "",
    data: Annotated[str, typer.Option("--data", help="JSONL file or directory")] = "",
    out: Annotated[str, typer.Option("--out", help="directory of the run, new")] = "",
    set: Sets = None,
    as_json: AsJson = False,
    trust_remote_code: Trust = False,
) -> None:
    """Train an adapter on your rows."""
    named = {"model": model, "data.path": data, "out": out}
    given = [f"{key}={toml_value(value)}" for key, value in named.items() if value]
    run = RunConfig.load(recipe, [*given, *overrides, *(set or [])])
    from mlxlora.base import load
    from mlxlora.console import Screen, TrainingDisplay
    from mlxlora.train.loop import check
    from mlxlora.train.loop import train as events

    check(run)
    screen = Screen(as_json)
    with _stop_on_signal(screen.say) as stop:
        base = load(run.model, trust_remote_code=trust_remote_code)
        done = TrainingDisplay(screen).show(events(run, base, stop=stop))
    assert done is not None
    screen.result(dataclasses.asdict(done))
    if done.reason == "interrupted":
        screen.say(
            f"Interrupted after update {done.update}; its weights are in {done.last}.", "yellow"
        )
        if done.last != done.adapter:
            screen.say(f"The best by validation loss is from update {done.best_update}:", "yellow")
    _next_steps(screen, run, done.adapter)
    if done.reason == "interrupted":
        raise typer.Exit(3)


def _next_steps(screen: Any, run: RunConfig, adapter: str) -> None:
    named = ("--model", run.model, "--adapter", adapter)
    screen.command("mlxlora", "chat", *named)
    screen.command("mlxlora", "fuse", *named, "--out", "fused")


@contextmanager
def _stop_on_signal(say: Callable[[str], None]) -> Iterator[threading.Event]:
    """Ctrl-C or SIGTERM asks the run to stop after its update; a second Ctrl-C ends it now."""
    stop = threading.Event()

    def ask(number: int, frame: FrameType | None) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()
        say("Stopping after this update and saving; once more to stop at once.")

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@app.command("eval")
@flags("data.")
def evaluate(
    overrides: list[str],
    model: Model,
    data: Annotated[str, typer.Option("--data", help="JSONL file, or directory with test.jsonl")],
    adapter: Annotated[
        list[str] | None, typer.Option("--adapter", help="adapter directory; repeatable")
    ] = None,
    with_base: Annotated[bool, typer.Option("--with-base", help="measure the base too")] = False,
    generate: Annotated[
        bool, typer.Option("--generate", help="answer each row and count exact matches")
    ] = False,
    max_tokens: Annotated[int, typer.Option(min=1, help="length of those answers")] = 256,
    rows: Annotated[int, typer.Option(min=0, help="only the first so many rows (0: all)")] = 0,
    set: Sets = None,
    force: Force = False,
    as_json: AsJson = False,
    trust_remote_code: Trust = False,
) -> None:
    """Loss and perplexity per supervised token; exact match with --generate."""
    run = RunConfig.load(None, [f"data.path={toml_value(data)}", *overrides, *(set or [])])
    from mlxlora.base import load
    from mlxlora.console import Screen
    from mlxlora.evaluate import evaluate as results
    from mlxlora.lora.adapter import Adapter

    screen = Screen(as_json)
    base = load(model, trust_remote_code=trust_remote_code)
    named = [(path, Adapter.load(path)) for path in adapter or []]
    found = list(
        results(
            base,
            run.data,
            named,
            with_base=with_base,
            generate=generate,
            max_tokens=max_tokens,
            limit=rows,
            force=force,
            progress=screen.progress,
        )
    )
    columns = ["model", "loss", "perplexity", "tokens", "rows", *["exact"] * generate]
    screen.table(columns, [_figures(result) for result in found])
    screen.result({"results": [_result_json(result) for result in found]})


def _figures(result: Any) -> list[str]:
    exact = [] if result.exact_match is None else [f"{result.exact_match:.1%}"]
    counts = [f"{result.tokens:,}", f"{result.rows:,}"]
    return [result.name, f"{result.loss:.4f}", f"{result.perplexity:.4g}", *counts, *exact]


def _result_json(result: Any) -> dict[str, Any]:
    value = dataclasses.asdict(result)
    value.pop("answers")
    return {k: v for k, v in value.items() if v is not None}


@app.command()
def chat(
    model: Model,
    adapter: Annotated[list[str] | None, typer.Option("--adapter", help="adapter")] = None,
    prompt: Annotated[str | None, typer.Option("--prompt", help="answer once and exit")] = None,
    system: Annotated[str, typer.Option("--system", help="system prompt")] = "",
    raw: Annotated[
        bool | None,
        typer.Option("--raw/--template", help="continue plain text, or use the chat template"),
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="longest answer")] = 512,
    temperature: Annotated[float, typer.Option(min=0, help="0: always the likeliest token")] = 0.0,
    top_p: Annotated[
        float, typer.Option(min=0, max=1, help="sample from this share of probability")
    ] = 1.0,
    seed: Annotated[int, typer.Option(min=0, help="seed of sampling")] = 0,
    force: Force = False,
    as_json: AsJson = False,
    trust_remote_code: Trust = False,
) -> None:
    """Talk to the base or a tuned model."""
    if adapter and len(adapter) > 1:
        raise ConfigError("chat starts with one --adapter; switch with /adapter DIR while chatting")
    if as_json and prompt is None:
        raise ConfigError("chat --json answers one --prompt")
    from mlxlora.base import load
    from mlxlora.chat import Conversation
    from mlxlora.console import Screen
    from mlxlora.generate import Sampling
    from mlxlora.lora.adapter import Adapter
    from mlxlora.repl import answer_once, talk

    base = load(model, trust_remote_code=trust_remote_code)
    conversation = Conversation(base, None, Sampling(max_tokens, temperature, top_p, seed), raw)
    conversation.use(Adapter.load(adapter[0]) if adapter else None, force=force)
    conversation.system = system
    if prompt is None:
        talk(conversation, Screen(), force)
    else:
        answer_once(conversation, prompt, Screen(as_json))


@app.command()
def fuse(
    model: Model,
    adapter: Annotated[str, typer.Option("--adapter", help="adapter directory")],
    out: Annotated[Path, typer.Option("--out", help="directory of the new model")],
    bits: Annotated[
        str,
        typer.Option(
            "--bits",
            metavar="keep|none|4|5|6|8",
            help="of the layers that were trained, over a quantized base: like the base, "
            "unquantized (the whole model), or a number",
            show_default="8 over a base with fewer, else keep",
        ),
    ] = "default",
    force: Force = False,
    as_json: AsJson = False,
    trust_remote_code: Trust = False,
) -> None:
    """Write base + adapter as one model that mlx-lm loads."""
    from mlxlora.console import Screen, size
    from mlxlora.export.fuse import fuse as write
    from mlxlora.lora.adapter import Adapter

    if bits not in ("default", "keep", "none") and not bits.isdigit():
        raise ConfigError(f"--bits must be keep, none, 4, 5, 6 or 8, not {bits!r}")
    wish: Any = int(bits) if bits.isdigit() else bits
    screen = Screen(as_json)
    done = write(
        model,
        Adapter.load(adapter),
        out,
        wish,
        force=force,
        trust_remote_code=trust_remote_code,
    )
    what = f"{done.layers} layers fused" if done.layers else "all weights replaced"
    screen.say(f"{done.path}: {size(done.bytes)}, {what}, {done.bits}")
    if done.worst_error:
        style = "yellow" if done.mean_error > 0.5 else ""
        screen.say(
            f"rounding moved the fused weights by {done.mean_error:.0%} of what training did "
            f"(layer by layer, at most {done.worst_error:.0%})",
            style,
        )
        if done.mean_error > 0.5:
            screen.say("--bits none keeps what was learned exactly; compare both with eval", style)
    screen.result({k: v for k, v in dataclasses.asdict(done).items() if k != "errors"})


@app.command()
def quantize(
    model: Model,
    out: Annotated[Path, typer.Option("--out", help="directory of the new model")],
    bits: Annotated[int, typer.Option("--bits", help="2, 3, 4, 5, 6 or 8")] = 4,
    group_size: Annotated[int, typer.Option(help="weights that share a scale")] = 64,
    as_json: AsJson = False,
    trust_remote_code: Trust = False,
) -> None:
    """Make a quantized base."""
    from mlxlora.console import Screen, size
    from mlxlora.export.quantize import quantize as write

    screen = Screen(as_json)
    count = write(model, out, bits, group_size, trust_remote_code=trust_remote_code)
    screen.say(f"{out}: {size(count)} at {bits} bits")
    screen.result({"path": str(out), "bytes": count, "bits": bits})


@app.command()
def bench(
    model: Annotated[str, typer.Option("--model", help="a directory or a Hub id")] = "",
    shape: Annotated[
        str | None,
        typer.Option(
            help="a model of random weights: tiny, small, qwen3-0.6b, llama-3.2-1b, qwen3-8b",
            show_default="small, without --model",
        ),
    ] = None,
    workload: Annotated[
        list[str] | None,
        typer.Option(
            "--workload", help="rows: answers, mixed, long; repeatable", show_default="answers"
        ),
    ] = None,
    bits: Annotated[int, typer.Option(help="quantize the base: 0 (not), 4 or 8")] = 0,
    batch: Annotated[
        int,
        typer.Option(min=0, help="rows per update", show_default="the workload's: 4, 8, 1"),
    ] = 0,
    rank: Annotated[int, typer.Option(min=1, help="of the adapter")] = 8,
    against: Annotated[str, typer.Option(help="the other side: mlx-lm or none")] = "mlx-lm",
    rounds: Annotated[int, typer.Option(min=1, help="how often each side is measured")] = 3,
    updates: Annotated[
        int,
        typer.Option(min=0, help="optimizer updates measured", show_default="the workload's"),
    ] = 0,
    checkpoint_blocks: Annotated[
        bool,
        typer.Option(
            "--checkpoint-blocks",
            help="both sides compute their blocks again in the backward pass: less memory",
        ),
    ] = False,
    train: Annotated[bool, typer.Option(help="measure training")] = True,
    decode: Annotated[bool, typer.Option(help="measure decoding")] = True,
    as_json: AsJson = False,
) -> None:
    """This machine's training and decoding speed, beside mlx-lm's."""
    if model and shape:
        raise ConfigError("--model and --shape both choose a model; give one of them")
    from mlxlora.bench.compare import BenchError, Options
    from mlxlora.bench.compare import bench as measure
    from mlxlora.bench.show import show_bench
    from mlxlora.console import Screen

    options = Options(
        model=model,
        shape=shape or "small",
        workloads=tuple(workload or ("answers",)),
        bits=bits,
        batch=batch,
        rank=rank,
        against=against,
        rounds=rounds,
        updates=updates,
        checkpoint_blocks=checkpoint_blocks,
        train=train,
        decode=decode,
    )
    screen = Screen(as_json)
    try:
        report = measure(options, screen.progress)
    except BenchError as error:
        _fail(str(error), code=1)
    show_bench(screen, report)
    screen.result(report.to_dict())


@adapters.command("info")
def adapter_info(
    path: Annotated[Path, typer.Argument(metavar="A", help="adapter directory")],
    as_json: AsJson = False,
) -> None:
    """What an adapter is and what it was trained on."""
    from mlxlora.console import Screen
    from mlxlora.lora.adapter import Adapter

    adapter = Adapter.load(path)
    screen = Screen(as_json)
    screen.facts(adapter.facts())
    screen.result({**adapter.config(), "provenance": adapter.provenance})


@adapters.command("verify")
def adapter_verify(
    path: Annotated[Path, typer.Argument(metavar="A", help="adapter directory")],
    model: Model,
    as_json: AsJson = False,
    trust_remote_code: Trust = False,
) -> None:
    """Check an adapter's hash, and that this base is the one it was trained on."""
    from mlxlora.base import load
    from mlxlora.console import Screen
    from mlxlora.lora.adapter import Adapter
    from mlxlora.lora.attach import attach

    adapter = Adapter.load(path)
    base = load(model, trust_remote_code=trust_remote_code)
    attach(base, adapter)
    screen = Screen(as_json)
    screen.say(f"{path}: weights whole, base the same, {len(adapter.modules)} layers fit")
    screen.result({"ok": True, "modules": len(adapter.modules)})


if __name__ == "__main__":
    main()
