"""`draftsmith verify`: the losslessness matrix of drafters on their target, as a table and JSON."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from draftsmith.eval.lossless import Comparison, describe, dtype_of, prove
from draftsmith.eval.measurement.measure import Looped
from draftsmith.eval.sampling import Sampling
from draftsmith.launch.drafters import LIBRARY, takes
from draftsmith.launch.finished import clock_of, made_once, tree_names
from draftsmith.launch.measurement import digest, timely
from draftsmith.launch.methods import ASSISTANT, Methods, labels
from draftsmith.launch.tables import show_proof
from draftsmith.models.drafters import Drafter
from draftsmith.models.errors import UserError
from draftsmith.models.grow import TreePolicy, parse_tree
from draftsmith.models.targets import describe as described
from draftsmith.models.targets.weights import identity_of


def verify(
    names: list[str],
    suite: str,
    targets: list[str],
    dtypes: list[str],
    trees: list[str],
    batches: list[int],
    temperatures: list[float],
    max_new_tokens: int,
    limit: int,
    seed: int,
    output: Path,
    report=print,
    datastore: str | None = None,
    variables: Mapping = {},
) -> bool:
    """Whether everything that is claimed holds. Each temperature above 0 is also tried with top-k, top-p and a
    repetition penalty.

    Without targets the drafters name theirs; several targets must share the drafters' shapes (a fine-tuned copy, say).
    """
    precisions = [dtype_of(name) for name in dtypes]
    policies = [parse_tree(tree) for tree in trees]
    samplings = [Sampling(t, seed=seed) for t in temperatures]
    samplings += [Sampling(t, 20, 0.9, 1.2, seed) for t in temperatures if t > 0]
    if any(method in LIBRARY or method == "plain" for method in labels(names).values()):
        raise UserError(
            f"methods: found {', '.join(names)}, expected drafters, howl:DRAFTER, reader, stand, recycling, suffix, "
            f"lookup (the loops of Hugging Face are not ours to prove)"
        )
    place = output / "lossless.json"
    clock = clock_of(place)

    def opened(target_name: str | None, dtype, once=report) -> Methods:
        methods = Methods.open(names, target_name, ASSISTANT, dtype, once, datastore, variables)
        methods.renderer = methods.renderer.at(clock)
        return methods

    def asked(methods: Methods, once=report):
        rows = max(methods.rows, *(policy.size for policy in policies))
        return methods.prompts(suite, limit, max_new_tokens, rows, False, once)

    first = opened((targets or [None])[0], precisions[0])
    prompts = asked(first)
    settings = {
        **first.identity(),
        "other_targets": [identity_of(name, described(name).weights) for name in targets[1:]],
        "prompts": digest(prompts),
        "dtypes": dtypes,
        "trees": tree_names(trees),
        "batches": batches,
        "temperatures": temperatures,
        "max_new_tokens": max_new_tokens,
        "seed": seed,
        **timely(first),
    }

    def compared() -> dict:
        found: list[Comparison] = []
        for number, target_name in enumerate(targets or [None]):
            for dtype in precisions:
                here = number == 0 and dtype is precisions[0]
                once = report if dtype is precisions[0] else (lambda line: None)  # what concerns the target itself
                methods = first if here else opened(target_name, dtype, once)
                ids = [p.tokens for p in (prompts if here else asked(methods))]
                found += prove(
                    methods.target,
                    drafters_of(methods, policies),
                    ids,
                    methods.stops,
                    samplings,
                    batches,
                    max_new_tokens,
                    report,
                )
        return {
            "lossless": all(c.lossless for c in found if c.claimed),
            "comparisons": [
                {**asdict(c), "sampling": describe(c.sampling), "lossless": c.lossless, "claimed": c.claimed}
                for c in found
            ],
        }

    document = made_once(place, settings, compared, report)
    holds = document["lossless"]
    show_proof(document["comparisons"])
    report(f"{'lossless' if holds else 'NOT lossless'}; all divergences in {place}")
    return holds


def drafters_of(methods: Methods, policies: list[TreePolicy]) -> dict[str, Drafter]:
    """What is compared: every method with every tree that it takes, and with its own."""
    found = {
        f"{name} {policy}": methods.drafters.drafter(place, policy)
        for name, place in methods.folders.items()
        for policy in policies
    }
    found |= {
        f"{name} {policy}": methods.decoder(name, policy).drafter
        for name in methods.baselines
        for policy in policies
        if takes(methods.named[name], policy)
    }
    return found | {name: decode.drafter for name, decode in methods.baselines.items() if isinstance(decode, Looped)}
