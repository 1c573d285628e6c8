"""`draftsmith tune-tree`: finds the static tree that suits a method on some prompts, for `--tree FILE`."""

from collections.abc import Mapping
from pathlib import Path

from draftsmith.eval.measurement.tune import tune
from draftsmith.eval.sampling import Sampling
from draftsmith.eval.verification.rules import RULES
from draftsmith.eval.verification.verifier import MATCH
from draftsmith.launch.drafters import KINDS, inner, shaped, trained
from draftsmith.launch.finished import clock_of, made_once
from draftsmith.launch.measurement import digest, timely
from draftsmith.launch.methods import ASSISTANT, Methods, labels
from draftsmith.models.errors import UserError
from draftsmith.models.topology import candidates


def tune_tree(
    method: str,
    suite: str,
    target: str | None,
    output: Path,
    size: int,
    large: int,
    depth: int,
    trajectories: int,
    temperature: float,
    max_new_tokens: int,
    limit: int,
    seed: int,
    report=print,
    variables: Mapping = {},
) -> dict:
    """Writes OUTPUT: {"slots": [[0], [1], [0, 0], ...], "calibration": what they were chosen from and by, "accepted"
    being the passes that accepted each slot, "settings"}. A finished one is kept. Raises UserError where one of other
    settings lies there.
    """
    ((name, asked),) = labels([method]).items()
    if inner(asked) != asked or not trained(asked) and not shaped(asked):
        known = ", ".join(word for word, kind in KINDS.items() if kind.shaped)
        raise UserError(f"method: found {method}, expected {known} or a drafter: others draft no static tree")
    if output.suffix != ".json":
        raise UserError(f"--output: found {output}, expected a name that ends with .json: --tree knows files by it")
    if not depth <= large or not size <= large:
        raise UserError(f"--candidates: found {large}, expected at least --size {size} and --depth {depth}")
    sampling = Sampling(temperature, seed=seed)
    methods = Methods.open([method], target, ASSISTANT, report=report, variables=variables)
    methods.renderer = methods.renderer.at(clock_of(output))
    prompts = methods.prompts(suite, limit, max_new_tokens, 2 * (1 + large), False, report)
    make = lambda tree: methods.drafters.drafter(asked, tree, lasting=True)  # noqa: E731
    own = methods.baselines[name].drafter.tree if shaped(asked) else None
    # A rule that judges from the root down: counts of slots do not depend on what stands below or beside them
    samples = shaped(asked) and not methods.baselines[name].keyed
    settings = {
        **methods.identity(),
        "method": method,
        "prompts": digest(prompts),
        "size": size,
        "candidates": large,
        "depth": depth,
        "trajectories": trajectories,
        "temperature": temperature,
        "max_new_tokens": max_new_tokens,
        "seed": seed,
        **timely(methods),
    }

    def tuned() -> dict:
        found = tune(
            methods.target,
            make,
            RULES["rejection"] if samples else MATCH,
            [p.tokens for p in prompts],
            methods.stops,
            sampling,
            trajectories,
            max_new_tokens,
            size,
            candidates(large, depth),
            own,
            report,
        )
        calibration = {
            "method": method,
            "target": methods.target.name,
            "prompts": suite,
            "count": len(prompts),
            "trajectories": trajectories,
            "temperature": temperature,
            "max_new_tokens": max_new_tokens,
            "seed": seed,
            "candidates": large,
            "passes": found.passes,
            "accepted": [found.accepted[slot] for slot in found.slots],
            "tau_expected": found.expected,
            "tau_measured": found.measured,
            "tau_of_own_tree": found.before,
        }
        return {"slots": [list(slot) for slot in found.slots], "calibration": calibration}

    document = made_once(output, settings, tuned, report)
    slots, found = document["slots"], document["calibration"]
    depths = f"{len(slots)} nodes, {max(map(len, slots), default=0)} levels"
    before = found["tau_of_own_tree"]
    own_tau = "" if before is None else f" (its own tree: {before:.2f})"
    report(
        f"{depths}, tau {found['tau_expected']:.2f} expected, {found['tau_measured']:.2f} measured{own_tau}; "
        f"tree in {output}"
    )
    return document
