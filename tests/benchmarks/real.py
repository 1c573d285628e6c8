"""The shipped drafters of `smollm2`, a real chat model, on the public suites: acceptance length, speed, losslessness.

    python tests/benchmarks/real.py [--quick] [--suites FOLDER] [--suite NAME ...] [--limit N] [--tokens N]
        [--temperature T ...] [--dtype bf16] [DRAFTER ...] [--output runs/real]

Suites are the EAGLE repository's evaluation prompts (MT-bench with its two turns, HumanEval, GSM8K, Alpaca, CNN/DM as
`sum`, QA) and Spec-Bench (of which rows are taken at even distances: its categories stand one behind the other), read
from FOLDER (default: what DRAFTSMITH_SUITES names, else `../shared/data/suites` beside the project); a suite whose file
is absent is named and left out. Methods: the drafters (default: the shipped EAGLE-3 and HASS ones, those that are
there), prompt lookup, suffix decoding and the library's prompt lookup, all beside plain decoding on the same prompts,
at T = 0 and 1. A killed run goes on when the same command is given again.

Prints, as Markdown, a table by suite and temperature with 95 % intervals, one by depth, one by category of Spec-Bench.
--quick: MT-bench, HumanEval and GSM8K, a few prompts each, EAGLE-3 alone. Ends with one JSON line:
tau, tau_t1          acceptance length of the 60-node tree by suite, T = 0 and T = 1
predicted_chain_tau  of a chain of 5 on the first suite, T = 0, by teacher forcing; chain_tau: as measured
lookup_tau           prompt lookup's acceptance length by suite, T = 0; suffix_tau: suffix decoding's
lossless             whether all texts of all runs are those of plain decoding; null in lower precision than fp32
robust_speedup       of the timed tree by suite, T = 0
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from draftsmith.launch.measurement import LARGE_TREE, Request, measure  # noqa: E402
from draftsmith.models.errors import UserError  # noqa: E402
from draftsmith.models.targets import locate  # noqa: E402
from tests.benchmarks.public import suites_folder  # noqa: E402

SUITES = {
    "mt_bench": "eagle_mt_bench.jsonl",
    "humaneval": "eagle_humaneval.jsonl",
    "gsm8k": "eagle_gsm8k.jsonl",
    "alpaca": "eagle_alpaca.jsonl",
    "sum": "eagle_sum.jsonl",
    "qa": "eagle_qa.jsonl",
    "spec_bench": "spec_bench.jsonl",
}
QUICK = ("mt_bench", "humaneval", "gsm8k")
DRAFTERS = ("bundled:drafters/eagle3-smollm2", "bundled:drafters/hass-smollm2")
BASELINES = ("lookup", "suffix", "hf-lookup")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("drafters", nargs="*", help="default: the shipped ones")
    parser.add_argument("--quick", action="store_true", help="3 suites, few prompts (under 10 minutes on 2 cores)")
    parser.add_argument("--suites", type=Path, help="folder of the suites' files")
    parser.add_argument("--suite", nargs="*", choices=list(SUITES), help="default: all")
    parser.add_argument("--limit", type=int, help="conversations of a suite; default 20, with --quick 4")
    parser.add_argument("--tokens", type=int, help="new tokens of a text; default 128, with --quick 40")
    parser.add_argument("--temperature", type=float, nargs="*", default=[0.0, 1.0])
    parser.add_argument("--dtype", help="of the target; default: fp32 on a CPU")
    parser.add_argument("--output", default="runs/real")
    arguments = parser.parse_args()
    quick = arguments.quick
    folder = suites_folder(arguments.suites)
    wanted = arguments.suite or (QUICK if quick else SUITES)
    found = {name: folder / SUITES[name] for name in wanted if (folder / SUITES[name]).is_file()}
    for name in wanted:
        if name not in found:
            print(f"{name}: {folder / SUITES[name]} is absent; left out")
    if not found:
        raise SystemExit(f"error: found no suite in {folder}, expected at least one of {', '.join(SUITES.values())}")
    limit = arguments.limit or (4 if quick else 20)
    if "spec_bench" in found:
        found["spec_bench"] = spread(found["spec_bench"], limit, Path(arguments.output) / "suites")
    drafters = arguments.drafters or [name for name in DRAFTERS[: 1 if quick else 2] if shipped(name)]
    document = measure(
        Request(
            [*drafters, *(BASELINES[:2] if quick else BASELINES)],
            Path(arguments.output),
            suites=tuple(map(str, found.values())),
            temperatures=tuple(arguments.temperature),
            timed=(0.0,) if quick else tuple(arguments.temperature),
            max_new_tokens=arguments.tokens or (40 if quick else 128),
            limit=limit,
            dtype=arguments.dtype,
            skip_long=True,
        )
    )
    cells, names = document["cells"], {path.stem.split(".")[0]: name for name, path in found.items()}
    for cell in cells:
        cell["suite"] = names[cell["suite"]]
    for lines in (by_suite(cells), by_depth(cells), by_category(cells)):
        print("\n".join(lines), end="\n\n")
    first = document["conditions"]["first"]
    print(json.dumps(summary(cells, first, document)))


def spread(file: Path, count: int, folder: Path) -> Path:
    """A file of `count` rows at even distances, kept in `folder`."""
    rows = file.read_text("utf-8").splitlines()
    folder.mkdir(parents=True, exist_ok=True)
    kept = folder / file.name
    kept.write_text("\n".join(rows[:: max(1, len(rows) // count)][:count]), "utf-8")
    return kept


def shipped(name: str) -> bool:
    try:
        locate(name)
    except UserError:
        print(f"{name}: is not there; left out")
        return False
    return True


def interval(cell: dict, key: str) -> str:
    low, high = cell[f"{key}_interval"]
    return f"{cell[key]:.2f} ({low:.2f}-{high:.2f})"


def by_suite(cells: list[dict]) -> list[str]:
    """One row a suite, temperature and method: tau of the 60-node tree, then tau and speedup of what was timed."""
    large = {
        (c["suite"], c["temperature"], c["drafter"]): c for c in cells if c["tree"] == LARGE_TREE and "speedup" not in c
    }
    lines = [
        "| suite | T | method | tau, 60 nodes | timed tree | tau, timed | speedup | robust speedup | identical |",
        "| - | - | - | - | - | - | - | - | - |",
    ]
    for cell in cells:
        if "speedup" not in cell or cell["method"] == "plain":
            continue
        whole = large.get((cell["suite"], cell["temperature"], cell["drafter"]))
        identical = f"{cell['identical']}/{cell['prompts']}" if "identical" in cell else "-"
        tau = interval(whole, "tau") if whole else "-"
        lines.append(
            f"| {cell['suite']} | {cell['temperature']:g} | {cell['method']} | {tau} "
            f"| {cell['tree'] or '-'} | {interval(cell, 'tau')} | {interval(cell, 'speedup')} "
            f"| {interval(cell, 'robust_speedup')} | {identical} |"
        )
    return lines


def by_depth(cells: list[dict]) -> list[str]:
    """Conditional acceptance by drafted level of the 60-node tree."""
    lines = ["| suite | T | drafter | acceptance by depth, 60 nodes |", "| - | - | - | - |"]
    for cell in cells:
        if cell["tree"] == LARGE_TREE and "speedup" not in cell:
            depths = " ".join(f"{a:.2f}" for a in cell["acceptance_by_depth"])
            lines.append(f"| {cell['suite']} | {cell['temperature']:g} | {cell['drafter']} | {depths} |")
    return lines


def by_category(cells: list[dict]) -> list[str]:
    """Acceptance length by the suite's own categories: the 60-node tree of drafters, and the baselines."""
    lines = ["| suite | T | method | category | prompts | tau |", "| - | - | - | - | - | - |"]
    for cell in cells:
        if cell["method"] != "plain" and (cell["tree"] == LARGE_TREE) == (cell["drafter"] is not None):
            for category, figures in cell["categories"].items():
                lines.append(
                    f"| {cell['suite']} | {cell['temperature']:g} | {cell['method']} | {category} "
                    f"| {figures['prompts']} | {interval(figures, 'tau')} |"
                )
    return lines if len(lines) > 2 else []


def summary(cells: list[dict], first: str, document: dict) -> dict:
    def tau(temperature: float, chosen) -> dict[str, float]:
        return {c["suite"]: round(c["tau"], 3) for c in cells if c["temperature"] == temperature and chosen(c)}

    def large(cell: dict) -> bool:
        return cell["drafter"] == first and cell["tree"] == LARGE_TREE and "speedup" not in cell

    return {
        "tau": tau(0.0, large),
        "tau_t1": tau(1.0, large),
        "predicted_chain_tau": round(document["predicted_chain_tau"], 3),
        "chain_tau": round(document["chain_tau"], 3),
        "lookup_tau": tau(0.0, lambda cell: cell["method"] == "lookup"),
        "suffix_tau": tau(0.0, lambda cell: cell["method"] == "suffix"),
        "lossless": None if document["lossless"] is None else all(cell.get("lossless", True) for cell in cells),
        "robust_speedup": {
            c["suite"]: round(c["robust_speedup"], 3)
            for c in cells
            if c["method"] == first and c["temperature"] == 0.0 and "speedup" in c
        },
    }


if __name__ == "__main__":
    main()
