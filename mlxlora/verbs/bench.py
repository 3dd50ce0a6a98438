"""mlxlora bench."""

from typing import Annotated

import typer

from mlxlora.errors import ConfigError
from mlxlora.verbs import bench_serve
from mlxlora.verbs.options import AsJson


def bench(
    model: Annotated[str, typer.Option("--model", help="a directory or a Hub id")] = "",
    shape: Annotated[
        str | None,
        typer.Option(
            help="a model of random weights: tiny, mini, small, qwen3-0.6b, llama-3.2-1b, qwen3-8b",
            show_default="small; --serve: mini; --soak: tiny",
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
    serve: Annotated[
        bool, typer.Option("--serve", help="measure serving instead, beside mlx_lm.server")
    ] = False,
    clients: Annotated[str, typer.Option(help="--serve: how many at once")] = "1,8,32",
    requests: Annotated[int, typer.Option(min=1, help="--serve: of each client")] = 4,
    limit: Annotated[float, typer.Option(min=1, help="--serve: seconds for each setting")] = 60.0,
    soak: Annotated[
        int, typer.Option(min=0, help="--serve: so many requests at random, a third of them vanish")
    ] = 0,
    seed: Annotated[int, typer.Option(min=0, help="--soak: of the requests")] = 0,
    as_json: AsJson = False,
) -> None:
    """This machine's training and decoding speed, beside mlx-lm's; --serve: that of serving."""
    if model and shape:
        raise ConfigError("--model and --shape both choose a model; give one of them")
    if serve and soak:
        bench_serve.soak(model, shape or "tiny", rank, soak, seed, as_json)
        return
    if soak:
        raise ConfigError("--soak is of a server: give --serve too")
    if serve:
        chosen = (model, shape or "mini", bits, rank, against, rounds)
        bench_serve.serve(*chosen, clients, requests, limit, as_json)
        return
    from mlxlora.bench.compare import BenchError, Options
    from mlxlora.bench.compare import bench as measure
    from mlxlora.bench.show import show_bench
    from mlxlora.console import Screen, fail

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
        fail(str(error))
        raise typer.Exit(1) from error
    show_bench(screen, report)
    screen.result(report.to_dict())
