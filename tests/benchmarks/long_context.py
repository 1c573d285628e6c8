"""Acceptance length by context length on the bundled long-context target: EAGLE-3 trained at 512, without and with a
sliding window, OWL without and with [SPEC], suffix decoding, HOWL.

    python tests/benchmarks/long_context.py [--quick] [--output runs/long-context] [--documents 40] [--part 1/2]

Repository-level questions about held-out modules (`draftsmith longbench`), every document cut from the left to 1K, 2K,
4K and 8K tokens with the same questions behind it; greedy, up to 256 new tokens. All methods decode behind one prefill,
with equal rows to verify: trees of 32 nodes, OWL with [SPEC] 16 nodes and 16 probes, suffix paths of 32. Intervals: 95
%, bootstrap over documents, paired. A killed run goes on; parts are for several processes, and the tables hold what all
of them have finished. --quick: 1K and 8K only. Ends with one JSON line: tau by length (owl_tau: with [SPEC]), and of
HOWL and the best single method over all lengths.
"""

import argparse
import json
import time
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path

from draftsmith.eval.decode import Clock, decode
from draftsmith.eval.measurement.interval import difference_interval, quotient_interval, ratio_interval
from draftsmith.eval.measurement.journal import Journal, read
from draftsmith.eval.measurement.measure import repeated_4grams
from draftsmith.eval.measurement.prompts import read_prompts
from draftsmith.eval.measurement.shared_prefill import SharedSession, Tapped, shared_spec
from draftsmith.eval.measurement.suite import LOOPS
from draftsmith.eval.measurement.suites import read_rows
from draftsmith.eval.report.plots import calibration, colours, points_by_place
from draftsmith.eval.sampling import Sampling
from draftsmith.launch import longbench
from draftsmith.launch.methods import fetch
from draftsmith.models.chat import load_tokenizer, stop_ids
from draftsmith.models.drafters import HeadDrafter
from draftsmith.models.drafters.howl import HowlDrafter
from draftsmith.models.drafters.suffix import SuffixDrafter
from draftsmith.models.drafters.suffix_index import SuffixRule
from draftsmith.models.formats import load_drafter
from draftsmith.models.grow import parse_tree
from draftsmith.models.targets import TextTarget
from draftsmith.train.recipe import read_recipe
from draftsmith.train.reference.pretrain import TargetRecipe

LENGTHS = (1024, 2048, 4096, 8192)
QUESTIONS, LEAST = 3, 2  # functions of a document, at most and at least
RULE = SuffixRule(factor=4)
SCORES = (0, 0.5, 1, 2, 3, 4, 6, 9, 14, 32)  # borders of the ranges of the calibration
SINGLE = ("eagle3", "eagle3-window", "owl", "owl-spec", "suffix")


class Timed(Tapped):
    """began: seconds that the thread spent on the prompt, which the clock counts as drafting."""

    def begin(self, features, root):
        start = time.thread_time()
        super().begin(features, root)
        self.began = time.thread_time() - start


def prompts_of(file: Path, lengths, documents, tokenizer, packages) -> list[dict]:
    """Rows of the suite's first documents with their tokens, document after document, in each from short to long; built
    where it does not exist.
    """
    if not file.exists():
        left_out = Counter()
        found = longbench.repositories(packages, True, max(lengths), tokenizer, 0, QUESTIONS)
        rows = longbench.cut(
            longbench.rendered(found, tokenizer, max(lengths), left_out), lengths, 10**6, tokenizer, left_out
        )
        counts = Counter(row["document"] for row in rows)
        longbench.write_suite(
            [row for row in rows if counts[row["document"]] >= LEAST * len(lengths)], str(file), left_out
        )
    rows = [{**row, "ids": prompt.tokens} for (_, row), prompt in zip(read_rows(file), read_prompts(file, tokenizer))]
    order = list(dict.fromkeys(row["document"] for row in rows))[:documents]
    return sorted(
        (row for row in rows if row["document"] in order),
        key=lambda row: (order.index(row["document"]), length_of(row)),
    )


