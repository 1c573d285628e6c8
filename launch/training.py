"""`draftsmith train`: a recipe, checked, with the evaluator that measures its drafter on held-out rows. Also behind
`deepspeed --module draftsmith.train`.
"""

import errno
import os
import sys
from collections.abc import Callable
from pathlib import Path

from draftsmith.launch.program import INTERRUPTED, interrupted, say
from draftsmith.models.errors import ProcessError, UserError, keeping

USAGE = "usage: draftsmith train RECIPE [section.key=value ...] [--dry-run]"


def main(arguments: list[str], tell: Callable[[str], None] = lambda reason: None) -> int:
    """arguments: RECIPE [section.key=value ...]; the launcher's --local_rank is accepted and ignored. Returns the exit
    code.

    tell: gets the reason of exit code 2, which only the first process prints.
    """
    arguments = [a for a in arguments if not a.startswith("--local_rank")]
    try:
        dry = "--dry-run" in arguments
        arguments = [a for a in arguments if a != "--dry-run"]
        if not arguments or arguments[0].startswith("-"):
            raise UserError(USAGE)
        return dry_run(arguments) if dry else run(arguments, tell)
    except (UserError, OSError) as error:
        if os.environ.get("RANK", "0") == "0" or isinstance(error, (ProcessError, OSError)):
            print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        tell(str(error))
        return 2
    except KeyboardInterrupt as interrupt:
        if os.environ.get("RANK", "0") == "0":
            interrupted(interrupt)
        return INTERRUPTED


def run(arguments: list[str], tell: Callable[[str], None]) -> int:
    from draftsmith.train.checkpoint import Terminated, resumes, unwritable
    from draftsmith.train.distributed import read_engine_file
    from draftsmith.train.loop import train
    from draftsmith.train.recipe import DrafterRecipe, read_recipe

    recipe = read_recipe(arguments[0], DrafterRecipe, arguments[1:])
    extra = read_engine_file(recipe.engine.config, Path(arguments[0]))
    try:
        with keeping(lambda: resumes(Path(recipe.output))):
            train(recipe, say, evaluator(recipe), extra)
    except Terminated as reason:
        if os.environ.get("RANK", "0") == "0":
            print(reason, file=sys.stderr)
        tell("saved")
        return reason.code
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise unwritable(error.filename or recipe.output, error, Path(recipe.output)) from None
    return 0


def evaluator(recipe):
    """The acceptance length with the recipe's tree, greedy, as the training loop calls it; None where the recipe keeps
    no rows for it.
    """
    if recipe.evaluation.rows == 0:
        return None
    from draftsmith.eval.measurement.measure import decode_batches, tau
    from draftsmith.eval.sampling import Sampling
    from draftsmith.models.drafters import HeadDrafter
    from draftsmith.models.grow import parse_tree

    policy = parse_tree(recipe.evaluation.tree)

    def measure(target, head, prompts, stops) -> float:
        return tau(
            decode_batches(
                target, HeadDrafter(head, policy), prompts, Sampling(), recipe.evaluation.max_new_tokens, stops, 8
            )
        )

    return measure


def dry_run(arguments: list[str]) -> int:
    """Prints what the run will take; nothing is trained or written."""
    import tempfile

    import torch
    from rich.console import Console
    from rich.table import Table

    from draftsmith.models.chat import load_tokenizer
    from draftsmith.models.notes import notes
    from draftsmith.models.targets import describe
    from draftsmith.train.checks import check
    from draftsmith.train.distributed import read_engine_file
    from draftsmith.train.estimate import estimate
    from draftsmith.train.preparation import head_config, prepared
    from draftsmith.train.recipe import DrafterRecipe, read_recipe

    recipe = read_recipe(arguments[0], DrafterRecipe, arguments[1:])
    read_engine_file(recipe.engine.config, Path(arguments[0]))
    described, corpus, world = describe(recipe.target), None, int(os.environ.get("WORLD_SIZE", "1"))
    check(recipe, described)
    if all(file.startswith("hub:") or Path(file).is_file() for file in recipe.data.files):
        with tempfile.TemporaryDirectory() as folder:
            rows = prepared(recipe, described, Path(folder), say).rows
            corpus = len(rows.tokens), int(rows.mask.sum())
    else:
        for line in notes(described, load_tokenizer(recipe.target), recipe.target, head_config(recipe, described)):
            say(line)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found = estimate(recipe, described, world, device, corpus)
    table = Table(
        title=f"{arguments[0]}: target {found.target_parameters / 1e9:.3f} B, head {found.head_parameters / 1e6:.2f} "
        f"M parameters; "
        f"{world} process{'es' * (world > 1)} on {device.type}"
    )
    for column in ("", "part", "estimate"):
        table.add_column(column, justify="right" if column == "estimate" else "left")
    for name, parts in (("memory of a process", found.memory), ("disk", found.disk)):
        for part, size in parts.items():
            table.add_row(name, part, f"{size / 1e6:,.0f} MB")
        table.add_row(name, "together", f"{sum(parts.values()) / 1e6:,.0f} MB", end_section=True)
    for part, seconds in found.seconds_per_token.items():
        table.add_row("time", part, f"{1e6 * seconds:,.1f} us per token")
    tokens = f"{found.tokens:,} tokens" if found.tokens else "a million tokens (the files are not here)"
    table.add_row("time", tokens, f"{found.seconds(world) / 3600:,.2f} hours")
    Console(width=110).print(table)
    return 0
