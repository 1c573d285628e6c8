"""Pictures of a measurement. Every function draws one file from figures of result.json, sweep.json or a training log;
matplotlib, no display.

Error bars are 95 % bootstrap intervals. `paint` {name: colour} is that of the report: a method keeps its colour from
picture to picture.
"""

from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from draftsmith.eval.report.palette import PALETTE, colour_of_pass

PHASES = {"draft": "#E69F00", "verify": "#0072B2", "overhead": "#999999"}
COLUMNS, LINES = 100, 24  # characters of a sample


def colours(names: list[str]) -> dict[str, str]:
    return {name: PALETTE[i % len(PALETTE)] for i, name in enumerate(names)}


def canvas(width: float, height: float, rows: int = 1, columns: int = 1):
    figure = Figure(figsize=(width, height), dpi=130, layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def tidy(axes, **labels: str) -> None:
    axes.set(**labels)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def beside(axes) -> None:
    """A legend that covers nothing."""
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))


def acceptance_by_depth(curves: list[tuple[str, float, list[float]]], path: Path) -> None:
    """curves: (drafter and tree, temperature, conditional acceptance of depth 1, 2, ...)."""
    figure, ((axes,),) = canvas(10, 4.6)
    paint = colours(list(dict.fromkeys(name for name, _, _ in curves)))
    styles = dict(zip(sorted({t for _, t, _ in curves}), ("-", "--", ":", "-.")))
    for name, temperature, rates in curves:
        axes.plot(
            range(1, len(rates) + 1),
            rates,
            styles.get(temperature, "-"),
            marker="o",
            ms=4,
            color=paint[name],
            label=f"{name}, T={temperature:g}",
        )
    tidy(
        axes,
        xlabel="depth of the drafted token (1 = right behind the root)",
        ylabel="accepted, given its parent was",
        ylim=(0, 1.02),
        title="Acceptance by depth",
    )
    axes.xaxis.get_major_locator().set_params(integer=True)
    beside(axes)
    figure.savefig(path)


def time_split(bars: list[tuple[str, dict[str, float]]], place: str, path: Path) -> None:
    """bars: (method, {"draft", "verify", "overhead"} in ms of a cycle)."""
    figure, ((axes,),) = canvas(9, 1.4 + 0.42 * len(bars))
    for row, (_, split) in enumerate(bars):
        left = 0.0
        for phase, colour in PHASES.items():
            axes.barh(row, split[phase], left=left, color=colour, label=phase if row == 0 else None)
            left += split[phase]
        axes.annotate(f"{left:.1f} ms", (left, row), xytext=(4, 0), textcoords="offset points", va="center", fontsize=8)
    axes.set_yticks(range(len(bars)), [name for name, _ in bars])
    axes.invert_yaxis()
    axes.margins(x=0.12)
    tidy(axes, xlabel="milliseconds of one cycle (draft, verify, accept)", title=f"Where a cycle's time goes ({place})")
    beside(axes)
    figure.savefig(path)


def points_by_place(
    cells: list[tuple[str, str, float, list[float]]], paint: dict[str, str], ylabel: str, title: str, path: Path
) -> None:
    """cells: (place, method, value, [low, high]); places on the x axis, methods side by side, a line at 1 (plain
    decoding).
    """
    places, names = (list(dict.fromkeys(cell[i] for cell in cells)) for i in (0, 1))
    figure, ((axes,),) = canvas(max(7, 1.9 + 0.28 * len(names) * len(places)), 4.6)
    step = 0.8 / len(names)
    for name in names:
        mine = [(places.index(place), value, *bounds) for place, method, value, bounds in cells if method == name]
        x = [at + (names.index(name) - (len(names) - 1) / 2) * step for at, *_ in mine]
        errors = [[max(0.0, v - low) for _, v, low, _ in mine], [max(0.0, high - v) for _, v, _, high in mine]]
        axes.errorbar(x, [v for _, v, _, _ in mine], errors, fmt="o", ms=5, capsize=3, color=paint[name], label=name)
    for border in range(1, len(places)):
        axes.axvline(border - 0.5, color="#dddddd", lw=1)
    axes.axhline(1, color="#888888", lw=1, ls="--")
    axes.set_xticks(range(len(places)), places)
    tidy(axes, ylabel=ylabel, title=title)
    axes.set_ylim(bottom=0)
    beside(axes)
    figure.savefig(path)