def length_of(row: dict) -> int:
    return int(row["category"].removesuffix("K")) * 1024


def eagle3(target: TextTarget, window: int | None, place: str = "bundled:drafters/eagle3-code-long") -> HeadDrafter:
    """The head with a sliding window that it need not have been trained with."""
    head = load_drafter(fetch(place), target.shared, target.layers)
    head.grow(replace(head.config, sliding_window=window))
    return HeadDrafter(head, parse_tree("dynamic:10x7x32"))


def owl(target: TextTarget, place: str = "bundled:drafters/owl-code-long") -> HeadDrafter:
    return HeadDrafter(load_drafter(fetch(place), target.shared, target.layers), parse_tree("dynamic:10x8x32"))


def drafters_of(arguments, target: TextTarget) -> dict:
    head = load_drafter(fetch(arguments.owl_spec), target.shared, target.layers)
    probing = HeadDrafter(head, parse_tree("dynamic:10x8x16"))
    return {
        "eagle3": eagle3(target, None, arguments.eagle3),
        "eagle3-window": eagle3(target, arguments.window, arguments.eagle3),
        "owl": owl(target, arguments.owl),
        "owl-spec": probing,
        "suffix": SuffixDrafter(32, RULE),
        "howl": HowlDrafter(probing, SuffixDrafter(32, RULE)),
    }


def run(rows, drafters, target, stops, max_new_tokens, journal, report=print) -> None:
    """Adds {method: {"trace", "draft" and "began" seconds, "steps"}} of every prompt to the journal, under its name."""
    spec = shared_spec(drafter.feature_spec for drafter in drafters.values())
    timed = {name: Timed(drafter, spec, target.config.hidden_size) for name, drafter in drafters.items()}
    shared = SharedSession(target, spec, max(len(row["ids"]) for row in rows) + max_new_tokens + 256)
    started = time.time()
    for number, row in enumerate(rows):
        if row["name"] in journal:
            continue
        prefill, entry = shared.prefill(row["ids"]), {}
        for name, drafter in timed.items():
            shared.rewind()
            clock = Clock(target.device)
            (trace,) = decode(
                shared.session, prefill, drafter, [row["ids"]], Sampling(), max_new_tokens, stops, [number], clock
            )
            steps = [asdict(step) for step in getattr(drafter.drafter, "steps", ())]
            entry[name] = {
                "trace": asdict(trace),
                "draft": (clock.busy or clock.seconds)["draft"],
                "began": drafter.began,
                "steps": steps,
            }
        journal.add(row["name"], entry)
        if number % 10 == 9:
            report(f"{number + 1}/{len(rows)} prompts, {(time.time() - started) / 60:.1f} min")


def finished(rows, folder: Path, settings: dict) -> tuple[list[dict], dict[str, dict]]:
    """(rows of the questions that are finished at every length, {name: what `run` found}) over the journals of all
    parts.
    """
    found = {}
    for journal in sorted(folder.glob("runs*.jsonl")):
        found |= {entry.pop("key"): entry for entry in read(journal, settings)}
    asked = Counter(row["name"].rpartition("@")[0] for row in rows)
    done = Counter(row["name"].rpartition("@")[0] for row in rows if row["name"] in found)
    rows = [row for row in rows if done[row["name"].rpartition("@")[0]] == asked[row["name"].rpartition("@")[0]]]
    return rows, {row["name"]: found[row["name"]] for row in rows}


class Figures:
    """Sums by method, length and document; rows: those that count."""

    def __init__(self, rows, found):
        self.documents = list(dict.fromkeys(row["document"] for row in rows))
        self.rows, self.found = rows, found

    def sums(self, method, length=None):
        """(tokens, passes) of every document, at one length or at all."""
        tokens, passes = dict.fromkeys(self.documents, 0), dict.fromkeys(self.documents, 0)
        for row in self.rows:
            if length in (None, length_of(row)):
                emitted = self.found[row["name"]][method]["trace"]["emitted"]
                tokens[row["document"]] += sum(emitted)
                passes[row["document"]] += len(emitted)
        return list(tokens.values()), list(passes.values())

    def tau(self, method, length=None) -> float:
        tokens, passes = self.sums(method, length)
        return sum(tokens) / max(1, sum(passes))

    def shown(self, method, length=None) -> str:
        low, high = ratio_interval(*self.sums(method, length))
        return f"{self.tau(method, length):.2f} ({low:.2f}-{high:.2f})"


