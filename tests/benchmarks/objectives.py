"""Objectives of one drafter compared at equal processor time and at equal steps, from one start on the same answers.

    python tests/benchmarks/objectives.py --answers FILE --prompts FILE [--development FILE] [--target code]
        [--head eagle3] [--start early] [--seconds 90] [--rates 1] [--seeds 0] [--temperature 0 1] [--arm NAME ...]
        [--equal time steps] [--limit 200] [--dtype bf16] [--folder runs/objectives] [--output FILE]
    python tests/benchmarks/objectives.py --quick | --windows [--documents 4] [--new-tokens 96] [--package NAME ...]

All of it for the real target, in one command: `--target smollm2 --seeds 0 1 2 --rates 0.33 1 3 --development FILE`.

answers: what all trainings read (`draftsmith regenerate`); prompts, development: those that are decoded.
start: `early`, a drafter that the head's usual recipe trained for a tenth of what the shipped one took; `late`, the
shipped one; `fresh`, none, for arms that change the head's form. Each arm (`ARMS`: changes of the recipe) is trained
with each of the rates (factors of `RATES`), the best on the development prompts stays; more seeds are trained where the
first one gains. equal: time, as many steps as fit `--seconds` processor seconds, by a short run of `base` (once for
all rates and seeds) and by what a step of each arm costs beside one of `base`, all in turn (`--cost`; fresh heads by a
short run of their own); steps, as many as `base` takes in that time. dtype: of the products in training, and of the
target. What stands in the folder is not trained or decoded again. tau: 60-node tree, 64 new tokens; 95 % intervals
resample prompts, of gains over `base` of the same seed prompts are paired. Prints a Markdown table.

--cost instead times a step of each arm, all in turn: processor time depends on what else a machine does.

--quick decodes the shipped drafters of `code` (60 nodes, T = 0: `base` is the one trained on without GTO) and the
shipped EAGLE-3 head of `code-long` with and without a window, behind 1K and 8K tokens of the same documents; it ends
with one JSON line.
"""

import argparse
import hashlib
import json
import random
import statistics
import sys
import time
from dataclasses import replace
from functools import cached_property
from itertools import accumulate
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from draftsmith.eval.lossless import dtype_of  # noqa: E402
from draftsmith.eval.measurement.interval import quotient_interval, ratio_interval  # noqa: E402
from draftsmith.eval.measurement.journal import Journal  # noqa: E402
from draftsmith.eval.measurement.measure import decode_batches, tokens_and_passes  # noqa: E402
from draftsmith.eval.measurement.prompts import read_prompts  # noqa: E402
from draftsmith.eval.sampling import Sampling  # noqa: E402
from draftsmith.launch.measurement import bundled  # noqa: E402
from draftsmith.models.chat import load_tokenizer, stop_ids  # noqa: E402
from draftsmith.models.drafters import HeadDrafter  # noqa: E402
from draftsmith.models.features import Packing  # noqa: E402
from draftsmith.models.formats import load_drafter  # noqa: E402
from draftsmith.models.grow import parse_tree  # noqa: E402
from draftsmith.models.targets import TextTarget  # noqa: E402
from draftsmith.train.recipe import DrafterRecipe, read_recipe  # noqa: E402
from draftsmith.train.start import tree_objectives  # noqa: E402
from draftsmith.train.step import TrainingStep  # noqa: E402
from tests.benchmarks import long_context  # noqa: E402
from tests.benchmarks.gto_training import RECIPES, timed, trained  # noqa: E402

