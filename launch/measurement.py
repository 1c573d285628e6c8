"""Loads a target and drafters, runs the measurement, shows the table and writes result.json."""

import json
import os
import platform
import tempfile
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from draftsmith.eval.evaluate import Plan, evaluate
from draftsmith.eval.prompts import read_prompts
from draftsmith.models.chat import load_tokenizer, stop_ids
from draftsmith.models.errors import UserError
from draftsmith.models.formats import fetch, load_drafter
from draftsmith.models.grow import parse_tree
from draftsmith.models.targets import TextTarget, locate

LARGE_TREE = "dynamic:10x7x60"
CHAIN_DEPTH = 5
SWEEP = ("dynamic:4x4x12", "dynamic:6x4x16", "dynamic:6x5x24")


def measure_drafters(drafters: dict[str, str], target_name: str | None, prompts_file: str, output: Path, tree: str | None,
                     temperatures: list[float], max_new_tokens: int, limit: int | None, seed: int, report=print, sweep_prompts: int = 8) -> dict:
    """drafters {name: place, as `fetch` takes it}; without `tree` the fastest of a small sweep is timed. Writes {first drafter's keys, other names: theirs}."""
    check_writable(output.parent)
    folders = {name: fetch(folder) for name, folder in drafters.items()}
    first = next(iter(folders.values()))
    target_name = target_name or target_of(first)
    target, tokenizer = TextTarget.load(target_name), load_tokenizer(target_name)
    heads = {name: load_drafter(folder, target.embedding, target.layers) for name, folder in folders.items()}
    prompts = read_prompts(bundled(prompts_file), tokenizer, limit)
    plan = Plan(parse_tree(LARGE_TREE), CHAIN_DEPTH, tuple(parse_tree(t) for t in ([tree] if tree else SWEEP)), sweep_prompts,
                tuple(temperatures), max_new_tokens, 16, seed)
    results = evaluate(target, heads, [p.tokens for p in prompts], stop_ids(target, tokenizer), plan, report)
    names = list(results)
    document = {**results[names[0]], **{name: results[name] for name in names[1:]}, "conditions": {
        "target": target_name, "drafters": {n: str(f) for n, f in drafters.items()}, "prompts": prompts_file, "count": len(prompts),
        "max_new_tokens": max_new_tokens, "seed": seed, "tree_of_tree_tau": LARGE_TREE, "dtype": str(target.dtype).removeprefix("torch."),
        "device": str(target.device), "processor": platform.processor() or platform.machine(), "cores": os.cpu_count(),
        "threads": torch.get_num_threads(), "torch": torch.__version__}}
    write_json(output, document)
    show(results, plan)
    report(f"result in {output}")
    return document


def bundled(name: str) -> str:
    """A path, or `bundled:PATH` below the packaged recipes."""
    if name.startswith("bundled:") and name.endswith(".jsonl"):
        folder, _, file = name.rpartition("/")
        return str(Path(locate(folder)) / file)
    return locate(name)


def target_of(folder: Path) -> str:
    try:
        return json.loads((folder / "draftsmith.json").read_text("utf-8"))["target"]
    except (OSError, KeyError, json.JSONDecodeError):
        raise UserError(f"{folder}/draftsmith.json: no target named; expected --target or a drafter trained here") from None


def check_writable(folder: Path) -> None:
    """An unwritable place is found before the work, not after it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror})") from None


def write_json(path: Path, document: dict) -> None:
    """Complete or not at all."""
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False, suffix=".json") as file:
        json.dump(document, file, indent=1)
    os.replace(file.name, path)


def show(results: dict[str, dict], plan: Plan) -> None:
    table = Table(title=f"acceptance length tau = tokens / verify passes ({plan.tree} unless said)")
    table.add_column("")
    for name in results:
        table.add_column(name, justify="right")
    row = lambda label, value: table.add_row(label, *[value(r) for r in results.values()])  # noqa: E731
    row("tau, tree, T=0", lambda r: f"{r['tree_tau']:.2f}")
    row(f"tau, chain of {plan.chain_depth}, T=0", lambda r: f"{r['chain_tau']:.2f}")
    row("  predicted from teacher forcing", lambda r: f"{r['predicted_chain_tau']:.2f}")
    for temperature in plan.temperatures:
        row(f"tau, tree, T={temperature}", lambda r: f"{r['sampled'][str(temperature)]['tau']:.2f}")
    row("acceptance by depth, tree, T=0", lambda r: " ".join(f"{a:.2f}" for a in r["greedy"][str(plan.tree)]["acceptance_by_depth"]))
    row("fastest tree", lambda r: r["tree"])
    row("  tau", lambda r: f"{r['timed']['tau']:.2f}")
    row("  tokens/s, plain -> with drafter", lambda r: f"{r['plain']['tokens_per_second']:.0f} -> {r['timed']['tokens_per_second']:.0f}")
    row("  speedup (wall)", lambda r: f"{r['speedup']:.2f}x")
    row("  speedup (accounted)", lambda r: f"{r['accounted_speedup']:.2f}x")
    row("  speedup (ideal)", lambda r: f"{r['ideal_speedup']:.2f}x")
    row("  ms per pass: draft, verify, overhead", lambda r: " ".join(f"{r['timed']['ms_per_pass'][k]:.1f}" for k in ("draft", "verify", "overhead")))
    row("texts identical to plain decoding", lambda r: r["identical"])
    row("lossless", lambda r: "yes" if r["lossless"] else "NO")
    Console(width=110).print(table)