def table(head: list[str], lines: list[list]) -> str:
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in [head, ["-"] * len(head), *lines]) + "\n"


def tables(rows, found, lengths) -> str:
    every, methods = Figures(rows, found), list(next(iter(found.values())))
    loops = {row["name"]: repeated_4grams([found[row["name"]][methods[0]]["trace"]["tokens"]]) >= LOOPS for row in rows}
    calm = Figures([row for row in rows if not loops[row["name"]]], found)
    labels, text = [longbench.label(length) for length in lengths], []
    for title, figures in (("all prompts", every), ("prompts whose text does not loop", calm)):
        text += [
            f"tau, {title}: {len(figures.documents)} documents, {len(figures.rows)} prompts",
            table(
                ["method", *labels, "all lengths"],
                [
                    [method, *(figures.shown(method, length) for length in lengths), figures.shown(method)]
                    for method in methods
                ],
            ),
        ]
        ratios = [
            [
                method,
                f"{figures.tau(method, lengths[-1]) / figures.tau(method, lengths[0]):.3f}",
                "{:.3f}-{:.3f}".format(
                    *quotient_interval(figures.sums(method, lengths[-1]), figures.sums(method, lengths[0]))
                ),
            ]
            for method in methods
        ]
        text += [f"tau at {labels[-1]} / tau at {labels[0]}, paired", table(["method", "ratio", "95 %"], ratios)]
        ahead = [
            [
                other,
                *(
                    f"{figures.tau('howl', n) - figures.tau(other, n):+.2f} ({{:+.2f}} to {{:+.2f}})".format(
                        *difference_interval(figures.sums("howl", n), figures.sums(other, n))
                    )
                    for n in (*lengths, None)
                ),
            ]
            for other in SINGLE
        ]
        text += ["tau of HOWL minus that of", table(["method", *labels, "all lengths"], ahead)]
    cycles = [[method, *(sum(every.sums(method, n)[1]) for n in lengths)] for method in methods]
    text += ["cycles", table(["method", *labels], cycles)]
    drafting = []
    for method in methods:
        line = [method]
        for length in lengths:
            mine = [found[row["name"]][method] for row in rows if length_of(row) == length]
            passes = sum(len(one["trace"]["emitted"]) for one in mine)
            line.append(f"{1e3 * sum(one['draft'] - one['began'] for one in mine) / max(1, passes):.2f}")
        drafting.append(line)
    text += ["drafting, milliseconds of the thread a cycle, without the prompt", table(["method", *labels], drafting)]
    text += [
        "suffix scores and accepted tokens",
        table(
            ["steps", "score from", "steps", "mean score", "mean accepted"],
            [
                [source, f"{low:g}", count, f"{score:.2f}", f"{accepted:.2f}"]
                for source, points in scores(found)
                for low, (score, accepted, count) in points
            ],
        ),
    ]
    same = sum(len({tuple(one["trace"]["tokens"]) for one in found[row["name"]].values()}) == 1 for row in rows)
    text += [f"texts that are the same for all methods: {same}/{len(rows)}; looping: {sum(loops.values())}/{len(rows)}"]
    return "\n".join(text)


