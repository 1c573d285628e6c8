"""What all commands of `draftsmith` share: the program that they register with, options of one meaning, and how they
end when they are interrupted.
"""

import json
import os
import re
import sys
from pathlib import Path
from typing import Annotated

import typer
from typer.core import TyperCommand, TyperGroup

from draftsmith.models.errors import UserError

INTERRUPTED = 130  # exit code
TEXTS = {"prompt", "system", "template_arg", "overrides"}  # arguments that are no places
AT_HOME = re.compile(r"((?:[\w.-]+=)?(?:[\w-]+:)*)(~[\w.-]*(?:/.*)?)", re.DOTALL)


class Commands(TyperGroup):
    def invoke(self, context):
        """Ctrl-C ends every command with a line and its own exit code."""
        try:
            return super().invoke(context)
        except KeyboardInterrupt as interrupt:
            interrupted(interrupt)
            raise SystemExit(INTERRUPTED) from None


class Command(TyperCommand):
    def parse_args(self, context, arguments):
        """`--output=~/x` and `NAME=~/x` mean what `--output ~/x` does, which the shell expands."""
        rest = super().parse_args(context, arguments)
        context.params = {name: value if name in TEXTS else expanded(value) for name, value in context.params.items()}
        return rest


class Program(typer.Typer):
    def command(self, *arguments, **options):
        return super().command(*arguments, **{"cls": Command, **options})


def expanded(value):
    """A place, or several, with the user's home in the place of `~`, also behind NAME= and METHOD:."""
    if isinstance(value, (list, tuple)):
        return type(value)(map(expanded, value))
    if not isinstance(value, (str, Path)) or not (found := AT_HOME.fullmatch(str(value))):
        return value
    return type(value)(found[1] + os.path.expanduser(found[2]))


app = Program(
    cls=Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Train, prove, measure and publish drafters for speculative decoding.",
)
datastore = Program(no_args_is_help=True, help="Texts to retrieve drafts from.")
app.add_typer(datastore, name="datastore")
Recipe = Annotated[str, typer.Argument(help="YAML file")]
Drafter = Annotated[str, typer.Argument(help="directory, Hub id or bundled:NAME")]
Count = Annotated[int, typer.Option(min=1, help="how many are written")]
Limit = Annotated[int, typer.Option(min=1, help="only the first so many prompts of a file")]
NewTokens = Annotated[int, typer.Option(min=2, help="of an answer, at most")]
Temperature = Annotated[float, typer.Option(help="0: greedy")]
Temperatures = Annotated[list[float], typer.Option(help="0: greedy; several may be given")]
Batches = Annotated[list[int], typer.Option(min=1, help="prompts at a time; several may be given")]
Dtype = Annotated[str, typer.Option(help="fp32, bf16, fp16; default: fp32 on a CPU, else the checkpoint's")]
Seed = Annotated[int, typer.Option(help="of what is drawn at random")]
HeldOut = Annotated[bool, typer.Option(help="of the share that no training of the bundled targets saw")]
Output = Annotated[str, typer.Option(help="folder of the results")]
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


def interrupted(interrupt: KeyboardInterrupt) -> None:
    """The line that says what is kept (that of `models.errors.Interrupted`) and how to go on."""
    print(f"interrupted; {str(interrupt) or 'nothing is kept: the same command begins anew'}", file=sys.stderr)
