"""`draftsmith eval`: measures methods over suites, temperatures and batch sizes, shows the tables and writes
result.json and the report.
"""

import hashlib
import importlib.util
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from draftsmith.eval.lossless import dtype_of
from draftsmith.eval.measurement.journal import Journal, check_finished, settings_before
from draftsmith.eval.measurement.prompts import Prompt
from draftsmith.eval.measurement.suite import ACCEPTANCE_BATCH, Plan, Suite
from draftsmith.eval.measurement.threads import chosen_threads
from draftsmith.eval.sampling import Sampling
from draftsmith.launch.finished import tree_names
from draftsmith.launch.methods import ASSISTANT, Methods, bundled, check_writable, write_json
from draftsmith.launch.report import report as write_report_of
from draftsmith.launch.tables import show
from draftsmith.models.detokenizer import Detokenizer
from draftsmith.models.errors import UserError, keeping
from draftsmith.models.files import alone
from draftsmith.models.formats.layout import read_json
from draftsmith.models.grow import chain, parse_tree

LARGE_TREE = "dynamic:10x7x60"
CHAIN_DEPTH = 5
CHOICE_PROMPTS = 8
CODE = "bundled:prompts/code.jsonl"
RESULT, FINISHED = "result.json", "runs.jsonl"
PARTIAL = f"{FINISHED}.partial"  # the journal of a run that has not ended


@dataclass(frozen=True)
class Request:
    """What `draftsmith eval` was asked. methods: drafter directories and baselines; tree: `auto` or the tree to time;
    timed: the temperatures at which speed is measured (acceptance length is measured at all `temperatures`); threads:
    on a CPU, None = as `chosen_threads` says; dtype: of the target, None as `TextTarget.load` chooses; datastore: a
    directory of `draftsmith datastore build`; variables: of the chat template.
    """

    methods: list[str]
    output: Path
    suites: tuple[str, ...] = (CODE,)
    target: str | None = None
    assistant: str = ASSISTANT
    tree: str = "auto"
    temperatures: tuple[float, ...] = (0.0, 0.6, 1.0)
    timed: tuple[float, ...] | None = None
    batches: tuple[int, ...] = (1,)
    max_new_tokens: int = 128
    limit: int | None = None
    skip_long: bool = False
    seed: int = 0
    threads: int | None = None
    dtype: str | None = None
    datastore: str | None = None
    variables: Mapping = field(default_factory=dict)

    def open(self, report) -> Methods:
        """Raises UserError as `Methods.open`, and for an unknown dtype."""
        dtype = self.dtype and dtype_of(self.dtype)
        return Methods.open(self.methods, self.target, self.assistant, dtype, report, self.datastore, self.variables)

    def plan(self) -> Plan:
        """Raises UserError for values that contradict each other."""
        timed = self.temperatures if self.timed is None else self.timed
        for temperature in (*self.temperatures, *timed):
            if not math.isfinite(temperature):
                raise UserError(f"temperature: found {temperature}, expected a finite number")
            Sampling(temperature)
        for name, values in (
            ("temperatures", self.temperatures),
            ("timed temperatures", timed),
            ("batch sizes", self.batches),
        ):
            if len(set(values)) < len(values) or not values:
                raise UserError(
                    f"{name}: found {', '.join(map(str, values)) or 'none'}, expected at least one and each once"
                )
        return Plan(
            parse_tree(LARGE_TREE),
            CHAIN_DEPTH,
            None if self.tree == "auto" else parse_tree(self.tree),
            CHOICE_PROMPTS,
            self.temperatures,
            tuple((t, b) for t in timed for b in self.batches),
            self.max_new_tokens,
            self.seed,
        )


def measure(request: Request, report=print) -> dict:
    """Writes OUTPUT/result.json (the first drafter's documented keys, the other drafters' under their names, all cells,
    conditions), the raw traces beside it in runs.jsonl, and OUTPUT/report. A killed measurement goes on when the same
    one is asked again; a finished one is shown. Raises UserError where a finished one of other settings lies there.
    """
    plan = request.plan()
    suites = named_suites(request.suites)
    methods = request.open(report)
    journals = [settings_before(request.output / name) for name in (FINISHED, PARTIAL)]
    before = next((found for found in journals if "threads" in found), {})
    methods.renderer = methods.renderer.at(before.get("clock"))
    with chosen_threads(methods.target, request.threads, before.get("threads"), report) as tried:
        document = measure_suites(request, plan, suites, methods, tried, report)
    show(document)
    report(f"result in {request.output / RESULT}")
    if importlib.util.find_spec("matplotlib") is None:
        report("no report: matplotlib is not installed (pip install 'draftsmith[report]')")
    else:
        write_report_of(request.output, report)
    return document