def scores(found) -> list[tuple[str, list]]:
    """(source, [(lower border, (mean score, mean accepted, steps))]): of suffix decoding alone, of HOWL's suffix steps,
    of its head steps.
    """
    kinds = {
        "suffix alone": ("suffix", "suffix"),
        "HOWL, suffix steps": ("howl", "suffix"),
        "HOWL, head steps": ("howl", "head"),
    }
    result = []
    for label, (method, source) in kinds.items():
        steps = [step for one in found.values() for step in one[method]["steps"] if step["source"] == source]
        points = []
        for low, high in zip(SCORES, SCORES[1:]):
            mine = [step for step in steps if low <= step["score"] < high]
            if mine:
                mean = lambda key: sum(step[key] for step in mine) / len(mine)  # noqa: B023, E731
                points.append((low, (mean("score"), mean("accepted"), len(mine))))
        if points:
            result.append((label, points))
    return result


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument(
        "--quick", action="store_true", help="5 documents at 1K and 8K, up to 96 new tokens (under 10 minutes)"
    )
    parser.add_argument("--documents", type=int, default=40)
    parser.add_argument("--part", default="1/1", help="K/N: only every N-th document, beginning with the K-th")
    parser.add_argument("--max-new-tokens", type=int, default=256)
    parser.add_argument("--target", default="bundled:targets/code-long")
    parser.add_argument("--eagle3", default="bundled:drafters/eagle3-code-long")
    parser.add_argument("--window", type=int, default=512, help="of eagle3-window")
    parser.add_argument("--owl", default="bundled:drafters/owl-code-long")
    parser.add_argument("--owl-spec", default="bundled:drafters/owl-code-long-spec")
    parser.add_argument("--output", type=Path, default=Path("runs/long-context"))
    arguments = parser.parse_args()
    recipe = read_recipe(Path(__file__).parents[2] / "recipes/targets/code-long.yaml", TargetRecipe)
    packages, lengths, documents, tokens = (
        recipe.corpus.packages,
        LENGTHS,
        arguments.documents,
        arguments.max_new_tokens,
    )
    if arguments.quick:
        packages, lengths, documents, tokens = ["torch", "transformers"], (LENGTHS[0], LENGTHS[-1]), 5, 96
    target, tokenizer = TextTarget.load(arguments.target), load_tokenizer(arguments.target)
    output = arguments.output / ("quick" if arguments.quick else "full")
    rows = prompts_of(output / "prompts.jsonl", lengths, documents, tokenizer, packages)
    drafters = drafters_of(arguments, target)
    settings = {
        "target": arguments.target,
        "drafters": [arguments.eagle3, arguments.owl, arguments.owl_spec],
        "window": arguments.window,
        "max_new_tokens": tokens,
    }
    part, parts = map(int, arguments.part.split("/"))
    order = list(dict.fromkeys(row["document"] for row in rows))[part - 1 :: parts]
    journal = Journal(output / ("runs.jsonl" if parts == 1 else f"runs-{part}-of-{parts}.jsonl"), settings)
    run(
        [row for row in rows if row["document"] in order],
        drafters,
        target,
        stop_ids(target, tokenizer),
        tokens,
        journal,
    )
    rows, found = finished(rows, output, settings)
    text = tables(rows, found, lengths)
    (output / "tables.md").write_text(text)
    print(text)
    figures = Figures(rows, found)
    cells = [
        (longbench.label(n), method, figures.tau(method, n), ratio_interval(*figures.sums(method, n)))
        for n in lengths
        for method in drafters
    ]
    points_by_place(cells, colours(list(drafters)), "tau", "Acceptance length by context length", output / "tau.png")
    calibration(
        [(source, [point for _, point in points]) for source, points in scores(found)], output / "calibration.png"
    )
    by_length = lambda method: {longbench.label(n).lower(): round(figures.tau(method, n), 3) for n in lengths}  # noqa: E731
    print(
        json.dumps(
            {
                "owl_tau": by_length("owl-spec"),
                "owl_plain_tau": by_length("owl"),
                "eagle3_tau": by_length("eagle3"),
                "window_tau": by_length("eagle3-window"),
                "howl_tau": round(figures.tau("howl"), 3),
                "best_single_tau": round(max(figures.tau(m) for m in SINGLE), 3),
            }
        )
    )


if __name__ == "__main__":
    main()
