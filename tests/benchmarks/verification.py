"""What the verification rules accept on the same drafted trees of the bundled models, what they cost, and whether they
keep the target's law.

    python tests/benchmarks/verification.py [--quick] [--output FILE]

Trees: a chain of 5, a binary tree of depth 5 (63 nodes), EAGLE-1's sparse tree (26) and an adaptive one (26), sampled
without replacement at the target's temperature along texts that traversal decodes. On every tree the expected accepted
tokens of rejection (RRS), traversal and matching are known in closed form; intervals (95 %) resample prompts. Ends with
one JSON line. traversal_over_rrs: quotient of the expected accepted drafted tokens at T = 1, the bonus token not
counted; law_error: the largest distance from the target's joint law over random small models.
"""

import argparse
import json
import statistics
import sys
import time
from itertools import product
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from draftsmith.eval.decode import Clock, generate, processed  # noqa: E402
from draftsmith.eval.sampling import Noise, Sampling  # noqa: E402
from draftsmith.eval.verification.expected import Recorder  # noqa: E402
from draftsmith.eval.verification.rules import RULES  # noqa: E402
from draftsmith.models.chat import load_tokenizer, stop_ids  # noqa: E402
from draftsmith.models.drafters import HeadDrafter, NoDrafter  # noqa: E402
from draftsmith.models.formats import load_drafter  # noqa: E402
from draftsmith.models.grow import parse_tree  # noqa: E402
from draftsmith.models.noise import Draw  # noqa: E402
from draftsmith.models.targets import TextTarget, locate  # noqa: E402
from draftsmith.models.tree import Kind  # noqa: E402
from tests.laws import law_error, random_rows, texts_up_to  # noqa: E402

SHAPES = {"chain": "chain:5", "binary": "binary:5", "sparse": "eagle"}
RULE_NAMES = ("rejection", "traversal", "match")


def resampled(count: int, draws: int = 2000) -> torch.Tensor:
    """[draws, count] how often each prompt is drawn."""
    picks = torch.randint(count, (draws, count), generator=torch.Generator().manual_seed(0))
    return torch.zeros(draws, count, dtype=torch.float64).scatter_add_(
        1, picks, torch.ones(draws, count, dtype=torch.float64)
    )


