"""The full measurement of drafters for one target: acceptance length of a tree and of a chain, prediction, speed, losslessness, temperatures."""

from dataclasses import dataclass

from draftsmith.eval.measure import Run, decode_batches, interleaved, summary
from draftsmith.eval.predict import predicted_chain_tau
from draftsmith.eval.progress import Progress
from draftsmith.eval.sampling import Sampling
from draftsmith.models.drafter import HeadDrafter, NoDrafter
from draftsmith.models.grow import TreePolicy, chain
from draftsmith.models.targets import TextTarget


@dataclass(frozen=True)
class Plan:
    """What is measured. tree: the large tree whose acceptance length is reported; sweep: trees of which the fastest is timed on all prompts
    (found on `sweep_prompts` of them); temperatures beside 0 are measured with `tree`."""

    tree: TreePolicy
    chain_depth: int
    sweep: tuple[TreePolicy, ...]
    sweep_prompts: int
    temperatures: tuple[float, ...]
    max_new_tokens: int
    batch: int
    seed: int


def evaluate(target: TextTarget, heads: dict, prompts: list[list[int]], stops: set[int], plan: Plan, report=print) -> dict[str, dict]:
    """name -> result. All heads share the plain runs and one interleaved timing."""
    def decode(what, drafter, sampling):
        progress, margins = Progress(report, what, len(prompts)), isinstance(drafter, NoDrafter)
        return Run(decode_batches(target, drafter, prompts, sampling, plan.max_new_tokens, stops, plan.batch, progress, margins))

    results, greedy = {name: {} for name in heads}, Sampling(seed=plan.seed)
    plain = decode("plain", NoDrafter(), greedy)
    for name, head in heads.items():
        policies = (plan.tree, chain(plan.chain_depth))
        tree, line = (summary(decode(f"{name} {policy}", HeadDrafter(head, policy), greedy), plain) for policy in policies)
        predicted = predicted_chain_tau(target, head, prompts, plain.traces, plan.chain_depth)
        results[name] = {"tree_tau": tree["tau"], "chain_tau": line["tau"], "predicted_chain_tau": predicted,
                         "greedy": dict(zip(map(str, policies), (tree, line)))}
    fastest = {name: sweep(target, name, head, prompts, stops, plan, report) for name, head in heads.items()}
    drafters = {name: HeadDrafter(head, fastest[name][0]) for name, head in heads.items()}
    timed = interleaved(target, drafters, prompts, greedy, plan.max_new_tokens, stops, Progress(report, "timing, one prompt at a time", len(prompts)))
    for name in heads:
        figures = summary(timed[name], plain, timed_plain=timed["plain"])
        results[name] |= {key: figures[key] for key in ("speedup", "accounted_speedup", "ideal_speedup")}
        results[name] |= {"tree": str(fastest[name][0]), "sweep": fastest[name][1], "timed": figures,
                          "plain": summary(timed["plain"], plain, timed_plain=timed["plain"]), "sampled": {}}
    for temperature in plan.temperatures:
        sampling = Sampling(temperature, seed=plan.seed)
        plain = decode(f"plain, T={temperature}", NoDrafter(), sampling)
        for name, head in heads.items():
            traces = decode(f"{name} {plan.tree}, T={temperature}", HeadDrafter(head, plan.tree), sampling)
            results[name]["sampled"][str(temperature)] = summary(traces, plain)
    for result in results.values():
        parts = [*result["greedy"].values(), result["timed"], *result["sampled"].values()]
        result["lossless"] = all(part["lossless"] for part in parts)
        result["identical"] = f"{sum(part['identical'] for part in parts)}/{sum(part['prompts'] for part in parts)}"
    return results


def sweep(target, name, head, prompts, stops, plan: Plan, report) -> tuple[TreePolicy, dict[str, dict]]:
    """The fastest tree of the plan on its first prompts, and {tree: {tau, speedup}}."""
    if len(plan.sweep) == 1:
        return plan.sweep[0], {}
    some = prompts[:plan.sweep_prompts]
    drafters = {str(tree): HeadDrafter(head, tree) for tree in plan.sweep}
    runs = interleaved(target, drafters, some, Sampling(seed=plan.seed), plan.max_new_tokens, stops, Progress(report, f"{name}: tree sweep", len(some)))
    figures = {tree: summary(runs[tree], runs["plain"], timed_plain=runs["plain"]) for tree in drafters}
    table = {tree: {"tau": f["tau"], "speedup": f["speedup"]} for tree, f in figures.items()}
    return max(plan.sweep, key=lambda tree: table[str(tree)]["speedup"]), table
