"""Online choice among drafters: regret, acceptance length and overhead on a mixed stream of requests.

    python tests/benchmarks/selection.py --quick [--suites FOLDER] [--output FILE]
    python tests/benchmarks/selection.py [--target TARGET] [--method METHOD ...] [--suite NAME=FILE ...] [--limit N]
        [--tokens N] [--seeds N] [--real N] [--texts 50000] [--dtype bf16] [--notes FILE] [--output FILE]

The first method is the generalist. Domains are the EAGLE repository's GSM8K, HumanEval, QA and MT-bench prompts, read
from FOLDER (default: what DRAFTSMITH_SUITES names, else `../shared/data/suites` beside the project).

At T = 0 the text is the target's own, whoever drafts. So every request is decoded once, all drafters propose at every
position, and how much of each tree the text follows is noted; every rule is then played on these notes, on the requests
in a random order, with `--seeds` orders and draws. The tau of a rule is what decoding with it gives (Token Recycling
apart, which would also learn from rejected nodes). Learners are fresh for every request (`reset`), or go on from one to
the next (`lasting`). Each loss becomes known when the text has reached it.

* tables: tau by domain of every fixed drafter and every rule, with the difference from the best fixed drafter of the
  domain in hindsight, and of NormalHedge from the generalist and the bandits, paired by request; cumulative regret (in
  tokens a pass over `HORIZON` + 1) by passes.
* switch: the same where each text is the first half of one domain's and the second half of another's.
* real: some requests decoded by `select:...` itself: tau beside the played one, seconds of the choosing by those of
  passes (the decoding thread's own).
* --texts N: sampled texts of a table model while drafters switch: G over the bound that a right sampler exceeds once in
  a million times.

--quick: 6 requests a domain, 32 tokens (under ten minutes on two quiet cores). Ends with one JSON line; overhead is
the share of a pass.
"""

import argparse
import hashlib
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from draftsmith.eval.decode import Clock, generate  # noqa: E402
from draftsmith.eval.lossless import dtype_of  # noqa: E402
from draftsmith.eval.measurement.interval import difference_interval  # noqa: E402
from draftsmith.eval.measurement.journal import Journal  # noqa: E402
from draftsmith.eval.measurement.prompts import read_prompts  # noqa: E402
from draftsmith.eval.sampling import Sampling  # noqa: E402
from draftsmith.eval.selecting import HORIZON, SelectingDrafter  # noqa: E402
from draftsmith.eval.verification.rules import RULES  # noqa: E402
from draftsmith.launch.drafters import CPU_TREE, trained  # noqa: E402
from draftsmith.launch.methods import ASSISTANT, Methods  # noqa: E402
from draftsmith.models.drafters.learners import Ucb1, learner, loss_of  # noqa: E402
from draftsmith.models.tree import DraftTree  # noqa: E402
from tests.benchmarks.public import suites_folder  # noqa: E402
from tests.eval.test_selecting import table_pool  # noqa: E402
from tests.table_target import TableTarget, g_over_bound  # noqa: E402

SUITES = {
    "gsm8k": "eagle_gsm8k.jsonl",
    "humaneval": "eagle_humaneval.jsonl",
    "qa": "eagle_qa.jsonl",
    "mt_bench": "eagle_mt_bench.jsonl",
}
METHODS = ("bundled:drafters/eagle3-smollm2", "suffix", "lookup", "stand:deterministic", "recycling")
RULES_PLAYED = ("hedge", "normalhedge", "adanormalhedge", "ucb1", "exp3", "uniform")
BATCH = 12


class Noting(SelectingDrafter):
    """Decodes plainly while all drafters propose. trees {request: [[tree of each drafter] a place]}."""

    def begin(self, features, root):
        self.trees = {}
        super().begin(features, root)

    def propose(self, draw):
        proposed = [drafter.propose(draw) for drafter in self.drafters]
        rows = [(tree.tokens.tolist(), tree.form) for tree in proposed]
        for b, request in enumerate(draw.requests):
            now = [(tokens[b], form.row(b)[0]) for tokens, form in rows]
            self.trees.setdefault(request, []).append(now)
        self.tree, self.chosen, self.temperature = DraftTree.root_only(self.root), [-1] * len(self.root), 0.0
        return self.tree

    def _learn(self, features, told, root):
        pass


