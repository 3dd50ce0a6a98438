"""mlxlora push and mlxlora pull."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mlxlora.verbs.options import AsJson

if TYPE_CHECKING:
    from mlxlora.console import Screen
    from mlxlora.export.hub import Pushed

Repo = Annotated[str, typer.Argument(metavar="REPO", help="owner/name on the Hub")]


def push(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="adapter, model or run directory")],
    repo: Repo,
    private: Annotated[
        bool, typer.Option("--private", help="if the repo is new: only you see it")
    ] = False,
    revision: Annotated[
        str | None, typer.Option("--revision", metavar="BRANCH", help="branch, made if need be")
    ] = None,
    message: Annotated[str, typer.Option("--message", help="of the commit")] = "",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="list what would be sent, and send nothing")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Send an adapter or a model to the Hub."""
    from mlxlora.console import Screen
    from mlxlora.export.hub import push as send

    screen = Screen(as_json)
    try:
        done = send(
            path, repo, private=private, revision=revision, message=message, dry_run=dry_run
        )
    except KeyboardInterrupt:
        screen.say("Interrupted. Files that arrived whole are not sent again by:", "yellow")
        screen.command(
            *("mlxlora", "push", path, repo, *["--private"] * private, *["--dry-run"] * dry_run),
            *(["--revision", revision] if revision else []),
            *(["--message", message] if message else []),
        )
        raise typer.Exit(3) from None
    _show(screen, done, dry_run)
    screen.result({**dataclasses.asdict(done), "dry_run": dry_run})


def _show(screen: "Screen", done: "Pushed", dry_run: bool) -> None:
    from mlxlora.console import size

    if done.created:
        named = {True: "private", False: "public", None: "as visible as its owner's others"}
        repo = f"a new repo, {named[done.private]}"
    else:
        repo = f"there already, {'private' if done.private else 'public'}"
    screen.facts(
        [
            ("from", f"{done.path}, {done.kind}"),
            ("to", f"{done.repo}, {repo}"),
            ("branch", done.revision + ", a new one" * done.branched),
            *([("left out", ", ".join(done.left_out))] if done.left_out else []),
            *([("removed", f"{', '.join(done.removed)} (of before)")] if done.removed else []),
        ]
    )
    screen.say()
    screen.table(
        ["file", "bytes", "on the Hub"],
        [(file.name, f"{file.bytes:,}", file.state) for file in done.files],
    )
    screen.say()
    total = size(sum(file.bytes for file in done.to_send))
    files = f"{len(done.to_send)} of {len(done.files)} files, {total}"
    if dry_run:
        screen.say(f"Nothing was sent. Without --dry-run: {files}.")
    elif not (done.to_send or done.removed):
        screen.say("Nothing to send: the branch holds these very files.", "green")
    else:
        screen.say(f"Sent {files}:", "green")
        screen.command(done.url)


def pull(
    repo: Repo,
    out: Annotated[
        Path | None,
        typer.Option("--out", help="new directory for it", show_default="the Hub's cache"),
    ] = None,
    revision: Annotated[
        str | None, typer.Option("--revision", help="branch, tag or commit")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Fetch an adapter or a model from the Hub, and check it."""
    from mlxlora.console import Screen, size
    from mlxlora.export.hub import pull as fetch

    screen = Screen(as_json)
    try:
        done = fetch(repo, revision=revision, out=out)
    except KeyboardInterrupt:
        screen.say("Interrupted. Files that arrived whole are not fetched again by:", "yellow")
        screen.command(
            *("mlxlora", "pull", repo, *(["--out", out] if out else [])),
            *(["--revision", revision] if revision else []),
        )
        raise typer.Exit(3) from None
    screen.say(
        f"{done.kind.capitalize()} of {size(done.bytes)}, whole, at commit {done.commit[:12]}:",
        "green",
    )
    screen.command(done.path)
    screen.result(dataclasses.asdict(done))