def measure_suites(
    request: Request, plan: Plan, suites: dict[str, str], methods: Methods, tried: dict[int, float], report
) -> dict:
    """Writes result.json and runs.jsonl. tried: what led to the number of threads, recorded in the conditions."""
    if plan.fixed is not None:
        methods.shape(plan.fixed)
    rows = max(tree.size for tree in (plan.tree, chain(plan.chain_depth), plan.fixed or plan.tree))
    prompts = {
        name: methods.prompts(
            file, request.limit, request.max_new_tokens, max(rows, methods.rows), request.skip_long, report
        )
        for name, file in suites.items()
    }
    settings = {
        **methods.identity(),
        "suites": {name: digest(found) for name, found in prompts.items()},
        "temperatures": request.temperatures,
        "timed": plan.timed,
        "tree": tree_names([request.tree])[0],
        "max_new_tokens": request.max_new_tokens,
        "seed": request.seed,
        "threads": torch.get_num_threads(),
        **({"dtype": request.dtype} if request.dtype else {}),
        **timely(methods),
    }
    if (document := finished(request.output / RESULT, request.output / FINISHED, settings, report)) is not None:
        return document
    check_writable(request.output)
    with alone(request.output, "eval", request.output), keeping(lambda: going_on(request.output / PARTIAL)):
        journal = Journal(request.output / PARTIAL, json.loads(json.dumps(settings)))
        return measured(request, plan, suites, prompts, methods, journal, tried, report)


def measured(
    request: Request,
    plan: Plan,
    suites: dict[str, str],
    prompts: dict[str, list[Prompt]],
    methods: Methods,
    journal: Journal,
    tried: dict[int, float],
    report,
) -> dict:
    """The measurement itself, and its files."""
    if "threads" not in journal:
        journal.add("threads", {"trial_ms": {str(number): ms for number, ms in tried.items()}})
    cells, documents, samples, costs = [], {}, {}, {}
    for name, found in prompts.items():
        suite = Suite(
            name,
            methods.target,
            methods.heads,
            methods.baselines,
            [p.tokens for p in found],
            methods.stops,
            plan,
            journal,
            report,
            [p.category for p in found],
            costs,
        )
        results, more, traces = suite.measure()
        cells += more
        documents = documents or results  # the documented keys are those of the first suite
        samples = samples or {method: pieces(trace, methods.tokenizer) for method, trace in traces.items()}
    first, *others = documents or {None: {}}
    document = {
        **documents.get(first, {}),
        **{name: documents[name] for name in others},
        "cells": cells,
        "samples": samples,
        "conditions": {
            "target": methods.target.name,
            "drafters": methods.folders,
            "first": first,
            "prompts": list(suites.values()),
            "count": {name: len(found) for name, found in prompts.items()},
            "datastore": request.datastore,
            "max_new_tokens": request.max_new_tokens,
            "seed": request.seed,
            "tree_of_tree_tau": LARGE_TREE,
            "batch_of_tree_tau": ACCEPTANCE_BATCH,
            **methods.machine(),
            "thread_trial_ms": journal["threads"]["trial_ms"],
        },
    }
    write_json(request.output / RESULT, document)
    journal.path.replace(request.output / FINISHED)
    return document


def finished(result: Path, journal: Path, settings: dict, report) -> dict | None:
    """The result that is there already, where it is that of these settings; journal: of the finished run. Raises
    UserError where it is another's.
    """
    if not result.is_file() or Path(f"{journal}.partial").is_file() and not journal.is_file():
        return None
    check_finished(result, settings_before(journal), settings)
    report(f"{result} is there already, of the same measurement; remove it to measure again")
    return read_json(result)


def going_on(journal: Path) -> str:
    """What is kept of a measurement that was interrupted, in words."""
    if not journal.is_file():
        return "nothing is measured yet: the same command begins anew"
    return f"what is measured is kept in {journal}: the same command goes on"


def timely(methods: Methods) -> dict:
    """The clock that templates were told, where they ask for it: a run that goes on gives them the same."""
    return {"clock": methods.renderer.clock} if methods.renderer.clock else {}


def digest(prompts: list[Prompt]) -> str:
    """What tells these prompts from others."""
    return hashlib.sha256(json.dumps([p.identity for p in prompts]).encode()).hexdigest()[:16]


def named_suites(asked: Sequence[str]) -> dict[str, str]:
    """Files by the names that results give them: NAME=FILE says it, otherwise it is that of the file. Raises UserError
    for names that occur twice.
    """
    named = {}
    for suite in asked:
        name, said, file = suite.partition("=")
        if not said or "/" in name or ":" in name or Path(suite).exists():
            name, file = Path(bundled(suite)).name.split(".")[0], suite
        if not name or name in named:
            raise UserError(
                f"suites: found {name or 'no name'} {'twice' * bool(name)}, expected different names: NAME={file}"
            )
        named[name] = file
    return named


def pieces(trace, tokenizer) -> list[str]:
    """What each pass emitted as text, what the prefill emitted first; a character belongs to the pass that completes
    it.
    """
    detokenizer, texts, at = Detokenizer(tokenizer), [], 0
    for count in [len(trace.tokens) - sum(trace.emitted), *trace.emitted]:
        texts.append(detokenizer.push(trace.tokens[at : at + count]))
        at += count
    return [*texts[:-1], texts[-1] + detokenizer.rest()]
