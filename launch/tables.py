"""The tables that `draftsmith eval`, `sweep` and `verify` print."""

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from draftsmith.eval.measurement.speed import in_words

WIDTH = 170


def show(document: dict) -> None:
    """The drafters side by side, then every timed cell, and how busy the machine was."""
    first, conditions = document["conditions"]["first"], document["conditions"]
    if first is not None:
        names = list(conditions["drafters"])
        Console(width=WIDTH).print(
            drafters_table({name: document if name == first else document[name] for name in names}, conditions)
        )
    timed = [cell for cell in document["cells"] if "speedup" in cell]
    Console(width=WIDTH).print(cells_table(timed))
    if timed:
        print(in_words(max(cell["disturbance"] for cell in timed if cell["method"] == "plain")))


def drafters_table(results: dict[str, dict], conditions: dict) -> Table:
    """Documented keys, one column a drafter."""
    large = conditions["tree_of_tree_tau"]
    table = Table(title=f"acceptance length tau = tokens / verify passes ({large} unless said)")
    table.add_column("")
    for name in results:
        table.add_column(name, justify="right")
    row = lambda label, value: table.add_row(label, *[value(r) for r in results.values()])  # noqa: E731
    row("tau, tree, T=0", lambda r: f"{r['tree_tau']:.2f}")
    chained = next(tree for tree in next(iter(results.values()))["greedy"] if tree != large)
    row(f"tau, {chained}, T=0", lambda r: f"{r['chain_tau']:.2f}")
    row("  predicted from teacher forcing", lambda r: f"{r['predicted_chain_tau']:.2f}")
    for temperature in next(iter(results.values()))["sampled"]:
        row(f"tau, tree, T={temperature}", lambda r: f"{r['sampled'][temperature]['tau']:.2f}")
    row(
        "acceptance by depth, tree, T=0",
        lambda r: " ".join(f"{a:.2f}" for a in r["greedy"][large]["acceptance_by_depth"]),
    )
    row("timed tree", lambda r: r["tree"])
    row("  tau", lambda r: f"{r['timed']['tau']:.2f}")
    row(
        "  tokens/s, plain -> with drafter",
        lambda r: f"{r['plain']['robust_tokens_per_second']:.0f} -> {r['timed']['robust_tokens_per_second']:.0f}",
    )
    row("  speedup", lambda r: f"{r['robust_speedup']:.2f}x")
    row(
        "    95 % interval",
        lambda r: "{:.2f}-{:.2f}".format(*r["timed"]["robust_speedup_interval"]),
    )
    row("  totals of this run: speedup (wall)", lambda r: f"{r['speedup']:.2f}x")
    if all("busy_speedup" in r["timed"] for r in results.values()):
        row("    (busy: without waiting for the CPU)", lambda r: f"{r['timed']['busy_speedup']:.2f}x")
    row("    (accounted)", lambda r: f"{r['accounted_speedup']:.2f}x")
    row("    (ideal)", lambda r: f"{r['ideal_speedup']:.2f}x")
    row(
        "  ms per pass: draft, verify, overhead",
        lambda r: " ".join(f"{r['timed']['robust_ms_per_pass'][k]:.1f}" for k in ("draft", "verify", "overhead")),
    )
    row("texts identical to plain decoding", lambda r: r["identical"])
    row("lossless", lambda r: {True: "yes", False: "NO", None: "claimed in fp32 alone"}[r["lossless"]])
    return table


def interval(cell: dict, key: str) -> str:
    low, high = cell[f"{key}_interval"]
    return f"{cell[key]:.2f}" + (f" ({low:.2f}-{high:.2f})" if high > low else "")


