"""Targets with recurrent layers: how exact their trees are, what a tree costs beside one step, and what trees give over
chains.

    python tests/benchmarks/ssm.py [--quick] [--hybrid TARGET [DRAFTER]] [--mamba2 TARGET [DRAFTER]]

Four parts. Differences: tiny random models of every family, rounds of branching trees with commits, in fp32: the
largest difference of logits and taps from the model's own forward, and of states from those of a fresh prefill.
Lossless: greedy and position-keyed identity of drafted with plain decoding, one request and eight. Passes: small random
models with Mamba-2, gated delta rule or attention layers alone, one verify pass of N rows beside one of a single row,
interleaved in one run, the least of several times; the share of a pass that is spent in the scan. Trees: where a target
is at hand, tau and tokens a second of a chain and of trees of 8, 16 and 32 rows, T = 0 and 1, interleaved, by EAGLE-3
(drawn without replacement, the traversal rule) where a drafter is given and by STAND (one-hot, sample-and-match);
--quick: 16 rows at T = 1. Ends with one JSON line (tree_over_chain: tau of the best tree of 16 rows over that of the
chain at T = 1, by EAGLE-3 where it is given; pass_over_step: of the gated delta rule); what was not measured is null.
"""

import argparse
import heapq
import json
import sys
import time
from pathlib import Path

import torch
import transformers as hf
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[2]))

from draftsmith.eval.lossless import prove
from draftsmith.eval.measurement.interval import quotient_interval
from draftsmith.eval.measurement.measure import Looped, interleaved, summary, tokens_and_passes
from draftsmith.eval.sampling import Sampling
from draftsmith.eval.verification.rules import RULES
from draftsmith.launch.methods import Methods
from draftsmith.models.drafters import Drafter, HeadDrafter, NoDrafter
from draftsmith.models.drafters.lookup import LookupDrafter
from draftsmith.models.drafters.stand import StandDrafter
from draftsmith.models.drafters.suffix import SuffixDrafter
from draftsmith.models.errors import UserError
from draftsmith.models.features import FeatureSpec
from draftsmith.models.grow import SampledTree, StaticTree, parse_tree
from draftsmith.models.targets import TextTarget
from draftsmith.models.targets.recurrent.cache import Kept
from draftsmith.models.tree import DraftTree, Kind
from tests.conftest import tiny_head
from tests.models.targets.test_recurrent import FAMILIES, FIXED, decode_error
from tests.models.targets.test_targets import model_of, prompts_of

BUNDLED = {
    kind: [f"bundled:targets/code-{kind}", f"bundled:drafters/eagle3-code-{kind}"] for kind in ("hybrid", "mamba2")
}
ROWS, PROMPT = (8, 16, 32), 64
# How trees of a size are filled: chances that a child of rank 0, 1, ... is the accepted one.
FORMS = {"deep": (0.8, 0.1, 0.05), "even": (0.6, 0.2, 0.1, 0.05), "wide": (0.4, 0.25, 0.15, 0.1)}


def shapes(rows: int) -> dict[str, StaticTree]:
    """The chain and some trees of so many rows, root included."""
    found = {"chain": StaticTree(tuple((0,) * depth for depth in range(1, rows)), "chain")}
    for form, chances in FORMS.items():
        paths, waiting = [], [(-chances[0], (0,))]
        while len(paths) < rows - 1:
            chance, path = heapq.heappop(waiting)
            paths.append(path)
            heapq.heappush(waiting, (chance * chances[0], (*path, 0)))
            if path[-1] + 1 < len(chances):
                sibling = chance / chances[path[-1]] * chances[path[-1] + 1]
                heapq.heappush(waiting, (sibling, (*path[:-1], path[-1] + 1)))
        found[form] = StaticTree(tuple(paths), form)
    return found


def differences(families: list[str]) -> dict[str, tuple[float, float]]:
    return {name: decode_error(TextTarget(model_of(FAMILIES[name]()), name), FIXED) for name in families}


