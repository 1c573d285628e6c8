"""Recipe to drafter: `main` is the one program behind `draftsmith train`, `python -m draftsmith.train` and `deepspeed --module`."""

import os
import sys


def main(arguments: list[str]) -> int:
    """arguments: RECIPE [section.key=value ...]; the launcher's --local_rank is accepted and ignored. Returns the exit code."""
    from draftsmith.models.errors import UserError

    arguments = [a for a in arguments if not a.startswith("--local_rank")]
    try:
        if not arguments or arguments[0].startswith("-"):
            raise UserError("usage: draftsmith train RECIPE [section.key=value ...]")
        from draftsmith.train.recipe import DrafterRecipe, read_recipe

        recipe = read_recipe(arguments[0], DrafterRecipe, arguments[1:])
        from draftsmith.train.loop import Terminated, train

        try:
            train(recipe, lambda line: print(line, flush=True))
        except Terminated as reason:
            print(reason, file=sys.stderr)
            return 143
    except (UserError, OSError) as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr)
        return 2
    return 0
