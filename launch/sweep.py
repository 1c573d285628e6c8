"""`draftsmith sweep`: times many trees of one drafter beside the chosen one."""

from collections.abc import Mapping
from pathlib import Path

from draftsmith.eval.measurement.sweep import GRID
from draftsmith.eval.measurement.sweep import sweep as time_trees
from draftsmith.eval.measurement.threads import chosen_threads
from draftsmith.eval.sampling import Sampling
from draftsmith.launch.drafters import inner, trained
from draftsmith.launch.finished import clock_of, made_once, tree_names
from draftsmith.launch.measurement import digest, timely
from draftsmith.launch.methods import ASSISTANT, Methods, labels
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
    """Writes OUTPUT/sweep.json: the result of `eval.sweep`, its conditions and settings. threads: as in
    `chosen_threads`. A finished one is shown. Raises UserError where one of other settings lies there.
    """
    (method,) = labels([drafter]).values()
    if not trained(inner(method)):
        raise UserError(
            f"drafter: found {drafter}, expected a drafter directory or reader:DRAFTER (trees of stand and recycling: "
            f"tune-tree)"
        )
    policies, sampling = [parse_tree(tree) for tree in trees] if trees else list(GRID), Sampling(temperature, seed=seed)
    methods = Methods.open([drafter], target, ASSISTANT, None, report, datastore, variables)
    place = output / "sweep.json"
    methods.renderer = methods.renderer.at(clock_of(place))
    make = lambda tree: methods.drafters.drafter(method, tree)  # noqa: E731
    with chosen_threads(methods.target, threads, None, report) as tried:
        prompts = methods.prompts(
            suite, limit, max_new_tokens, max(60, *(make(policy).size for policy in policies)), False, report
        )
        settings = {
            **methods.identity(),
            "prompts": digest(prompts),
            "trees": tree_names(trees) if trees else None,
            "temperature": temperature,
            "batch": batch,
            "max_new_tokens": max_new_tokens,
            "seed": seed,
            "threads": threads,
            **timely(methods),
        }

        def timed() -> dict:
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
            conditions = {
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
            return result | {"conditions": conditions}

        result = made_once(place, settings, timed, report)
    show_sweep(result)
    report(f"result in {place}")
    return result
