"""What all commands of `draftsmith` share: the program that they register with, and options of one meaning."""

import json
from typing import Annotated

import typer

from draftsmith.models.errors import UserError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Train, prove, measure and publish drafters for speculative decoding.",
)
Count = Annotated[int, typer.Option(min=1)]
Target = Annotated[str, typer.Option(help="Hub id, directory or bundled:NAME")]
TemplateArgs = Annotated[
    list[str],
    typer.Option(
        help="NAME=VALUE: a variable of the chat template, such as enable_thinking=false; strftime_now=DATE: what its "
        "clock shows",
    ),
]


def template_variables(given: list[str]) -> dict:
    """["enable_thinking=false", "style=terse"] -> {"enable_thinking": False, "style": "terse"}: what is JSON is read as
    such.
    """
    found = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not name.isidentifier() or not equals:
            raise UserError(f"--template-arg: found {text!r}, expected NAME=VALUE")
        if name in found:
            raise UserError(f"--template-arg: found {name} twice, expected each once")
        try:
            found[name] = json.loads(value)
        except ValueError:
            found[name] = value
    return found


def say(line: str) -> None:
    print(line, flush=True)
