"""The report: a directory with Markdown and pictures, made from result.json, and from sweep.json and training logs
where they are.
"""

from pathlib import Path

from draftsmith.eval.measurement.speed import in_words
from draftsmith.eval.report import plots as pictures

SAMPLES = 3  # methods whose text is shown
FEW = 20  # passes that say little about a depth


def write_report(
    document: dict, folder: Path, sweep: dict | None = None, logs: dict[str, list[dict]] | None = None
) -> Path:
    """Writes README.md and the pictures. logs {drafter: lines of its training's log.jsonl}; what is absent is said in
    one line.
    """
    folder.mkdir(parents=True, exist_ok=True)
    timed = [cell for cell in document["cells"] if "speedup" in cell]
    parts = ["# Measurement\n", conditions(document["conditions"]), MEANING, disturbance(timed)]
    parts += [
        "## All timed cells\n",
        table(timed),
        ahead(timed, document["conditions"]["first"]),
        by_category(timed),
        "## Acceptance of the reported trees\n",
        acceptance_table([cell for cell in document["cells"] if "speedup" not in cell]),
        "## Losslessness\n",
        losslessness(document["cells"]),
        "## Pictures\n",
    ]
    parts += draw_all(document["cells"], timed, document["samples"], folder)
    if sweep is None:
        parts.append(
            "No sweep map: no sweep.json beside result.json (`draftsmith sweep` with the same `--output` writes it).\n"
        )
    else:
        pictures.sweep_map(sweep, folder / "sweep.png")
        where = sweep["conditions"]
        parts.append(
            picture(
                "sweep.png",
                f"Speedup of every tree of the sweep (drafter {where['drafter']}, T={where['temperature']:g}, batch "
                f"{where['batch']}, {where['count']} prompts; robust speedup). The chosen tree "
                f"reached "
                f"{sweep['auto_over_best']:.1%} of the best one's speed.",
            )
        )
    missing = [name for name in document["conditions"]["drafters"] if name not in (logs or {})]
    if logs:
        pictures.training_curve(logs, folder / "training.png")
        parts.append(picture("training.png", "Training loss and accuracy by optimizer step."))
    if missing:
        parts.append(f"No training curve of {', '.join(missing)}: no log.jsonl beside the drafter's directory.\n")
    (folder / "README.md").write_text("\n".join(parts))
    return folder / "README.md"


MEANING = """
tau = tokens emitted / verify passes of the target, bonus token included (plain decoding = 1.00), all prompts pooled;
the token from the prefill counts in neither. Speedup = tau * q(plain pass) / (q(draft) + q(verify) + q(overhead)) in
one interleaved run, where q is the 10 % quantile of passes that do the same work: what a pass costs when nothing else
disturbs it. Tokens per second and milliseconds are those of the same passes. Wall speedup is the ratio of the tokens
per second of all of the run, with whatever else the machine did; accounted speedup is computed from the time split of
the totals; busy speedup, on a CPU, is that of the seconds that the decoding thread itself ran. On a quiet machine all
of them agree within a few per cent. Intervals are 95 % (bootstrap over prompts; of speed over batches). A prompt loops
when 30 % of the 4-grams of its plain greedy continuation occurred in it before.
"""


def disturbance(cells: list[dict]) -> str:
    """In words, of the timed comparison that was disturbed most; "" where none says it."""
    found = [cell["disturbance"] for cell in cells if cell["method"] == "plain" and "disturbance" in cell]
    return f"{in_words(max(found)).capitalize()}.\n" if found else ""


def speed(cells: list[dict]) -> str:
    """What stands before `speedup` and its kin in the keys that are shown; results of earlier versions have totals
    alone.
    """
    return "robust_" if all("robust_speedup" in cell for cell in cells) else ""


def conditions(where: dict) -> str:
    lines = [
        f"| {key.replace('_', ' ')} | "
        f"{', '.join(f'{k}: {v}' for k, v in value.items()) if isinstance(value, dict) else value} |"
        for key, value in where.items()
    ]
    return "| condition | |\n|-|-|\n" + "\n".join(lines) + "\n"


def span(cell: dict | None, key: str) -> str:
    if cell is None:
        return "-"
    low, high = cell[f"{key}_interval"]
    return f"{cell[key]:.2f}" + (f" ({low:.2f}-{high:.2f})" if high > low else "")