def lossless(families: list[str]) -> bool:
    holds = True
    for name in families:
        target = TextTarget(model_of(FAMILIES[name]()), name)
        drafters = {
            "eagle3": HeadDrafter(tiny_head(target, 40), parse_tree("dynamic:4x3x10")),
            "lookup": LookupDrafter(6),
            "suffix": SuffixDrafter(8),
            "stand": StandDrafter(shapes(16)["even"]),
        }
        prompts, samplings = prompts_of(5, 3, 9, 1, 7, 2, 4, 6), [Sampling(), Sampling(1.0, seed=3)]
        for batch in (1, 8):
            found = prove(target, drafters, prompts[: 2 * batch], {7}, samplings, [batch], 8, lambda line: None)
            holds &= all(c.lossless for c in found)
    return holds


def cost_models(width: int, layers: int) -> dict[str, TextTarget]:
    """Random targets of one kind of layer each, MLPs apart (Mamba-2 has none)."""
    common = dict(vocab_size=512, hidden_size=width, num_hidden_layers=layers)
    attention = dict(num_attention_heads=width // 64, num_key_value_heads=width // 128, intermediate_size=2 * width)
    configs = {
        "attention": hf.LlamaConfig(**common, **attention, head_dim=64),
        "mamba2": hf.Mamba2Config(**common, num_heads=width // 32, head_dim=64, n_groups=1, state_size=64),
        "delta": hf.Qwen3_5TextConfig(
            **common,
            **attention,
            head_dim=64,
            layer_types=["linear_attention"] * layers,
            linear_num_key_heads=width // 128,
            linear_num_value_heads=width // 64,
            linear_key_head_dim=64,
            linear_value_head_dim=64,
        ),
    }
    return {kind: TextTarget(model_of(config), kind) for kind, config in configs.items()}


class ScanClock:
    """Seconds of the thread inside scans, convolutions aside."""

    def __enter__(self):
        self.seconds, self.own = 0.0, Kept.mix

        def timed(kept, *arguments, **options):
            start = time.thread_time()
            found = self.own(kept, *arguments, **options)
            self.seconds += time.thread_time() - start
            return found

        Kept.mix = timed
        return self

    def __exit__(self, *_):
        Kept.mix = self.own


def passes(targets: dict[str, TextTarget], times: int) -> list[dict]:
    """Seconds of one verify pass by rows, and of its commit; least of `times`, all targets and sizes in turn."""
    sessions, trees, g = {}, {}, torch.Generator().manual_seed(0)
    for kind, target in targets.items():
        sessions[kind] = target.open(FeatureSpec(()), 1, PROMPT + 40)
        sessions[kind].prefill([torch.randint(3, 500, (PROMPT,), generator=g).tolist()])
    for rows in (1, *ROWS):
        parents = torch.tensor([[(i - 1) // 2 if i else -1 for i in range(rows)]])
        trees[rows] = DraftTree.of(torch.randint(3, 500, (1, rows), generator=g), parents)
    least: dict[tuple[str, int], tuple[float, float]] = {}
    with ScanClock() as clock:
        for _ in range(times):
            for kind, session in sessions.items():
                for rows, tree in trees.items():
                    before, start = clock.seconds, time.thread_time()
                    session.verify(tree)
                    found = (time.thread_time() - start, clock.seconds - before)
                    least[kind, rows] = min(least.get((kind, rows), found), found)
    return [
        {
            "layers": kind,
            "rows": rows,
            "ms": 1e3 * seconds,
            "over_step": seconds / least[kind, 1][0],
            "scan_share": scan / seconds,
        }
        for (kind, rows), (seconds, scan) in least.items()
    ]


def trees_over_chain(names: list[str], quick: bool, console: Console) -> float | None:
    """Prints, by rows, temperature and drafter, tau and tokens a second of the chain and of the trees. Returns tau of
    the best tree of 16 rows over that of the chain, at T = 1, with the rule that suits each.
    """
    target_name, folder = names[0], names[1:]
    try:
        methods = Methods.open(folder or ["stand"], target_name, None, torch.float32, console.print)
    except UserError as error:
        console.print(f"{target_name}: not measured ({error})")
        return None
    count, tokens = (6, 40) if quick else (16, 64)
    prompts = methods.prompts("bundled:prompts/code.jsonl", None, tokens, max(ROWS), False, console.print)
    prompts = [prompt.tokens for prompt in prompts[:: max(1, len(prompts) // count)][:count]]
    table, best = Table("rows", "T", "drafter", "tree", "tau", "of the chain (95 %)", "tokens/s"), []
    table.title = f"{target_name}, {len(prompts)} prompts"
    for rows in (16,) if quick else ROWS:
        for temperature in (1.0,) if quick else (0.0, 1.0):
            decoders = {("plain", ""): Looped(methods.target, NoDrafter())}
            for name, tree in shapes(rows).items():
                for way, (drafter, rule) in drafters(methods, tree).items():
                    decoders[way, name] = Looped(methods.target, drafter, verifier=RULES[rule])
            runs = interleaved(decoders, prompts, Sampling(temperature, seed=1), tokens, methods.stops)
            found = {key: summary(run, None, runs["plain", ""]) for key, run in runs.items()}
            for (way, name), figures in found.items():
                quotient = ""
                if name not in ("", "chain"):
                    low, high = quotient_interval(*(tokens_and_passes(runs[way, x].traces) for x in (name, "chain")))
                    quotient = f"{figures['tau'] / found[way, 'chain']['tau']:.3f} ({low:.3f}-{high:.3f})"
                rate = f"{figures['robust_tokens_per_second']:.0f}"
                table.add_row(str(rows), f"{temperature:g}", way, name, f"{figures['tau']:.2f}", quotient, rate)
            if rows == 16 and temperature == 1:
                way = "eagle3" if folder else "stand"
                best = [found[way, name]["tau"] / found[way, "chain"]["tau"] for name in FORMS]
    console.print(table)
    return max(best)


def drafters(methods: Methods, tree: StaticTree) -> dict[str, tuple[Drafter, str]]:
    """Those that fill a tree of this shape, each with the rule that suits it."""
    found = {"stand": (StandDrafter(tree), "match")}
    for place in methods.folders.values():
        sampled = SampledTree(tree, Kind.WITHOUT_REPLACEMENT, None)
        found["eagle3"] = methods.drafters.drafter(place, sampled), "traversal"
    return found


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="fewer repetitions and prompts (under ten minutes)")
    parser.add_argument("--hybrid", nargs="+", default=BUNDLED["hybrid"], metavar="NAME")
    parser.add_argument("--mamba2", nargs="+", default=BUNDLED["mamba2"], metavar="NAME")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # so that a pass's own seconds are counted, whatever else the machine does
    console, quick = Console(), arguments.quick
    exact = differences(list(FAMILIES))
    table = Table("family", "logits and taps", "states")
    for name, found in exact.items():
        table.add_row(name, *(f"{value:.1e}" for value in found))
    console.print(table)
    proven = lossless(["mamba2", "qwen3_next"] if quick else list(FAMILIES))
    measured = passes(cost_models(256, 2) if quick else cost_models(512, 4), 12 if quick else 25)
    table = Table("layers", "rows", "ms", "passes over a step", "share of the scan")
    for line in measured:
        share = "" if line["layers"] == "attention" else f"{line['scan_share']:.0%}"
        table.add_row(line["layers"], str(line["rows"]), f"{line['ms']:.2f}", f"{line['over_step']:.2f}", share)
    console.print(table)
    gains = {kind: trees_over_chain(getattr(arguments, kind), quick, console) for kind in ("hybrid", "mamba2")}
    over = {(line["layers"], line["rows"]): round(line["over_step"], 3) for line in measured}
    print(
        json.dumps(
            {
                "largest_difference": max(max(found) for found in exact.values()),
                "tree_over_chain": gains,
                "lossless": proven,
                "pass_over_step": {str(rows): over["delta", rows] for rows in (8, 32)},
                "passes": measured,
            }
        )
    )


if __name__ == "__main__":
    main()
