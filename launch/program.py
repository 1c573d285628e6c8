"""What all commands of `draftsmith` share: the program that they register with, and options of one meaning."""

from typing import Annotated

import typer

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Train, prove, measure and publish drafters for speculative decoding.",
)
datastore = typer.Typer(no_args_is_help=True, help="Texts to retrieve drafts from.")
app.add_typer(datastore, name="datastore")
Count = Annotated[int, typer.Option(min=1)]
Target = Annotated[str, typer.Option(help="Hub id, directory or bundled:NAME")]


def say(line: str) -> None:
    print(line, flush=True)
