"""`draftsmith sweep`: times many trees of one drafter beside the chosen one."""

from collections.abc import Mapping
from pathlib import Path

from draftsmith.eval.measurement.sweep import GRID
from draftsmith.eval.measurement.sweep import sweep as time_trees
from draftsmith.eval.measurement.threads import chosen_threads
from draftsmith.eval.sampling import Sampling
from draftsmith.launch.drafters import inner, trained
from draftsmith.launch.methods import ASSISTANT, Methods, check_writable, labels, write_json
from draftsmith.launch.tables import show_sweep
from draftsmith.models.errors import UserError
from draftsmith.models.grow import parse_tree


def sweep(
    drafter: str,
    suite: str,
    target: str | None,
    trees: list[str] | None,
    temperature: float,
    batch: int,
    max_new_tokens: int,
    limit: int,
    seed: int,
    output: Path,
    report=print,
    threads: int | None = None,
    datastore: str | None = None,
    variables: Mapping = {},
) -> dict:
    """Writes OUTPUT/sweep.json: the result of `eval.sweep` and its conditions. threads: as in `chosen_threads`."""
    (method,) = labels([drafter]).values()
    if not trained(inner(method)):
        raise UserError(
            f"drafter: found {drafter}, expected a drafter directory or reader:DRAFTER (trees of stand and recycling: "
            f"tune-tree)"
        )
    policies, sampling = [parse_tree(tree) for tree in trees] if trees else list(GRID), Sampling(temperature, seed=seed)
    methods = Methods.open([drafter], target, ASSISTANT, None, report, datastore, variables)
    make = lambda tree: methods.drafters.drafter(method, tree)  # noqa: E731
    with chosen_threads(methods.target, threads, None, report) as tried:
        prompts = methods.prompts(
            suite, limit, max_new_tokens, max(60, *(make(policy).size for policy in policies)), False, report
        )
        check_writable(output)
        result = time_trees(
            methods.target,
            methods.drafters.head(inner(method)),
            [p.tokens for p in prompts],
            methods.stops,
            policies,
            sampling,
            batch,
            max_new_tokens,
            report,
            make,
        )
        result["conditions"] = {
            "target": methods.target.name,
            "drafter": drafter,
            "prompts": suite,
            "count": len(prompts),
            "temperature": temperature,
            "batch": batch,
            "datastore": datastore,
            "max_new_tokens": max_new_tokens,
            "seed": seed,
            **methods.machine(),
            "thread_trial_ms": tried,
        }
    write_json(output / "sweep.json", result)
    show_sweep(result)
    report(f"result in {output / 'sweep.json'}")
    return result
