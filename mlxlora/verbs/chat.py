"""mlxlora chat."""

from typing import Annotated

import typer

from mlxlora.errors import ConfigError
from mlxlora.verbs.options import Adapters, AsJson, Force, Model, Trust, named_adapters

COMPARED = 8  # answers at once, at most


def chat(
    model: Model,
    adapter: Adapters = None,
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
    plain: Annotated[
        bool, typer.Option("--plain", help="show answers as they are written, not as Markdown")
    ] = False,
    force: Force = False,
    as_json: AsJson = False,
    trust_remote_code: Trust = False,
) -> None:
    """Talk to the base or a tuned model; of several adapters, the first begins."""
    if as_json and prompt is None:
        raise ConfigError("chat --json answers one --prompt")
    from mlxlora.base import load
    from mlxlora.chat import Conversation
    from mlxlora.console import Screen
    from mlxlora.repl import answer_once, talk
    from mlxlora.serve.engine import Engine, Options
    from mlxlora.serve.orders import Sampling

    adapters = named_adapters(adapter)
    base = load(model, trust_remote_code=trust_remote_code)
    sampling = Sampling(temperature, top_p, seed=seed)
    with Engine(base, adapters, Options(rows=COMPARED), force=force) as engine:
        first = next(iter(adapters), None)
        conversation = Conversation(engine, first, sampling, max_tokens, raw, system)
        if prompt is None:
            talk(conversation, Screen(), plain=plain, force=force)
        else:
            answer_once(conversation, prompt, Screen(as_json))