def table(cells: list[dict]) -> str:
    rows = [
        "| suite | T | batch | method | tau | tau, not looping | tau, looping | tokens/s | speedup | wall | busy | "
        "accounted | ideal | "
        "ms draft / verify / overhead | identical |",
        "|-|-|-|-|-|-|-|-|-|-|-|-|-|-|-|",
    ]
    key = speed(cells)
    for c in cells:
        split = c[f"{key}ms_per_pass"]
        rows.append(
            f"| {c['suite']} | {c['temperature']:g} | {c['batch']} | {label(c)} | {span(c, 'tau')} | "
            f"{span(c['not_looping'], 'tau')} | "
            f"{span(c['looping'], 'tau')} | {c[f'{key}tokens_per_second']:.0f} | {span(c, f'{key}speedup')} | "
            f"{span(c, 'speedup')} | {span(c, 'busy_speedup') if 'busy_speedup' in c else '-'} | "
            f"{c['accounted_speedup']:.2f} | {c['ideal_speedup']:.2f} | "
            f"{split['draft']:.1f} / {split['verify']:.1f} / {split['overhead']:.1f} | "
            f"{identical(c)} |"
        )
    return "\n".join(rows) + "\n"


def acceptance_table(cells: list[dict]) -> str:
    rows = [
        "| suite | T | drafter | tree | tau | macro tau | tau, not looping | acceptance by depth | identical |",
        "|-|-|-|-|-|-|-|-|-|",
    ]
    rows += [
        f"| {c['suite']} | {c['temperature']:g} | {c['drafter']} | {c['tree']} | {span(c, 'tau')} | "
        f"{c['macro_tau']:.2f} | "
        f"{span(c['not_looping'], 'tau')} | {' '.join(f'{a:.2f}' for a in c['acceptance_by_depth'])} | {identical(c)} |"
        for c in cells
    ]
    return "\n".join(rows) + "\n"


def identical(cell: dict) -> str:
    return f"{cell['identical']}/{cell['prompts']}" if "identical" in cell else "own random numbers"


def label(cell: dict) -> str:
    return cell["method"] + (f", {cell['tree']}" if cell["tree"] and "speedup" in cell else "")


def ahead(cells: list[dict], first: str | None) -> str:
    """The first drafter's lead in tau over every other method."""
    rows = [
        f"| {c['suite']} | {c['temperature']:g} | {c['batch']} | {c['method']} | {lead(c, 'all')} | "
        f"{lead(c, 'not_looping')} |"
        for c in cells
        if "tau_behind_first" in c and c["method"] != "plain"
    ]
    if not rows:
        return ""
    return (
        "\n".join(
            [
                f"By how much the tau of {first} is ahead (paired over prompts):\n",
                "| suite | T | batch | of | all prompts | not looping |",
                "|-|-|-|-|-|-|",
                *rows,
            ]
        )
        + "\n"
    )


def by_category(cells: list[dict]) -> str:
    """tau by the suites' own categories, smallest batch only."""
    rows = [
        f"| {c['suite']} | {c['temperature']:g} | {c['method']} | {category} | {figures['prompts']} | "
        f"{span(figures, 'tau')} |"
        for c in cells
        if c["batch"] == min(other["batch"] for other in cells) and c["method"] != "plain"
        for category, figures in c["categories"].items()
    ]
    if not rows:
        return ""
    return (
        "\n".join(
            [
                "Acceptance length by category:\n",
                "| suite | T | method | category | prompts | tau |",
                "|-|-|-|-|-|-|",
                *rows,
            ]
        )
        + "\n"
    )


def lead(cell: dict, key: str) -> str:
    if key not in cell["tau_behind_first"]:
        return "-"
    difference, low, high = cell["tau_behind_first"][key]
    return f"{difference:+.2f} ({low:+.2f} to {high:+.2f})"


def losslessness(cells: list[dict]) -> str:
    """Totals, and every divergence from plain decoding."""
    ours = [c for c in cells if "identical" in c]
    lines = [
        f"{sum(c['identical'] for c in ours)} of {sum(c['prompts'] for c in ours)} texts are identical to plain "
        f"decoding{'; identity is claimed in fp32 alone' if any(c['lossless'] is None for c in ours) else ''}.\n"
    ]
    for c in ours:
        lines += [
            f"* {label(c)}, {c['suite']}, T={c['temperature']:g}, batch {c['batch']}: prompt {d['prompt']}, token "
            f"{d['token']}, gap "
            f"{'unknown' if d['margin'] is None else format(d['margin'], '.1e')}, "
            f"{'tolerated' if d['tolerated'] else 'NOT tolerated'}"
            for d in c["divergences"]
        ]
    return "\n".join(lines) + "\n"