def followed(tokens, parents, text) -> int:
    """How many levels of a tree a text goes down."""
    node, depth = 0, 0
    for token in text:
        node = next((n for n, (t, p) in enumerate(zip(tokens, parents)) if n and p == node and t == token), 0)
        if not node:
            return depth
        depth += 1
    return depth


def noted(methods: Methods, pool: dict, prompts: list[list[int]], tokens: int, kept: Path | None) -> list[np.ndarray]:
    """For each request [drafters, T]: the drafted tokens that each drafter would have had accepted at each root. kept:
    a journal, in which those of the same prompts and drafters stand already or are written.
    """
    asked = hashlib.sha256(json.dumps(prompts).encode()).hexdigest()
    settings = {"drafters": list(pool), "tokens": tokens, "prompts": asked, "dtype": str(methods.target.dtype)}
    journal = Journal(kept, settings) if kept else {}
    found = [np.array(journal[str(i)]["rows"], int) if str(i) in journal else None for i in range(len(prompts))]
    order = sorted((i for i, note in enumerate(found) if note is None), key=lambda i: len(prompts[i]))
    for start in range(0, len(order), BATCH):
        unit = order[start : start + BATCH]
        drafter = Noting(pool, methods.target.config.hidden_size)
        traces = generate(
            methods.target, drafter, [prompts[i] for i in unit], Sampling(), tokens, methods.stops, requests=unit
        )
        for i, trace in zip(unit, traces):
            text, places = trace.tokens, drafter.trees.get(i, [])
            rows = [[followed(t, p, text[at + 1 :]) for t, p in place] for at, place in enumerate(places)]
            found[i] = np.array(rows, int).reshape(len(rows), len(pool)).T
            if kept:
                journal.add(str(i), {"rows": found[i].tolist()})
        print(f"noted {min(start + BATCH, len(order))}/{len(order)} requests", flush=True)
    return found


def play(accepted: np.ndarray, brain, generator) -> tuple[int, int, np.ndarray]:
    """One request by a learner -> (tokens, passes, its losses less those of each drafter at the same places [passes,
    N]).
    """
    count, length = accepted.shape
    at, waiting, passes, gaps = 0, [], 0, []
    while at < length:
        while waiting and waiting[0][0] <= at:
            _, losses, chosen = waiting.pop(0)
            brain.feed(losses, chosen)
        chosen = int(generator.choice(count, p=brain.weights()))
        lengths = np.minimum(accepted[:, at], HORIZON) + 1
        losses = np.array([loss_of(n, HORIZON) for n in lengths])
        gaps.append(losses[chosen] - losses)
        known = at + int(accepted[chosen, at]) + 1 if brain.bandit else at + int(lengths.max())
        waiting.append((known, losses, chosen))
        at, passes = min(length, at + int(accepted[chosen, at]) + 1), passes + 1
    return length, passes, np.array(gaps).reshape(passes, count)


def streams(notes, domains, rule: str, seeds: int, lasting: bool):
    """Every request in a random order, for every seed -> {(seed, request): (tokens, passes, gaps)}."""
    found, count = {}, len(notes[0])
    for seed in range(seeds):
        generator, brain = np.random.default_rng(seed), learner(rule, count)
        for request in generator.permutation(len(notes)):
            if not lasting:
                brain = learner(rule, count)
            found[seed, int(request)] = play(notes[request], brain, generator)
    return found


def tau_of(played, requests) -> float:
    kept = [value for (_, request), value in played.items() if request in requests]
    return sum(t for t, _, _ in kept) / max(1, sum(p for _, p, _ in kept))


