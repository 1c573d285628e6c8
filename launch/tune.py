"""`draftsmith tune-tree`: finds the static tree that suits a method on some prompts, for `--tree FILE`."""

from collections.abc import Mapping
from pathlib import Path

from draftsmith.eval.measurement.tune import tune
from draftsmith.eval.sampling import Sampling
from draftsmith.eval.verification.rules import RULES
from draftsmith.eval.verification.verifier import MATCH
from draftsmith.launch.drafters import inner, shaped, trained
from draftsmith.launch.methods import ASSISTANT, Methods, check_writable, labels, write_json
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
    being the passes that accepted each slot}.
    """
    ((name, asked),) = labels([method]).items()
    if inner(asked) != asked or not trained(asked) and not shaped(asked):
        raise UserError(f"method: found {method}, expected stand, recycling or a drafter: others draft no static tree")
    if output.suffix != ".json":
        raise UserError(f"--output: found {output}, expected a name that ends with .json: --tree knows files by it")
    if not depth <= large or not size <= large:
        raise UserError(f"--candidates: found {large}, expected at least --size {size} and --depth {depth}")
    sampling = Sampling(temperature, seed=seed)
    methods = Methods.open([method], target, ASSISTANT, report=report, variables=variables)
    prompts = methods.prompts(suite, limit, max_new_tokens, 2 * (1 + large), False, report)
    check_writable(output.parent)
    make = lambda tree: methods.drafters.drafter(asked, tree, lasting=True)  # noqa: E731
    own = methods.baselines[name].drafter.tree if shaped(asked) else None
    # A rule that judges from the root down: counts of slots do not depend on what stands below or beside them
    samples = shaped(asked) and not methods.baselines[name].keyed
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
    document = {
        "slots": [list(slot) for slot in found.slots],
        "calibration": {
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
        },
    }
    write_json(output, document)
    depths = f"{len(found.slots)} nodes, {max(map(len, found.slots), default=0)} levels"
    own_tau = "" if found.before is None else f" (its own tree: {found.before:.2f})"
    report(f"{depths}, tau {found.expected:.2f} expected, {found.measured:.2f} measured{own_tau}; tree in {output}")
    return document