TREE, NEW_TOKENS, BATCH = "dynamic:10x7x60", 64, 13
TENTH = {"code": 95.0, "smollm2": 190.0}  # processor seconds: a tenth of what the shipped drafters took
RATES = {"fresh": (0.002, 0.0003), "early": (0.002, 0.0003), "late": (0.0005, 0.0001)}  # of Muon and of AdamW
GTO = {
    "groups": 4,
    "group_size": 8,
    "tree": "dynamic:4x5x24",
    "reward_agg": "node_sum",
    "reward_mode": "prob",
    "debias": True,
    "clip": 0.2,
    "delta": 0.01,
    "min_spread": 0.01,
    "omega": 0.1,
}
SOFT = {"roots": 32, "tree": "dynamic:4x5x24", "theta": 0.5, "omega": 1.0}
ARMS = {
    "base": [],
    "teacher T = 0.5": ["objective.teacher_temperature=0.5"],
    "teacher argmax": ["objective.teacher_temperature=0.0"],
    "reach greedy": ["objective.reach=greedy", "objective.decay=1.0"],
    "reach overlap": ["objective.reach=overlap", "objective.decay=1.0"],
    "total variation 0.5": ["objective.total_variation=0.5"],
    "total variation": ["objective.total_variation=1.0"],
    "rows greedy": ["objective.rows=greedy"],
    "rows top": ["objective.rows=top"],
    "rows half": ["objective.rows=0.5"],
    "soft budget": [f"soft_budget={json.dumps(SOFT)}"],
    "GTO": [f"gto={json.dumps(GTO)}"],
    "GTO, baseline by position": [f"gto={json.dumps(GTO | {'baseline': 'position'})}"],
    "GTO, omega 0.5": [f"gto={json.dumps(GTO | {'omega': 0.5})}"],
    "GTO, m = 4": [f"gto={json.dumps(GTO | {'groups': 8, 'group_size': 4})}"],
    "GTO, reward lse": [f"gto={json.dumps(GTO | {'reward_agg': 'lse'})}"],
}
FRESH = {
    "base": [],
    "EAGLE-3.1": ["head.fc_norm=true", "head.norm_output=true"],
    "norm per tap": ["head.fc_norm=true"],
    "normed output": ["head.norm_output=true"],
    "low rank 32": ["head.draft_vocab_size=null", "head.candidate_rank=32", "head.num_candidates=32"],
    "rows greedy": ["objective.rows=greedy"],
}
WINDOWS = (256, 512)  # of --quick: the head was trained on rows of at most 512 tokens
SHIPPED = {
    "start": "bundled:drafters/eagle3-code",
    "base": "bundled:drafters/eagle3-code-continued",
    "gto": "bundled:drafters/eagle3-code-gto",
}


def folder_of(*names) -> str:
    return "-".join(str(name).replace(",", "").replace(" = ", "").replace(" ", "-") for name in names)