def growth(played, requests=None) -> tuple[dict[int, float], float]:
    """({passes: mean cumulative regret to each request's best fixed drafter}, exponent of its growth)."""
    curves = [gaps.cumsum(0).max(1) for _, _, gaps in played.values() if len(gaps)]
    points = {n: float(np.mean([c[n - 1] for c in curves if len(c) >= n])) for n in (1, 2, 4, 8, 16, 32, 64, 128)
              if sum(len(c) >= n for c in curves) >= max(3, len(curves) // 4)}  # fmt: skip
    xs = [(np.log(n), np.log(max(v, 1e-6))) for n, v in points.items() if n >= 4]
    return points, float(np.polyfit(*zip(*xs), 1)[0]) if len(xs) > 1 else float("nan")


def spliced(notes, domains) -> list[np.ndarray]:
    """The first half of one request's places and the second half of one of another domain."""
    names, found = sorted(set(domains)), []
    for i, (note, domain) in enumerate(zip(notes, domains)):
        others = [n for n, d in zip(notes, domains) if d == names[(names.index(domain) + 1) % len(names)]]
        other = others[i % len(others)]
        first, second = note[:, : note.shape[1] // 2], other[:, other.shape[1] // 2 :]
        left = np.arange(first.shape[1], 0, -1) - 1
        found.append(np.concatenate([np.minimum(first, left), second], 1))  # nothing is followed across the border
    return found


def table(notes, domains, names, seeds: int) -> dict:
    """tau by domain of every fixed drafter and rule; the best fixed one of each domain."""
    fixed = {name: streams(notes, domains, f"fixed={i}", 1, False) for i, name in enumerate(names)}
    parts = {d: {i for i, domain in enumerate(domains) if domain == d} for d in dict.fromkeys(domains)}
    best = {d: max(names, key=lambda name: tau_of(fixed[name], part)) for d, part in parts.items()}
    played = {f"{rule}{' lasting' * lasting}": streams(notes, domains, rule, seeds, lasting)
              for rule in RULES_PLAYED for lasting in (False, True)}  # fmt: skip
    every = set(range(len(notes)))
    oracle = {(0, i): fixed[best[domains[i]]][0, i] for i in every}
    hindsight = {(0, i): max((fixed[n][0, i] for n in names), key=lambda v: v[0] / max(1, v[1])) for i in every}
    rows = {**fixed, "best fixed of the domain": oracle, "best fixed of the request": hindsight, **played}
    document = {"best": best, "tau": {}, "behind_best": {}, "ahead": {}, "regret": {}, "exponent": {}}
    sums = {
        name: tuple([sum(v[k] for (_, r), v in values.items() if r == i) for i in sorted(every)] for k in (0, 1))
        for name, values in rows.items()
    }
    less = lambda name, other: [round(x, 3) for x in difference_interval(sums[name], sums[other])]  # noqa: E731
    for name, values in rows.items():
        document["tau"][name] = {d: round(tau_of(values, part), 3) for d, part in parts.items()}
        document["tau"][name]["all"] = round(tau_of(values, every), 3)
        document["behind_best"][name] = less(name, "best fixed of the domain")
        points, exponent = growth(values)
        document["regret"][name], document["exponent"][name] = points, round(exponent, 3)
    for rule in ("normalhedge", "normalhedge lasting"):
        document["ahead"][rule] = {other: less(rule, other) for other in (names[0], "ucb1", "exp3")}
    return document


def show(document: dict, title: str) -> None:
    domains = list(next(iter(document["tau"].values())))
    print(f"\n{title}; best fixed: {document['best']}; less others, 95 %: {document['ahead']}")
    print("| method | " + " | ".join(domains) + " | less the best fixed, 95 % | regret by passes | exponent |")
    print("| - " * (len(domains) + 4) + "|")
    for name, cells in document["tau"].items():
        low, high = document["behind_best"][name]
        regret = " ".join(f"{n}:{v:.2f}" for n, v in document["regret"][name].items())
        print(
            f"| {name} | "
            + " | ".join(f"{cells[d]:.2f}" for d in domains)
            + f" | {low:+.2f} to {high:+.2f} | {regret} | {document['exponent'][name]:.2f} |"
        )


def real(methods: Methods, names: list[str], prompts, notes, tokens: int) -> dict:
    """Requests decoded by the drafter itself, by its default rule and by the generalist alone."""
    drafter = methods.drafters.drafter("select:" + ",".join(names))
    clock = Clock(methods.target.device)
    chosen, emitted, passes = {}, 0, 0
    started = time.thread_time()
    for request, prompt in enumerate(prompts):
        (trace,) = generate(
            methods.target, drafter, [prompt], Sampling(), tokens, methods.stops, requests=[request], clock=clock
        )
        emitted, passes = emitted + sum(trace.emitted), passes + len(trace.emitted)
    spent = time.thread_time() - started
    chosen = {name: n for name, n in drafter.choices.items() if n}
    seconds = sum(one.draft + one.verify + one.overhead for one in clock.passes)
    return {
        "tau": round(emitted / max(1, passes), 3),
        "choices": chosen,
        "caught_up_rows": drafter.caught_up,
        "overhead": round(drafter.seconds / seconds, 4),
        "ms_per_pass": round(1e3 * seconds / max(1, passes), 2),
        "thread_seconds": round(spent, 1),
    }


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--suites", type=Path)
    parser.add_argument("--target", default="bundled:targets/smollm2")
    parser.add_argument("--method", nargs="*", default=list(METHODS), help="the generalist first")
    parser.add_argument("--suite", nargs="*", help="NAME=FILE, a domain each")
    parser.add_argument("--limit", type=int, help="requests of a domain")
    parser.add_argument("--tokens", type=int)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--real", type=int, help="requests that are decoded by the drafter itself")
    parser.add_argument("--texts", type=int, default=0)
    parser.add_argument("--notes", type=Path, help="a file that keeps what was noted, to play other rules on it")
    parser.add_argument("--dtype", help="of the target; default: fp32 on a CPU")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    quick, document = arguments.quick, {}
    files = dict(suite.split("=", 1) for suite in arguments.suite or ())
    if not files:
        folder = suites_folder(arguments.suites, list(SUITES.values()))
        files = {name: folder / file for name, file in SUITES.items()}
    tokens, limit = arguments.tokens or (32 if quick else 96), arguments.limit or (6 if quick else 50)
    dtype = arguments.dtype and dtype_of(arguments.dtype)
    methods = Methods.open(list(arguments.method), arguments.target, ASSISTANT, dtype)
    names, drafters = list(arguments.method), methods.drafters
    pool = {name: drafters.drafter(name, CPU_TREE if trained(name) else None) for name in names}
    prompts, domains = [], []
    for domain, file in files.items():
        room = methods.target.context_length - tokens - methods.rows
        some = [p for p in read_prompts(file, methods.renderer, limit) if len(p.tokens) <= room]
        prompts += [p.tokens for p in some]
        domains += [domain] * len(some)
    print(f"{len(prompts)} requests, {tokens} new tokens, drafters {', '.join(names)}", flush=True)
    if arguments.texts:
        pairs = (("traversal", "normalhedge"), ("rejection", "ucb1"))
        document["sampled"] = {}
        for rule, kind in pairs:
            target = TableTarget(3, seed=2)
            drafter = table_pool(Ucb1 if kind == "ucb1" else lambda n: learner("normalhedge", n))
            g = g_over_bound(target, drafter, RULES[rule], [0, 1], arguments.texts, 4, batch=500)
            document["sampled"][f"{rule}, {kind}"] = round(g, 3)
        print(
            f"{arguments.texts} sampled texts while drafters switch, G over its bound: {document['sampled']}",
            flush=True,
        )
    notes = noted(methods, pool, prompts, tokens, arguments.notes)
    kept = [i for i, note in enumerate(notes) if note.shape[1] > 0]
    notes, domains, prompts = [notes[i] for i in kept], [domains[i] for i in kept], [prompts[i] for i in kept]
    document["stream"] = table(notes, domains, names, arguments.seeds)
    show(document["stream"], f"{len(notes)} requests of {len(set(domains))} domains, {arguments.seeds} orders")
    document["switch"] = table(spliced(notes, domains), domains, names, arguments.seeds)
    show(document["switch"], "a switch of the domain inside every request")
    some = list(range(0, len(prompts), max(1, len(prompts) // (arguments.real or (4 if quick else 16)))))
    document["real"] = real(methods, names, [prompts[i] for i in some], [notes[i] for i in some], tokens)
    print(f"\ndecoded by select:{','.join(names)} itself: {document['real']}", flush=True)
    taus, exponents = document["stream"]["tau"], document["stream"]["exponent"]
    line = {
        "tau": {
            "hedge": taus["normalhedge"]["all"],
            "hedge_lasting": taus["normalhedge lasting"]["all"],
            "ucb1": taus["ucb1"]["all"],
            "exp3": taus["exp3"]["all"],
            "generalist": taus[names[0]]["all"],
            "best_fixed_per_domain": taus["best fixed of the domain"]["all"],
        },
        "regret_exponent": exponents["normalhedge"],
        "overhead": document["real"]["overhead"],
    }
    if arguments.output:
        arguments.output.write_text(json.dumps(document | {"line": line}, indent=1))
    print(json.dumps(line))


if __name__ == "__main__":
    main()
