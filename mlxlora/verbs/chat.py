"""mlxlora chat."""

from typing import Annotated

import typer

from mlxlora.errors import ConfigError
from mlxlora.verbs.options import Adapters, AsJson, Force, Model, Trust, named_adapters


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
    from mlxlora.generate import Sampling
    from mlxlora.repl import answer_once, talk

    adapters = named_adapters(adapter)
    base = load(model, trust_remote_code=trust_remote_code)
    sampling = Sampling(max_tokens, temperature, top_p, seed)
    conversation = Conversation(base, adapters, sampling, raw, force=force)
    conversation.system = system
    if prompt is None:
        talk(conversation, Screen(), force)
    else:
        answer_once(conversation, prompt, Screen(as_json))