class Arena:
    """Trainings and measurements of one target, head and start."""

    def __init__(self, arguments):
        self.a, self.recipe = arguments, f"{arguments.head}-{arguments.target}"
        spec = read_recipe(RECIPES / f"{self.recipe}.yaml", DrafterRecipe)
        self.target, tokenizer = TextTarget.load(spec.target, dtype_of(arguments.dtype)), load_tokenizer(spec.target)
        self.stops, self.spec = stop_ids(self.target, tokenizer), spec
        read = lambda file: [p.tokens for p in read_prompts(file, tokenizer, arguments.limit)]  # noqa: E731
        self.prompts = read(arguments.prompts)
        self.development = read(arguments.development) if arguments.development else None
        self.folder = arguments.folder / folder_of(arguments.target, arguments.head, arguments.start)
        self.found: dict[str, tuple] = {}
        with open(arguments.answers) as file:
            tokens = sum(len(json.loads(line)["tokens"]) for line in file)
        self.epoch = tokens / self.spec.optimization.batch_tokens  # steps, at most

    def trained(self, changes: list[str], place: Path, seconds: float, like: dict | None = None) -> dict:
        """By processor time, of which a step is timed over nine, or as long as `like` took."""
        short = (3 / self.epoch, 12 / self.epoch)
        return trained(self.recipe, changes, self.a.answers, place, seconds, short, like)

    def usual(self, rate: float, seed: int) -> list[str]:
        muon, adam = (rate * x for x in RATES[self.a.start])
        slow = self.spec.optimization.name == "adamw"
        return [
            f"seed={seed}",
            "data.features=online",
            "evaluation.rows=0",
            "engine.checkpoint_minutes=600",
            f"engine.dtype={self.a.dtype}",
            f"optimization.muon_lr={'null' if slow else muon}",
            f"optimization.lr={adam}",
            "optimization.warmup=0.05",
        ]

    def start(self) -> list[str]:
        if self.a.start == "fresh":
            return []
        if self.a.start == "late":
            return [f"head.start_from=bundled:drafters/{self.recipe}"]
        place = self.folder / "start"
        usual = ["data.features=online", "evaluation.rows=0", "engine.checkpoint_minutes=600"]
        usual.append(f"engine.dtype={self.a.dtype}")
        print(f"start: {self.trained(usual, place, TENTH[self.a.target])}", flush=True)
        return [f"head.start_from={place / 'drafter'}"]

    def train(self, arm: str, rate: float, seed: int, equal: str, start: list[str]) -> tuple[Path, dict]:
        """The drafter's place and what it took."""
        changes = [*start, *self.usual(rate, seed), *self.arms[arm]]
        place = self.folder / folder_of(arm, rate, seed, equal)
        if arm == "base" or (equal == "time" and self.a.start == "fresh"):
            first = self.a.rates[0], self.a.seeds[0]  # of which alone a step is timed: all of `base` take as many
            like = self.train("base", *first, "time", start)[1] if arm == "base" and (rate, seed) != first else None
            took = self.trained(changes, place, self.a.seconds, like)
        else:
            base = self.train("base", rate, seed, "time", start)[1]
            took = self.beside(base, changes, place, self.share(arm, base["step_ms"]) if equal == "time" else 1.0)
        return place / "drafter", took

    def share(self, arm: str, step_ms: float) -> float:
        """How many steps of an arm take as long as one of `base`, which takes step_ms; the optimizer costs all the
        same.
        """
        rest = max(0.0, step_ms - self.costs["base"])
        return (self.costs["base"] + rest) / (self.costs[arm] + rest)

    @cached_property
    def costs(self) -> dict[str, float]:
        """As `costs`, kept in the folder."""
        kept = self.folder / "costs.json"
        if not kept.exists():
            kept.write_text(json.dumps(costs(self, list(ARMS))))
        return json.loads(kept.read_text())

    def beside(self, base: dict, changes: list[str], place: Path, share: float) -> dict:
        """So many times the steps of `base`, whatever they take."""
        if not (place / "took.json").exists():
            seconds, steps = timed(self.recipe, changes, self.a.answers, place, share * base["epochs"])
            (place / "took.json").write_text(json.dumps({"seconds": round(seconds, 1), "steps": steps}))
        return json.loads((place / "took.json").read_text())

    @property
    def arms(self) -> dict[str, list[str]]:
        return FRESH if self.a.start == "fresh" else ARMS

    def counts(self, place: Path, temperature: float, prompts) -> tuple[list[int], list[int]]:
        """(tokens, passes) of every prompt; kept beside the drafter."""
        key = hashlib.sha256(json.dumps([prompts, temperature, TREE, NEW_TOKENS]).encode()).hexdigest()[:12]
        kept = place.parent / f"decoded-{key}.json"
        if not kept.exists():
            head = load_drafter(str(place), self.target.shared, self.target.layers)
            drafter, sampling = HeadDrafter(head, parse_tree(TREE)), Sampling(temperature)
            found = tokens_and_passes(
                decode_batches(
                    self.target, drafter, prompts, sampling, NEW_TOKENS, self.stops, BATCH, lambda done: None
                )
            )
            kept.write_text(json.dumps(found))
        return tuple(json.loads(kept.read_text()))

    def chosen(self, arm: str, equal: str, start: list[str]) -> float:
        """The rate that does best on the development prompts, with the first seed."""
        if len(self.a.rates) == 1:
            return self.a.rates[0]
        taus = {}
        for rate in self.a.rates:
            place, _ = self.train(arm, rate, self.a.seeds[0], equal, start)
            tokens, passes = self.counts(place, 0.0, self.development)
            taus[rate] = sum(tokens) / sum(passes)
            print(f"{arm}, rates x {rate:g}: development tau {taus[rate]:.3f}", flush=True)
        return max(taus, key=taus.get)

    def row(self, arm: str, rate: float, seed: int, equal: str, start: list[str]) -> dict:
        place, took = self.train(arm, rate, seed, equal, start)
        row = {"arm": arm, "equal": equal, "seed": seed, "rate": rate, **took}
        for temperature in self.a.temperature:
            key = f"T={temperature:g}"
            found = self.counts(place, temperature, self.prompts)
            if arm == "base":
                self.found[f"{seed} {key}"] = found
            beside = self.found[f"{seed} {key}"]
            tau = lambda counts: sum(counts[0]) / sum(counts[1])  # noqa: E731
            row[key] = {
                "tau": tau(found),
                "interval": ratio_interval(*found),
                "gain": tau(found) / tau(beside) - 1,
                "gain_interval": [x - 1 for x in quotient_interval(found, beside)],
            }
        return row

    def run(self) -> list[dict]:
        start, rows = self.start(), []
        names = self.a.arm or list(self.arms)
        keys = [f"T={t:g}" for t in self.a.temperature]
        print("| arm | equal | seed | steps (seconds) | " + " | ".join(f"tau, {k} | over base" for k in keys) + " |")
        print("|-|-|-|-|" + "-|-|" * len(keys), flush=True)
        for equal in self.a.equal:
            for arm in ["base", *(name for name in names if name != "base")]:
                rate = self.chosen(arm, equal, start)
                for number, seed in enumerate(self.a.seeds):
                    if number and arm != "base" and rows[-1][keys[0]]["gain"] <= 0:
                        break  # three seeds for whatever looks like a gain
                    rows.append(row := self.row(arm, rate, seed, equal, start))
                    print(shown(row, keys), flush=True)
        return rows