def picture(file: str, caption: str) -> str:
    return f"![{caption}]({file})\n\n{caption}\n"


def draw_all(cells: list[dict], timed: list[dict], samples: dict[str, list[str]], folder: Path) -> list[str]:
    """Draws what there are figures for; the Markdown of each."""
    parts, large = [], [c for c in cells if "speedup" not in c and c["acceptance_by_depth"]]
    suite = cells[0]["suite"]
    enough = lambda c: [rate for rate, passes in zip(c["acceptance_by_depth"], c["passes_by_depth"]) if passes >= FEW]  # noqa: E731
    curves = [(f"{c['drafter']} {c['tree']}", c["temperature"], enough(c)) for c in large if c["suite"] == suite]
    if curves:
        pictures.acceptance_by_depth(curves, folder / "acceptance.png")
        parts.append(
            picture(
                "acceptance.png",
                f"Of the passes that drafted a level and accepted the one above, the share that accepted it (suite "
                f"{suite}; "
                f"depths that fewer than {FEW} passes reached are left out).",
            )
        )
    trees = {f"{c['drafter']} {c['tree']}" for c in large if c["tree"].startswith("dynamic")}
    paint = pictures.colours([*dict.fromkeys(c["method"] for c in timed), *sorted(trees)])
    key = speed(timed)
    time = "undisturbed passes" if key else "wall time"
    smallest = min(c["batch"] for c in timed)
    place = timed[0]["temperature"]
    bars = [
        (label(c), c[f"{key}ms_per_pass"])
        for c in timed
        if (c["suite"], c["temperature"], c["batch"]) == (suite, place, smallest)
    ]
    pictures.time_split(bars, f"suite {suite}, T={place:g}, batch {smallest}", folder / "time.png")
    parts.append(
        picture(
            "time.png",
            "Milliseconds of one cycle; of the library's own loops the drafting of a lookup is part of the overhead.",
        )
    )
    single, spot = (
        [c for c in timed if c["batch"] == smallest and c["method"] != "plain"],
        lambda c: f"{c['suite']}\nT={c['temperature']:g}",
    )
    if single:
        reported = [
            (spot(c), f"{c['drafter']} {c['tree']}", c["tau"], c["tau_interval"])
            for c in large
            if c["tree"].startswith("dynamic")
        ]
        pictures.points_by_place(
            [(spot(c), c["method"], c["tau"], c["tau_interval"]) for c in single] + reported,
            paint,
            "acceptance length tau (tokens per pass)",
            "Acceptance length",
            folder / "tau.png",
        )
        pictures.points_by_place(
            [(spot(c), c["method"], c[f"{key}speedup"], c[f"{key}speedup_interval"]) for c in single],
            paint,
            "speedup over plain decoding",
            f"Speedup, batch {smallest} ({time})",
            folder / "speedup.png",
        )
        parts.append(
            picture(
                "tau.png",
                "Acceptance length by suite and temperature, 95 % intervals; drafters with the timed and with the "
                "reported tree.",
            )
        )
        parts.append(
            picture(
                "speedup.png",
                f"Speedup by suite and temperature, of {time}, 95 % intervals; the dashed line is plain decoding.",
            )
        )
    if len({c["batch"] for c in timed}) > 1:
        pictures.by_batch(
            [
                (c["temperature"], c["method"], c["batch"], c["tau"], c["tau_interval"], c[f"{key}tokens_per_second"])
                for c in timed
                if c["suite"] == suite
            ],
            paint,
            time,
            folder / "batch.png",
        )
        parts.append(picture("batch.png", f"Throughput of {time} and acceptance length by batch size (suite {suite})."))
    shown = {name: texts for name, texts in samples.items() if name != "plain" and not name.startswith("hf-")}
    shown = dict(list(sorted(shown.items(), key=lambda item: len(item[1])))[:SAMPLES])
    if shown:
        pictures.coloured_sample(shown, folder / "sample.png")
        parts.append(picture("sample.png", "One continuation: a new colour with every pass of the target."))
    return parts