def by_batch(
    cells: list[tuple[float, str, int, float, list[float], float]], paint: dict[str, str], time: str, path: Path
) -> None:
    """cells: (temperature, method, batch size, tau, [low, high], tokens a second of `time`)."""
    temperatures, names = sorted({c[0] for c in cells}), list(dict.fromkeys(c[1] for c in cells))
    figure, grid = canvas(10.5, 0.4 + 3.2 * len(temperatures), len(temperatures), 2)
    for (left, right), temperature in zip(grid, temperatures):
        for name in names:
            mine = sorted(c[2:] for c in cells if c[:2] == (temperature, name))
            if len({m[0] for m in mine}) < 2:
                continue  # one batch size is no curve
            x, taus, bounds, rates = zip(*mine)
            left.plot(x, rates, marker="o", ms=4, color=paint[name], label=name)
            right.errorbar(
                x,
                taus,
                [[t - b[0] for t, b in zip(taus, bounds)], [b[1] - t for t, b in zip(taus, bounds)]],
                marker="o",
                ms=4,
                capsize=3,
                color=paint[name],
                label=name,
            )
        for axes in (left, right):
            axes.set_xscale("log", base=2)
            axes.set_xticks(sorted({c[2] for c in cells}), sorted({c[2] for c in cells}))
        tidy(
            left,
            xlabel="batch size (prompts)",
            ylabel="tokens per second, all rows",
            title=f"Throughput ({time}), T={temperature:g}",
        )
        tidy(
            right,
            xlabel="batch size (prompts)",
            ylabel="tau (tokens per pass)",
            title=f"Acceptance length, T={temperature:g}",
        )
        left.set_ylim(bottom=0)
        right.set_ylim(bottom=0)
    beside(grid[0][1])
    figure.savefig(path)


