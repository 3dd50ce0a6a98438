"""The command line: the table of verbs (a file each in verbs/), and what an error becomes.

Heavy imports happen inside the verbs, so that --help is instant. Exit codes: 0 done,
1 unexpected, 2 the user's input, 3 interrupted and resumable.
"""

import errno
import sys
from typing import Annotated, NoReturn

import typer

from mlxlora import __version__
from mlxlora.errors import MlxLoraError
from mlxlora.verbs import (
    adapter,
    bench,
    chat,
    completion,
    data,
    doctor,
    evaluate,
    export,
    fuse,
    hub,
    merge,
    plan,
    quantize,
    quickstart,
    report,
    resume,
    runs,
    serve,
    sweep,
    train,
)

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="LoRA fine-tuning on the Mac on your desk. Start with: mlxlora quickstart",
)
app.command()(quickstart.quickstart)
app.command()(plan.plan)
app.command()(data.data)
app.command()(train.train)
app.command()(resume.resume)
app.command()(sweep.sweep)
app.command("eval")(evaluate.evaluate)
app.command()(report.report)
app.command()(runs.runs)
app.command()(chat.chat)
app.command()(serve.serve)
app.command()(fuse.fuse)
app.command()(export.export)
app.command()(quantize.quantize)
app.command()(hub.push)
app.command()(hub.pull)
app.command()(bench.bench)
app.command()(doctor.doctor)
app.command()(completion.completion)

adapters = typer.Typer(no_args_is_help=True, help="Look at adapters, check, merge and import them.")
adapters.command()(adapter.info)
adapters.command()(adapter.verify)
adapters.command(cls=merge.Spread)(merge.merge)
adapters.command("import")(adapter.import_)
app.add_typer(adapters, name="adapter")

_CANNOT_WRITE = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EROFS),
    *(errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG),
}


def main() -> None:
    """The program: errors of the user's input are one message and exit code 2."""
    try:
        completion.answer_shells()
        app(prog_name="mlxlora")
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


if __name__ == "__main__":
    main()