def cells_table(cells: list[dict]) -> Table:
    """One row a timed cell; intervals are 95 % bootstrap over prompts (speed: over batches)."""
    table = Table(
        box=SIMPLE,
        title="timed, interleaved (95 % intervals); wall and acc.: totals of this run; identical: texts equal to plain "
        "decoding, - where the library draws its own random numbers",
    )
    for name in ("suite", "method", "tree"):
        table.add_column(name, no_wrap=True)
    for name in (
        "T",
        "batch",
        "tau",
        "tau, no loops",
        "tokens/s",
        "speedup",
        "wall",
        "acc.",
        "ms draft+verify+rest",
        "identical",
    ):
        table.add_column(name, justify="right", no_wrap=True)
    before = None
    for cell in cells:
        place = (cell["suite"], cell["temperature"], cell["batch"])
        if before not in (None, place):
            table.add_section()
        split, rest = cell["robust_ms_per_pass"], cell["not_looping"]
        same = (
            f"{cell['identical']}/{cell['prompts']}" + (" NO" if cell["lossless"] is False else "")
            if "identical" in cell
            else "-"
        )
        table.add_row(
            cell["suite"],
            cell["method"],
            cell["tree"] or "",
            f"{cell['temperature']:g}",
            str(cell["batch"]),
            interval(cell, "tau"),
            interval(rest, "tau") if rest else "-",
            f"{cell['robust_tokens_per_second']:.0f}",
            interval(cell, "robust_speedup"),
            f"{cell['speedup']:.2f}",
            f"{cell['accounted_speedup']:.2f}",
            f"{split['draft']:.1f}+{split['verify']:.1f}+{split['overhead']:.1f}",
            same,
        )
        before = place
    return table


def show_proof(found: list[dict]) -> None:
    """One row a comparison, as lossless.json holds them, then every divergence."""
    table = Table(box=SIMPLE, title="texts identical to plain decoding, one prompt at a time")
    for name in ("target", "dtype", "method", "sampling"):
        table.add_column(name, no_wrap=True)
    for name in ("batch", "identical", "tolerated near-ties", "lossless"):
        table.add_column(name, justify="right")
    for c in found:
        tolerated = sum(d["tolerated"] for d in c["differences"])
        table.add_row(
            c["target"],
            c["dtype"],
            c["method"],
            c["sampling"],
            str(c["batch"]),
            f"{c['texts'] - len(c['differences'])}/{c['texts']}",
            str(tolerated),
            ("yes" if c["lossless"] else "NO") if c["claimed"] else "not claimed",
        )
    console = Console(width=WIDTH)
    console.print(table)
    for c in found:
        for d in c["differences"]:
            margin = "unknown" if d["margin"] is None else f"{d['margin']:.2e}"
            console.print(
                f"{c['dtype']} {c['method']}, {c['sampling']}, batch {c['batch']}: prompt {d['prompt']} token "
                f"{d['token']}: plain {d['plain']}, "
                f"found {d['found']}, gap {margin}",
                highlight=False,
            )


def show_sweep(result: dict) -> None:
    """Trees by measured speed, and what was expected of them."""
    table = Table(
        box=SIMPLE, title=f"auto {result['auto']}, best {result['best']}, auto / best {result['auto_over_best']:.3f}"
    )
    table.add_column("tree")
    for name in ("tau", "expected", "speedup", "expected", "wall speedup", "tokens/s", "ms draft+verify+rest"):
        table.add_column(name, justify="right", no_wrap=True)
    number = lambda value: "-" if value is None else f"{value:.2f}"  # noqa: E731
    for tree, f in sorted(result["trees"].items(), key=lambda item: -item[1]["speedup"]):
        split = f["ms_per_pass"]
        table.add_row(
            tree,
            number(f["tau"]),
            number(f["expected_tau"]),
            number(f["speedup"]),
            number(f["expected_speedup"]),
            number(f["wall_speedup"]),
            f"{f['tokens_per_second']:.0f}",
            f"{split['draft']:.1f}+{split['verify']:.1f}+{split['overhead']:.1f}",
        )
    Console(width=WIDTH).print(table)
    print(in_words(result["disturbance"]))
