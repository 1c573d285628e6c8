"""`draftsmith verify`: the losslessness matrix of drafters on their target, as a table and JSON."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from draftsmith.eval.lossless import Comparison, describe, dtype_of, prove
from draftsmith.eval.measurement.measure import Looped
from draftsmith.eval.sampling import Sampling
from draftsmith.launch.drafters import LIBRARY, takes
from draftsmith.launch.methods import ASSISTANT, Methods, check_writable, labels, write_json
from draftsmith.launch.tables import show_proof
from draftsmith.models.errors import UserError
from draftsmith.models.grow import parse_tree


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
    check_writable(output)
    found: list[Comparison] = []
    for target_name in targets or [None]:
        for dtype in precisions:
            once = report if dtype is precisions[0] else (lambda line: None)  # what concerns the target itself
            methods = Methods.open(names, target_name, ASSISTANT, dtype, once, datastore, variables)
            rows = max(methods.rows, *(policy.size for policy in policies))
            prompts = methods.prompts(suite, limit, max_new_tokens, rows, False, report)
            drafters = {
                f"{name} {policy}": methods.drafters.drafter(place, policy)
                for name, place in methods.folders.items()
                for policy in policies
            }
            drafters |= {
                f"{name} {policy}": methods.decoder(name, policy).drafter
                for name in methods.baselines
                for policy in policies
                if takes(methods.named[name], policy)
            }
            drafters |= {
                name: decode.drafter for name, decode in methods.baselines.items() if isinstance(decode, Looped)
            }
            found += prove(
                methods.target,
                drafters,
                [p.tokens for p in prompts],
                methods.stops,
                samplings,
                batches,
                max_new_tokens,
                report,
            )
    holds = all(c.lossless for c in found if c.claimed)
    document = {
        "lossless": holds,
        "comparisons": [
            {**asdict(c), "sampling": describe(c.sampling), "lossless": c.lossless, "claimed": c.claimed} for c in found
        ],
    }
    write_json(output / "lossless.json", document)
    show_proof(found)
    report(f"{'lossless' if holds else 'NOT lossless'}; all divergences in {output / 'lossless.json'}")
    return holds