def interval(value, *sums) -> list[float]:
    """95 % of value(resampled sums); sums: one number a prompt each, of the same prompts."""
    weights = resampled(len(sums[0]))
    values = value(*(weights @ torch.tensor(s, dtype=torch.float64) for s in sums))
    return [round(x, 4) for x in torch.quantile(values, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()]


def acceptance(
    target, head, prompts, stops, tree: str, temperature: float, new_tokens: int, least: int, ceilings: bool
) -> dict:
    """Closed-form and sampled acceptance of all rules on the trees of traversal's texts; prompts are decoded again with
    other seeds until there are at least `least` trees.
    """
    recorder, count = Recorder([RULES["traversal"], RULES["rejection"], RULES["match"]], ceilings), 0
    groups = [range(start, min(start + 13, len(prompts))) for start in range(0, len(prompts), 13)]
    for seed, group in product(range(20), groups):
        if seed and count >= least:
            break
        generate(
            target,
            HeadDrafter(head, parse_tree(tree)),
            [prompts[i] for i in group],
            Sampling(temperature, seed=seed),
            new_tokens,
            stops,
            list(group),
            verifier=recorder,
        )
        count = sum(map(len, recorder.expected["traversal"].values()))
    requests = [r for r in range(len(prompts)) if r in recorder.expected["traversal"]]
    cycles = [len(recorder.expected["traversal"][r]) for r in requests]
    sums, drawn_sums = (
        {name: [sum(notes[name][r]) for r in requests] for name in RULE_NAMES}
        for notes in (recorder.expected, recorder.sampled)
    )
    figures = {"trees": count}
    for name in RULE_NAMES:
        exact, drawn = (
            [x for r in requests for x in notes[name][r]] for notes in (recorder.expected, recorder.sampled)
        )
        figures[name] = {
            "expected": statistics.mean(exact),
            "interval": interval(lambda a, n: a / n, sums[name], cycles),
            "variance": statistics.variance(exact),
            "sampled": statistics.mean(drawn),
            "sampled_interval": interval(lambda a, n: a / n, drawn_sums[name], cycles),
            "sampled_variance": statistics.variance(drawn),
            "any_accepted": statistics.mean(x for r in requests for x in recorder.first[name][r]),
        }
    both = sums["traversal"], sums["rejection"]
    figures["traversal_over_rrs"] = sum(both[0]) / sum(both[1])
    figures["traversal_over_rrs_interval"] = interval(lambda a, b: a / b, *both)
    figures["difference_interval"] = interval(lambda a, b, n: (a - b) / n, *both, cycles)
    figures["sampled_difference_interval"] = interval(
        lambda a, b, n: (a - b) / n, drawn_sums["traversal"], drawn_sums["rejection"], cycles
    )
    figures["trees_where_rrs_is_ahead"] = sum(
        a < b - 1e-5
        for r in requests
        for a, b in zip(recorder.expected["traversal"][r], recorder.expected["rejection"][r])
    )
    figures["largest_difference"] = max(
        abs(a - b)
        for r in requests
        for a, b in zip(recorder.expected["traversal"][r], recorder.expected["rejection"][r])
    )
    if ceilings:
        figures["ceiling_of_any_accepted"] = statistics.mean(x for r in requests for x in recorder.best[r])
    return figures


def speed(target, head, prompts, stops, temperature: float, new_tokens: int) -> dict:
    """Tokens a second of plain decoding and of both rules on every shape, one prompt at a time, methods in turn."""
    methods = {"plain": (NoDrafter(), RULES["match"])}
    for shape, tree in SHAPES.items():
        for name in ("rejection", "traversal"):
            methods[f"{shape} {name}"] = HeadDrafter(head, parse_tree(f"sampled:{tree}")), RULES[name]
    tokens, seconds, passes = ({name: [] for name in methods} for _ in range(3))
    for number, prompt in enumerate([prompts[0], *prompts]):  # the first one twice: a warm-up that is forgotten
        for name, (drafter, rule) in methods.items():
            clock = Clock(target.device)
            trace = generate(
                target,
                drafter,
                [prompt],
                Sampling(temperature),
                new_tokens,
                stops,
                [max(0, number - 1)],
                clock,
                verifier=rule,
            )[0]
            if number:
                tokens[name].append(sum(trace.emitted))
                seconds[name].append(clock.seconds["total"])
                passes[name].append(len(trace.emitted))
    figures = {
        name: {
            "tokens_per_second": sum(tokens[name]) / sum(seconds[name]),
            "tau": sum(tokens[name]) / sum(passes[name]),
            "interval": interval(lambda a, b: a / b, tokens[name], seconds[name]),
        }
        for name in methods
    }
    for shape in SHAPES:
        one, two = f"{shape} traversal", f"{shape} rejection"
        figures[one]["over_rrs"] = figures[one]["tokens_per_second"] / figures[two]["tokens_per_second"]
        figures[one]["over_rrs_interval"] = interval(
            lambda a, b, c, d: a / b / (c / d), tokens[one], seconds[one], tokens[two], seconds[two]
        )
    return figures


@torch.inference_mode()
def cost(target, head, prompt, repeats: int) -> dict:
    """Milliseconds of one request, median and least of the repeats: the verify pass, and the rule alone on its result
    (noise drawn before).
    """
    figures, sampling = {}, Sampling(1.0)
    for shape, text in SHAPES.items():
        session = target.open(head.feature_spec, 1, len(prompt) + 64)
        root = session.prefill([prompt])
        first, policy = root.logits.argmax(-1), parse_tree(f"sampled:{text}")
        tree = policy.sample(head, head.roots(head.prefill(root.features)), first, Draw(1.0, 0, [0], [len(prompt)]))
        keyed = Noise(sampling, [0], [len(prompt)])

        class Drawn:
            uniforms, gumbels = keyed.uniform(tree.size, target.device), keyed.gumbel(target.vocab_size, target.device)

            def uniform(self, count, device):
                return self.uniforms[:, :count]

            def gumbel(self, vocab_size, device):
                return self.gumbels

        logits, times = None, {"verify": [], "rejection": [], "traversal": []}
        for repeat in range(repeats + 3):
            start = time.perf_counter()
            verified = session.verify(tree)
            taken = {"verify": time.perf_counter() - start}
            logits = processed(verified.logits, tree, sampling, [0], {})
            for name in ("rejection", "traversal"):
                start = time.perf_counter()
                RULES[name](tree, logits, Drawn())
                taken[name] = time.perf_counter() - start
            if repeat >= 3:
                for name, value in taken.items():
                    times[name].append(1e3 * value)
        figures[shape] = {"nodes": tree.size}
        for label, statistic in (("median", statistics.median), ("least", min)):
            ms = {name: statistic(values) for name, values in times.items()}
            figures[shape][label] = {
                **{f"{name}_ms": round(value, 3) for name, value in ms.items()},
                **{f"{name}_share": round(ms[name] / ms["verify"], 4) for name in ("rejection", "traversal")},
            }
    return figures


def worst_law_error(count: int) -> float:
    """Over random context-dependent p and q of three tokens, and all rules that claim to be lossless on the form."""
    generator, worst = torch.Generator().manual_seed(0), 0.0
    forms = [[-1, 0, 1, 2], [-1, 0, 0, 1, 1, 2], [-1, 0, 0, 1, 1, 2, 2], [-1, 0, 1, 1, 0, 2], [-1, 0, 0, 0]]
    for number in range(count):
        p, q = (random_rows(texts_up_to(3, 3), 3, generator, zeros) for zeros in (0.2 * (number % 2), 0.0))
        for parents in forms:
            for kind in (Kind.WITHOUT_REPLACEMENT, Kind.IID, Kind.ONE_HOT):
                kinds, fixed = [kind] * len(parents), torch.randint(3, (len(parents),), generator=generator).tolist()
                names = ["match", "rejection", "traversal", *(["block"] if parents == forms[0] else [])]
                names += ["spectr"] if parents == forms[-1] and kind == Kind.IID else []
                worst = max(worst, *(law_error(RULES[name], parents, kinds, p, q, fixed) for name in names))
    return worst


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="26 prompts, T = 1, no speed (half a minute)")
    parser.add_argument("--output", help="where to write all figures as JSON")
    arguments = parser.parse_args()
    target, tokenizer = TextTarget.load("bundled:targets/code"), load_tokenizer("bundled:targets/code")
    head, stops = (
        load_drafter(locate("bundled:drafters/eagle3-code"), target.shared, target.layers),
        stop_ids(target, tokenizer),
    )
    from draftsmith.eval.measurement.prompts import read_prompts
    from draftsmith.launch.measurement import bundled

    prompts = [p.tokens for p in read_prompts(bundled("bundled:prompts/code.jsonl"), tokenizer)]
    prompts, new_tokens, least, temperatures = (
        (prompts[:26], 32, 250, (1.0,)) if arguments.quick else (prompts, 96, 2000, (1.0, 0.6))
    )
    figures = {
        "law_error": worst_law_error(2 if arguments.quick else 12),
        "threads": torch.get_num_threads(),
        "prompts": len(prompts),
        "cost": cost(target, head, prompts[0], 20 if arguments.quick else 100),
        "acceptance": {},
        "top_k": {},
        "speed": {},
    }
    for shape, row in figures["cost"].items():
        print(f"cost, {shape}: {json.dumps(row)}", flush=True)
    for temperature in temperatures:
        for shape, tree in (SHAPES | ({"adaptive": "adaptive:5x5"} if temperature == 1 else {})).items():
            found = acceptance(
                target, head, prompts, stops, f"sampled:{tree}", temperature, new_tokens, least, not arguments.quick
            )
            figures["acceptance"][f"{shape} T={temperature}"] = found
            print(f"acceptance, {shape}, T={temperature}: {json.dumps(found)}", flush=True)
        top_k = acceptance(target, head, prompts, stops, "dynamic:5x5x26", temperature, new_tokens, 0, False)
        figures["top_k"][f"T={temperature}"] = top_k
        print(f"top-k tree 5x5x26, T={temperature}: {json.dumps(top_k)}", flush=True)
        if not arguments.quick:
            figures["speed"][f"T={temperature}"] = speed(target, head, prompts, stops, temperature, 64)
            for name, row in figures["speed"][f"T={temperature}"].items():
                print(f"speed, T={temperature}, {name}: {json.dumps(row)}", flush=True)
    if arguments.output:
        with open(arguments.output, "w") as file:
            json.dump(figures, file, indent=1)
    ratios = {shape: round(figures["acceptance"][f"{shape} T=1.0"]["traversal_over_rrs"], 4) for shape in SHAPES}
    print(json.dumps({"traversal_over_rrs": ratios, "law_error": figures["law_error"]}))


if __name__ == "__main__":
    main()