def costs(arena: Arena, arms: list[str], repeats: int = 4) -> dict[str, float]:
    """Milliseconds of the thread for one step of each arm (features, loss and gradient; not the optimizer), all arms in
    turn on one batch of the answers from the shipped drafter: medians, the first round left out.
    """
    start, target = f"bundled:drafters/{arena.recipe}", arena.target
    rows, used = [], 0
    with open(arena.a.answers) as file:
        found = list(map(json.loads, file))
    random.Random(0).shuffle(found)  # the first answers of a file are those that were short
    for row in found:
        if used + len(row["tokens"]) > arena.spec.optimization.batch_tokens:
            break
        rows.append(row)
        used += len(row["tokens"])
    mask = torch.cat([torch.arange(len(row["tokens"])) >= row["prompt_length"] for row in rows])
    packing = Packing((0, *accumulate(len(row["tokens"]) for row in rows)), mask)
    tokens = torch.tensor([token for row in rows for token in row["tokens"]])
    head, steps, times = load_drafter(start, target.shared, target.layers).train(), {}, {}
    for arm in arms:
        recipe = read_recipe(
            RECIPES / f"{arena.recipe}.yaml",
            DrafterRecipe,
            [f"head.start_from={start}", "data.features=online", *ARMS[arm]],
        )
        step = TrainingStep(head, recipe.goal, tree_objectives(recipe, target, arena.stops))
        steps[arm], times[arm] = (step, replace(head.feature_spec, trees=recipe.on_trees)), []
    for _ in range(repeats + 1):
        for arm, (step, spec) in steps.items():
            before = time.thread_time()
            loss, _ = step(target.features(tokens, packing, spec), packing.counts(step.objective.steps))
            loss.backward()
            times[arm].append(1e3 * (time.thread_time() - before))
    return {arm: round(statistics.median(found[1:]), 1) for arm, found in times.items()}


def shown(row: dict, keys: list[str]) -> str:
    cells = [row["arm"], row["equal"], str(row["seed"]), f"{row['steps']} ({row['seconds']:.0f})"]
    for key in keys:
        cell = row[key]
        (low, high), (worst, best) = cell["interval"], cell["gain_interval"]
        cells.append(f"{cell['tau']:.2f} ({low:.2f}-{high:.2f})")
        cells.append("" if row["arm"] == "base" else f"{cell['gain']:+.1%} ({worst:+.1%} to {best:+.1%})")
    return "| " + " | ".join(cells) + " |"


def quick(arguments) -> dict:
    """The JSON line of shipped drafters."""
    target, tokenizer = TextTarget.load("bundled:targets/code"), load_tokenizer("bundled:targets/code")
    prompts = [p.tokens for p in read_prompts(bundled("bundled:prompts/code.jsonl"), tokenizer, arguments.limit)]
    stops, counts = stop_ids(target, tokenizer), {}
    for name, place in SHIPPED.items():
        drafter = HeadDrafter(load_drafter(place, target.shared, target.layers), parse_tree(TREE))
        counts[name] = tokens_and_passes(
            decode_batches(target, drafter, prompts, Sampling(), NEW_TOKENS, stops, BATCH, lambda done: None)
        )
    tau = {name: sum(tokens) / sum(passes) for name, (tokens, passes) in counts.items()}
    print(f"shipped drafters of code, 60 nodes, T = 0, {len(prompts)} prompts: {tau}", flush=True)
    best = max(tau, key=tau.get)
    windowed, full = windows(arguments)
    return {
        "tau": {"base": round(tau["base"], 3), "best": round(tau[best], 3)},
        "gain": round(tau[best] / tau["base"] - 1, 4),
        "ci95": [round(x - 1, 4) for x in quotient_interval(counts[best], counts["base"])],
        "gto_gain": round(tau["gto"] / tau["base"] - 1, 4),
        "window_tau": windowed,
        "full_tau": full,
    }


