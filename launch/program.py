"""What all commands of `draftsmith` share: the program that they register with, options of one meaning, and how they
end when they are interrupted.
"""

import sys
from typing import Annotated

import typer
from typer.core import TyperGroup

INTERRUPTED = 130  # exit code


class Commands(TyperGroup):
    def invoke(self, context):
        """Ctrl-C ends every command with a line and its own exit code."""
        try:
            return super().invoke(context)
        except KeyboardInterrupt as interrupt:
            interrupted(interrupt)
            raise SystemExit(INTERRUPTED) from None


app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Train, prove, measure and publish drafters for speculative decoding.",
)
Count = Annotated[int, typer.Option(min=1)]
Target = Annotated[str, typer.Option(help="Hub id, directory or bundled:NAME")]


def say(line: str) -> None:
    print(line, flush=True)


def interrupted(interrupt: KeyboardInterrupt) -> None:
    """The line that says what is kept (that of `models.errors.Interrupted`) and how to go on."""
    print(f"interrupted; {str(interrupt) or 'nothing is kept: the same command begins anew'}", file=sys.stderr)
