"""mlxlora serve."""

import contextlib
import ipaddress
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mlxlora.errors import ConfigError
from mlxlora.verbs.options import Adapters, AsJson, Force, Model, Trust, named_adapters

if TYPE_CHECKING:
    from mlxlora.lora.adapter import Adapter

KEY_VARIABLE = "MLXLORA_API_KEY"
OF_A_RUN = "adapter"  # a run's directory says more than that of the adapter in it


def serve(
    model: Model,
    adapter: Adapters = None,
    host: Annotated[str, typer.Option(help="address to listen on")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any free one")] = 8080,
    api_key: Annotated[
        str,
        typer.Option(
            envvar=KEY_VARIABLE, help="wanted of every client; needed beyond this machine"
        ),
    ] = "",
    name: Annotated[
        str, typer.Option(help="the base's name in requests", show_default="that of --model")
    ] = "",
    adapter_root: Annotated[
        str,
        typer.Option(
            metavar="DIR", help="clients may load adapters below it", show_default="they may not"
        ),
    ] = "",
    slots: Annotated[
        int, typer.Option(min=1, help="adapters that are decoded together, at most")
    ] = 8,
    batch: Annotated[int, typer.Option(min=1, help="answers decoded together, at most")] = 32,
    queue: Annotated[
        int, typer.Option(min=0, help="requests that may wait; more are refused (429)")
    ] = 128,
    context: Annotated[
        int | None,
        typer.Option(
            min=16, help="tokens of prompt and answer", show_default="the model's, if they fit"
        ),
    ] = None,
    prompt_cache: Annotated[
        str,
        typer.Option(
            metavar="SIZE", help="memory for prompts seen before, e.g. 1GB", show_default="2GB"
        ),
    ] = "",
    max_tokens: Annotated[
        int, typer.Option(min=1, help="of a chat's answer, where a request says nothing")
    ] = 4096,
    temperature: Annotated[
        float, typer.Option(min=0, max=2, help="where a request says nothing")
    ] = 0.0,
    allow_host: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="a name of this server; repeatable")
    ] = None,
    allow_origin: Annotated[
        list[str] | None,
        typer.Option(metavar="URL", help="pages of this origin may ask; repeatable"),
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="no line for each answer")] = False,
    force: Force = False,
    as_json: AsJson = False,
    trust_remote_code: Trust = False,
) -> None:
    """Serve the base and its adapters, OpenAI-compatible, with a chat page at /."""
    root = Path(adapter_root) if adapter_root else None
    if root is not None and not root.is_dir():
        raise ConfigError(f"--adapter-root {adapter_root}: no such directory")
    if not _own(host) and not api_key:
        raise ConfigError(
            f"--host {host} lets others reach this server: give it a key with {KEY_VARIABLE} "
            "in the environment (or --api-key)"
        )
    from mlxlora.base import load
    from mlxlora.console import Screen
    from mlxlora.memory import parse_size
    from mlxlora.serve.engine import Engine, Options
    from mlxlora.serve.http.app import application
    from mlxlora.serve.http.guard import Rules, machine_names
    from mlxlora.serve.http.server import listen, run
    from mlxlora.serve.http.service import Service
    from mlxlora.serve.wire.model import Defaults
    from mlxlora.verbs.signals import ending_cleanly

    screen = Screen(as_json)
    kept = parse_size(prompt_cache, "--prompt-cache") if prompt_cache else None
    adapters = _short_names(named_adapters(adapter))
    rules = Rules(
        hosts=frozenset(allow_host or ()) | (frozenset() if _own(host) else machine_names()),
        origins=frozenset(allow_origin or ()),
        key=api_key,
    )
    listener = listen(host, port)  # before the model is read, which takes longer
    base = load(model, trust_remote_code=trust_remote_code)
    own_name = name or base.identity.public_name
    if own_name in adapters:
        raise ConfigError(f"{own_name} is the base's name: name the adapter otherwise")
    options = Options(rows=batch, waiting=queue, slots=slots, prefixes=kept, context=context)
    with ending_cleanly(), Engine(base, adapters, options, force=force) as engine:
        service = Service(
            engine,
            own_name,
            Defaults(temperature=temperature, max_tokens=max_tokens),
            root,
            (lambda line: None) if quiet else screen.say,
        )
        url = f"http://{_shown(host)}:{listener.getsockname()[1]}"

        def ready() -> None:
            screen.facts(
                [
                    ("page", url),
                    ("API", f"{url}/v1"),
                    ("models", ", ".join(one["id"] for one in service.models())),
                    (
                        "context",
                        f"{engine.room.context:,} tokens, {engine.together.rows} answers at once",
                    ),
                ]
            )
            screen.say("Ctrl-C stops it.", "dim")
            screen.result({"url": url, "models": service.models()})

        with contextlib.suppress(KeyboardInterrupt):  # the usual end
            run(application(service, rules), listener, ready, engine.stop)
    screen.say("stopped", "dim")


def _own(host: str) -> bool:
    """Whether nobody but this machine reaches the address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _shown(host: str) -> str:
    address = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"[{address}]" if ":" in address else address


def _short_names(adapters: "dict[str, Adapter]") -> "dict[str, Adapter]":
    """Named as requests can name them: of a directory that has no name, the last part."""
    from mlxlora.errors import AdapterError
    from mlxlora.serve.http.library import check_name

    found: dict[str, Adapter] = {}
    for name, adapter in adapters.items():
        parts = [part for part in os.path.normpath(name).split("/") if part]
        short = parts[-2] if parts[-1:] == [OF_A_RUN] and parts[1:] else parts[-1]
        try:
            check_name(short)
        except AdapterError as error:
            raise ConfigError(f"--adapter {name}: {error}; --adapter NAME=DIR names it") from error
        if short in found:
            raise ConfigError(f"two adapters are named {short}: --adapter NAME=DIR names them")
        found[short] = adapter
    return found