def training_curve(logs: dict[str, list[dict]], path: Path) -> None:
    """logs {drafter: lines of log.jsonl}: loss, and conditional accuracy of the first, a middle and the last step."""
    figure, ((left, right),) = canvas(10, 4, 1, 2)
    paint = colours(list(logs))
    for name, lines in logs.items():
        steps = [line["step"] for line in lines]
        left.plot(steps, smoothed([line["loss"] for line in lines]), color=paint[name], label=name)
        last = len(lines[0]["conditional"]) - 1
        for depth, style in dict.fromkeys(((0, "-"), (last // 2, "--"), (last, ":"))):
            right.plot(
                steps,
                smoothed([line["conditional"][depth] for line in lines]),
                style,
                color=paint[name],
                label=f"{name}, depth {depth + 1}",
            )
    tidy(left, xlabel="optimizer step", ylabel="training loss (nats, weighted sum of steps)", title="Training loss")
    tidy(
        right,
        xlabel="optimizer step",
        ylabel="right, given right before",
        ylim=(0, 1),
        title="Training accuracy by depth",
    )
    for axes in (left, right):
        axes.legend(fontsize=8)
    figure.savefig(path)


def smoothed(values: list[float]) -> list[float]:
    """Running mean over a fiftieth of the curve."""
    width = max(1, len(values) // 50)
    return [sum(values[max(0, i - width + 1) : i + 1]) / (i - max(0, i - width + 1) + 1) for i in range(len(values))]


def sweep_map(result: dict, path: Path) -> None:
    """result of `eval.sweep`: measured speedup of the best width for every depth and size of dynamic trees, with the
    chosen and the best tree.
    """
    parsed = {
        tree: [int(n) for n in tree.partition(":")[2].split("x")]
        for tree in result["trees"]
        if tree.startswith("dynamic:")
    }
    depths, sizes = (sorted({numbers[i] for numbers in parsed.values()}) for i in (1, 2))
    best: dict[tuple[int, int], tuple[float, str]] = {}
    for tree, (_, depth, size) in parsed.items():
        at = depths.index(depth), sizes.index(size)
        best[at] = max(best.get(at, (0.0, "")), (result["trees"][tree]["speedup"], tree))
    figure, ((axes,),) = canvas(1.8 + 0.95 * len(sizes), 1.6 + 0.6 * len(depths))
    table = [[best.get((d, s), (float("nan"),))[0] for s in range(len(sizes))] for d in range(len(depths))]
    image = axes.imshow(table, cmap="viridis", aspect="auto", origin="lower")
    middle = (max(v for v, _ in best.values()) + min(v for v, _ in best.values())) / 2
    for (d, s), (value, tree) in best.items():
        mark = "\nauto" * (tree == result["auto"]) + "\nbest" * (tree == result["best"])
        axes.text(
            s,
            d,
            f"{value:.2f}x\n(k={parsed[tree][0]}){mark}",
            ha="center",
            va="center",
            fontsize=7,
            color="black" if value > middle else "white",
        )
    axes.set_xticks(range(len(sizes)), sizes)
    axes.set_yticks(range(len(depths)), depths)
    axes.set(
        xlabel="tree size (rows that the target verifies)",
        ylabel="depth (drafted levels)",
        title=f"Measured speedup; auto {result['auto']}, best {result['best']}",
    )
    axes.title.set_fontsize(9)
    figure.colorbar(image, label="speedup over plain decoding")
    figure.savefig(path)


def coloured_sample(samples: dict[str, list[str]], path: Path) -> None:
    """samples {method: text of each cycle}: the same text, a new colour with every pass of the target."""
    pages = {name: page(pieces) for name, pieces in samples.items()}
    heights = [max(line for line, *_ in cells) + 1 for cells in pages.values()]
    width = max(60, *(column + 1 for cells in pages.values() for _, column, *_ in cells))
    figure = Figure(
        figsize=(0.082 * width + 0.2, 0.45 * len(pages) + 0.17 * sum(heights)), dpi=130, layout="constrained"
    )
    grid = figure.subplots(len(pages), 1, squeeze=False, height_ratios=[h + 2 for h in heights])
    for (axes,), (name, cells), height in zip(grid, pages.items(), heights):
        for line, column, cycle, character in cells:
            axes.add_patch(Rectangle((column, line), 1, 1, color=colour_of_pass(cycle), lw=0))
            axes.text(
                column + 0.5,
                line + 0.55,
                character,
                family="monospace",
                fontsize=8,
                ha="center",
                va="center",
                parse_math=False,
            )
        axes.set(xlim=(0, width), ylim=(height, 0))
        passes = len(samples[name]) - 1
        axes.set_title(
            f"{name}: {passes} passes behind the prompt's; a colour is what one pass emitted", fontsize=9, loc="left"
        )
        axes.axis("off")
    figure.savefig(path)


def page(pieces: list[str]) -> list[tuple[int, int, int, str]]:
    """(line, column, cycle, character) of text that is wrapped and cut to the picture."""
    cells, line, column = [], 0, 0
    for cycle, piece in enumerate(pieces):
        for character in piece.replace("\t", "    "):
            if character == "\n" or column == COLUMNS:
                line, column = line + 1, 0
            if line == LINES:
                return cells
            if character != "\n":
                cells.append((line, column, cycle, character if character.isprintable() else "?"))
                column += 1
    return cells


def calibration(points: list[tuple[str, list[tuple[float, float, int]]]], path: Path) -> None:
    """points: (source, [(mean score, mean accepted tokens, steps)]) by range of scores; on the diagonal a score is what
    it says it is.
    """
    figure, ((axes,),) = canvas(7.5, 4.6)
    paint = colours([source for source, _ in points])
    top = max(score for _, found in points for score, _, _ in found)
    axes.plot([0, top], [0, top], color="#888888", lw=1, ls="--")
    for source, found in points:
        scores, accepted, steps = zip(*found)
        axes.plot(scores, accepted, marker="o", ms=5, color=paint[source], label=source)
        for x, y, count in zip(scores, accepted, steps):
            axes.annotate(
                str(count), (x, y), xytext=(4, -10), textcoords="offset points", fontsize=7, color=paint[source]
            )
    tidy(
        axes,
        xlabel="score of the suffix draft (tokens expected to be accepted)",
        ylabel="tokens accepted in the step, mean",
        title="What a suffix score is worth (numbers: steps)",
    )
    beside(axes)
    figure.savefig(path)
