"""`draftsmith report`: makes the report of a finished measurement. `draftsmith eval` does the same when matplotlib is
there.
"""

import importlib.util
import json
from pathlib import Path

from draftsmith.models.errors import UserError
from draftsmith.models.targets import locate


def report(output: Path, say=print) -> None:
    """Reads OUTPUT/result.json, OUTPUT/sweep.json where there is one, and the log.jsonl beside every drafter; writes
    OUTPUT/report.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError("report: matplotlib is not installed; expected it (pip install 'draftsmith[report]')")
    from draftsmith.eval.report.report import write_report

    document = read(output / "result.json", "cells")
    sweep = read(output / "sweep.json", "auto_over_best") if (output / "sweep.json").is_file() else None
    logs = {}
    for name, folder in document["conditions"]["drafters"].items():
        log = Path(locate(folder)).parent / "log.jsonl"
        if log.is_file():
            logs[name] = lines(log)
    say(f"report in {write_report(document, output / 'report', sweep, logs)}")


def read(path: Path, key: str) -> dict:
    try:
        document = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; expected a finished measurement") from None
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(document, dict) or key not in document:
        raise UserError(f"{path}: {key}: missing; expected what this version of draftsmith writes")
    return document


def lines(path: Path) -> list[dict]:
    """A training log; a torn last line is left out."""
    found = []
    for line in path.read_text().splitlines():
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return [line for line in found if {"step", "loss", "conditional"} <= line.keys()]