def windows(arguments) -> tuple[dict, dict]:
    """tau of the shipped EAGLE-3 head of `code-long` with a window (the last of WINDOWS) and without, and OWL's beside
    them, of all documents at 1K and 8K."""
    name = "bundled:targets/code-long"
    target, tokenizer = TextTarget.load(name), load_tokenizer(name)
    lengths, output = (1024, 8192), arguments.folder / "windows"
    output.mkdir(parents=True, exist_ok=True)
    rows = long_context.prompts_of(output / "prompts.jsonl", lengths, arguments.documents, tokenizer, arguments.package)
    drafters = {"full": long_context.eagle3(target, None), "owl": long_context.owl(target)}
    drafters |= {f"window {n}": long_context.eagle3(target, n) for n in WINDOWS}
    tokens = arguments.new_tokens
    settings = {"target": name, "windows": list(WINDOWS), "max_new_tokens": tokens}
    journal = Journal(output / "runs.jsonl", settings)
    long_context.run(rows, drafters, target, stop_ids(target, tokenizer), tokens, journal)
    rows, found = long_context.finished(rows, output, settings)
    figures = long_context.Figures(rows, found)
    for method in drafters:
        print(f"{method}: " + ", ".join(f"{n // 1024}K {figures.shown(method, n)}" for n in lengths), flush=True)
    by = lambda method: {f"{n // 1024}k": round(figures.tau(method, n), 3) for n in lengths}  # noqa: E731
    return by(f"window {WINDOWS[-1]}"), by("full")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="shipped drafters, decoding only (under 10 minutes)")
    parser.add_argument("--cost", action="store_true", help="time a step of each arm instead")
    parser.add_argument("--windows", action="store_true", help="only the part of --quick that has windows")
    parser.add_argument("--package", nargs="*", default=["torch", "transformers"], help="where its documents are from")
    parser.add_argument("--documents", type=int, default=4)
    parser.add_argument("--new-tokens", type=int, default=96, help="of an answer behind a document")
    parser.add_argument("--answers")
    parser.add_argument("--prompts")
    parser.add_argument("--development")
    parser.add_argument("--target", choices=list(TENTH), default="code")
    parser.add_argument("--head", default="eagle3", help="its recipe is HEAD-TARGET.yaml")
    parser.add_argument("--start", choices=list(RATES), default="early")
    parser.add_argument("--seconds", type=float, default=90.0)
    parser.add_argument("--rates", type=float, nargs="*", default=[1.0])
    parser.add_argument("--seeds", type=int, nargs="*", default=[0])
    parser.add_argument("--temperature", type=float, nargs="*", default=[0.0])
    parser.add_argument("--equal", nargs="*", choices=("time", "steps"), default=["time"])
    parser.add_argument("--arm", nargs="*", choices=sorted({*ARMS, *FRESH}))
    parser.add_argument("--limit", type=int, default=200)
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--folder", type=Path, default=Path("runs/objectives"))
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    if arguments.quick or arguments.windows:
        print(json.dumps(quick(arguments) if arguments.quick else dict(zip(("window", "full"), windows(arguments)))))
        return
    if not arguments.answers or not arguments.prompts:
        parser.error("--answers and --prompts are needed without --quick")
    if len(arguments.rates) > 1 and not arguments.development:
        parser.error("--development is needed to choose between --rates")
    if arguments.cost:
        print(json.dumps(costs(Arena(arguments), arguments.arm or list(ARMS))))
        return
    rows = Arena(arguments).run()
    if arguments.output:
        arguments.output.write_text(json.dumps(rows, indent=1))
    print(json.dumps(rows))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
