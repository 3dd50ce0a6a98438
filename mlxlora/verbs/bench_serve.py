"""mlxlora bench --serve: serving measured, and a server soaked."""

import typer

from mlxlora.errors import ConfigError
from mlxlora.verbs.signals import ending_cleanly


def serve(
    model: str,
    shape: str,
    bits: int,
    rank: int,
    against: str,
    rounds: int,
    clients: str,
    requests: int,
    limit: float,
    as_json: bool,
) -> None:
    """Measure both servers and show it; exit code 1 if a server fails or they answer unlike."""
    from mlxlora.bench.compare import BenchError
    from mlxlora.bench.serving import ServeOptions, bench_serving
    from mlxlora.bench.show_serving import show_serving
    from mlxlora.console import Screen, fail

    options = ServeOptions(
        model=model,
        shape=shape,
        bits=bits,
        rank=rank,
        against=against,
        rounds=rounds,
        clients=numbers(clients),
        requests=requests,
        limit=limit,
    )
    screen = Screen(as_json)
    try:
        with ending_cleanly():  # else a server would be left behind
            report = bench_serving(options, screen.progress)
    except BenchError as error:
        fail(str(error))
        raise typer.Exit(1) from error
    show_serving(screen, report)
    screen.result(report.to_dict())


def soak(model: str, shape: str, rank: int, requests: int, seed: int, as_json: bool) -> None:
    """Soak our server and show what became of it; exit code 1 if it did not stay whole."""
    from mlxlora.bench.compare import BenchError
    from mlxlora.bench.show_serving import show_soak
    from mlxlora.bench.soak import soak as under_load
    from mlxlora.console import Screen, fail

    screen = Screen(as_json)
    try:
        with ending_cleanly():
            report = under_load(model, shape, rank, requests, seed, screen.progress)
    except BenchError as error:
        fail(str(error))
        raise typer.Exit(1) from error
    show_soak(screen, report)
    screen.result(report.to_dict())
    if report.faults:
        raise typer.Exit(1)


def numbers(text: str) -> tuple[int, ...]:
    """1,8,32 -> (1, 8, 32). Raises ConfigError for anything else."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ConfigError(f"--clients {text[:40]!r}: write whole numbers such as 1,8,32") from None
