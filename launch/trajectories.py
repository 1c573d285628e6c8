"""`draftsmith eval ... --trajectories N`: many samples of each prompt, and what drafters learn from one to the next."""

import json
from pathlib import Path

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from draftsmith.eval.measurement.journal import Journal, settings_before
from draftsmith.eval.measurement.progress import Progress
from draftsmith.eval.measurement.prompts import Prompt
from draftsmith.eval.measurement.trajectories import Method, ahead, figures, trajectories
from draftsmith.eval.sampling import Sampling
from draftsmith.launch.drafters import LIBRARY, takes, trained
from draftsmith.launch.finished import tree_names
from draftsmith.launch.measurement import LARGE_TREE, Request, digest, finished, going_on, named_suites, timely
from draftsmith.launch.methods import Methods, check_writable, write_json
from draftsmith.launch.tables import WIDTH
from draftsmith.models.errors import UserError, keeping
from draftsmith.models.files import alone
from draftsmith.models.grow import parse_tree


def scale(request: Request, count: int, report=print) -> dict:
    """Writes OUTPUT/trajectories.json: {"cells": [{"suite", "temperature", "batch", "method", figures over all
    trajectories, "numbers": the same by trajectory (by round of `batch` trajectories), "behind_first": how far the tau
    of the last round is behind that of the first method named, paired by prompt}], "conditions"}. Goes on where a
    killed one stopped.
    """
    plan = request.plan()
    temperatures = [t for t in plan.temperatures if t > 0]
    if not temperatures:
        raise UserError("--trajectories: found temperature 0 alone, where all are the same text; expected one above 0")
    methods = request.open(report)
    result, journal = request.output / "trajectories.json", request.output / "trajectories.jsonl"
    partial = Path(f"{journal}.partial")
    befores = [settings_before(place).get("clock") for place in (journal, partial)]
    methods.renderer = methods.renderer.at(next(filter(None, befores), None))
    library = [name for name, method in methods.named.items() if method in LIBRARY]
    if library:
        raise UserError(f"--trajectories: found {library[0]}, expected methods of our own decode loop")
    suites = named_suites(request.suites)
    tree = plan.fixed or parse_tree(LARGE_TREE)
    made = {"plain": Method(lambda: methods.drafters.drafter("plain"), methods.drafters.rule("plain"))}
    for name, method in methods.named.items():
        grown = tree if trained(method) or takes(method, plan.fixed or tree) else None
        made[name] = Method(
            lambda method=method, grown=grown: methods.drafters.drafter(method, grown, lasting=True),
            methods.drafters.rule(method),
        )
    rows = max(method.make().size for method in made.values())
    prompts = {
        name: methods.prompts(file, request.limit, request.max_new_tokens, rows, request.skip_long, report)
        for name, file in suites.items()
    }
    settings = {
        **methods.identity(),
        "suites": {name: digest(found) for name, found in prompts.items()},
        "trajectories": count,
        "temperatures": temperatures,
        "batches": request.batches,
        "tree": tree_names([request.tree])[0],
        "max_new_tokens": request.max_new_tokens,
        "seed": request.seed,
        **({"dtype": request.dtype} if request.dtype else {}),
        **timely(methods),
    }
    if (document := finished(result, journal, settings, report)) is None:
        check_writable(request.output)
        with alone(request.output, "trajectories", request.output), keeping(lambda: going_on(partial)):
            entries = Journal(partial, json.loads(json.dumps(settings)))
            document = measured(request, count, temperatures, suites, prompts, methods, made, entries, report)
            write_json(result, document)
            partial.replace(journal)
    Console(width=WIDTH).print(table(document["cells"]))
    report(f"result in {result}")
    return document


def measured(
    request: Request,
    count: int,
    temperatures: list[float],
    suites: dict[str, str],
    prompts: dict[str, list[Prompt]],
    methods: Methods,
    made: dict[str, Method],
    journal: Journal,
    report,
) -> dict:
    """The measurement itself: what trajectories.json holds."""
    cells = []
    for name, found in prompts.items():
        for temperature in temperatures:
            for batch in request.batches:
                what = f"{name}, T={temperature:g}, {count} trajectories, {batch} at a time"
                runs = trajectories(
                    methods.target,
                    made,
                    [p.tokens for p in found],
                    count,
                    batch,
                    Sampling(temperature, seed=request.seed),
                    request.max_new_tokens,
                    methods.stops,
                    Progress(report, what, len(found)),
                    journal,
                    f"{name}/{temperature}/{batch}",
                )
                first, last = next(iter(methods.named)), (count - 1) // batch
                for method, run in runs.items():
                    cell = {"suite": name, "temperature": temperature, "batch": batch, "method": method}
                    behind = ahead(runs[first], run, batch, last, request.seed) if method != first else None
                    cells.append(cell | figures(run, runs["plain"], batch, request.seed) | {"behind_first": behind})
    return {
        "cells": cells,
        "conditions": {
            "target": methods.target.name,
            "methods": methods.named,
            "prompts": list(suites.values()),
            "count": {name: len(found) for name, found in prompts.items()},
            "trajectories": count,
            "tree": request.tree,
            "datastore": request.datastore,
            "max_new_tokens": request.max_new_tokens,
            "seed": request.seed,
            **methods.machine(),
        },
    }


def table(cells: list[dict]) -> Table:
    """tau by trajectory (1, 2, 4, ... and the last), then the figures over all of them."""
    rounds = max(len(cell["numbers"]) for cell in cells)
    shown = sorted({2**power for power in range(rounds.bit_length()) if 2**power <= rounds} | {rounds})
    found = Table(box=SIMPLE, title="tau by trajectory (by round, where several are decoded together), then over all")
    for name in ("suite", "method"):
        found.add_column(name, no_wrap=True)
    others = ("all (95 %)", "tokens/s", "speedup", "draft / verify", "MB learned", "first method ahead")
    for name in ("T", "batch", *map(str, shown), *others):
        found.add_column(name, justify="right", no_wrap=True)
    for cell in cells:
        low, high = cell["tau_interval"]
        behind = cell["behind_first"]
        found.add_row(
            cell["suite"],
            cell["method"],
            f"{cell['temperature']:g}",
            str(cell["batch"]),
            *(f"{cell['numbers'][n - 1]['tau']:.2f}" if n <= len(cell["numbers"]) else "" for n in shown),
            f"{cell['tau']:.2f} ({low:.2f}-{high:.2f})",
            f"{cell['tokens_per_second']:.0f}",
            f"{cell['speedup']:.2f}",
            f"{cell['draft_share']:.3f}",
            f"{cell['memory_bytes'] / 1e6:.1f}",
            "" if behind is None else f"{behind[0]:+.2f} ({behind[1]:+.2f} to {behind[2]:+.2f})",
        )
    return found
