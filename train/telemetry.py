"""What a run tells while it runs: one line of progress, log.jsonl with a line per step, and wandb where the recipe asks
for it.
"""

import json
import netrc
import os
import time
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlparse

import torch

from draftsmith.models.errors import UserError
from draftsmith.train import gto, soft_budget

ON_TREES = {"gto": gto, "soft_budget": soft_budget}
PHASES = ("data", "target", "drafter", "optimizer")


class Stopwatch:
    """Seconds by phase, devices synchronised at every border."""

    def __init__(self, device: torch.device):
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self.sync = torch.cuda.synchronize if device.type == "cuda" else (lambda: None)

    @contextmanager
    def phase(self, name: str):
        self.sync()
        start = time.perf_counter()
        yield
        self.sync()
        self.seconds[name] += time.perf_counter() - start

    def take(self) -> dict[str, float]:
        """Seconds since the last call."""
        taken, self.seconds = self.seconds, dict.fromkeys(PHASES, 0.0)
        return taken


def figures(sums: dict[str, torch.Tensor], weights: list[float]) -> dict:
    """Loss, accuracies per step and predicted chain tau from sums over rows (those of a head's `loss`); weights: of the
    steps in the loss.

    accuracy[k]: share of step k's rows that agree with the target; conditional[k]: of those whose earlier steps were
    all right.
    """
    rows, tried = sums["rows"].clamp(min=1), sums["tried"].clamp(min=1)
    losses = sums["loss"] / rows
    tokens, rounds = sums["walk"].tolist()
    return {
        "loss": float(sum(weight * value for weight, value in zip(weights, losses.tolist()))),
        "conditional": (sums["kept"] / tried).tolist(),
        "accuracy": (sums["right"] / rows).tolist(),
        "chain_tau": tokens / max(rounds, 1),
    } | {name: kind.figures(sums[name]) for name, kind in ON_TREES.items() if name in sums}


class Log:
    """log.jsonl, one line per step; lines behind the step that a run resumes from are dropped."""

    def __init__(self, path: Path, step: int):
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = path.read_text("utf-8").splitlines()[:step] if step and path.exists() else []
        partial = path.with_suffix(".partial")
        partial.write_text("".join(line + "\n" for line in kept), "utf-8")
        partial.replace(path)
        self.file = path.open("a")

    def write(self, line: dict) -> None:
        self.file.write(json.dumps(line) + "\n")
        self.file.flush()

    def finish(self) -> None:
        self.file.close()


class Progress:
    """The line that a person reads, at most every `every` seconds; accuracies are over all rows since the last one."""

    def __init__(self, say, total: int, coverage: float, weights: list[float], every: float = 10.0):
        self.say, self.total, self.coverage, self.weights, self.every = say, total, coverage, weights, every
        self.sums: dict[str, torch.Tensor] = {}
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self.shown = 0.0

    def __call__(self, line: dict, sums: dict[str, torch.Tensor], seconds: dict[str, float]) -> None:
        self.sums = {name: value + self.sums.get(name, 0) for name, value in sums.items()}
        self.seconds = {name: value + seconds[name] for name, value in self.seconds.items()}
        if time.time() - self.shown < self.every and line["step"] < self.total:
            return
        mean, spent = figures(self.sums, self.weights), sum(self.seconds.values()) or 1.0
        minutes, rest = divmod(int(line["left"]), 60)
        shares = " ".join(f"{name} {value / spent:.0%}" for name, value in self.seconds.items())
        numbers = lambda values: " ".join(f"{v:.2f}" for v in values)  # noqa: E731
        self.say(
            f"step {line['step']}/{self.total} loss {mean['loss']:.3f} | right {numbers(mean['accuracy'])} | given "
            f"right before "
            f"{numbers(mean['conditional'])} | chain tau {mean['chain_tau']:.2f} | {line['tokens_per_second']:.0f} "
            f"tok/s ({shares}) | "
            + tree_figures(mean.get("gto"), mean.get("soft_budget"))
            + f"vocabulary {self.coverage:.1%}"
            + (f" | {line['skipped']} steps skipped" * bool(line["skipped"]))
            + f" | left {minutes}:{rest:02d}"
        )
        self.sums, self.seconds, self.shown = {}, dict.fromkeys(PHASES, 0.0), time.time()


def tree_figures(g: dict | None, soft: dict | None) -> str:
    """What a person reads of the figures of GTO and of the soft-budget loss; nothing of what is not there."""
    told = [] if soft is None else [f"accepted {soft['accepted']:.3f} soft budget {soft['loss']:.4f}"]
    if g is not None:
        told.append(
            f"reward {g['reward']:.3f} (start {g['frozen_reward']:.3f}) ratio {g['ratio']:.3f} clipped "
            f"{g['clipped']:.0%} spread {g['spread']:.3f} skipped {g['skipped']:.0f} of {g['groups']:.0f} groups"
        )
    return "".join(f"{line} | " for line in told)


def logged_in() -> bool:
    """Whether wandb would find a key without asking for it."""
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname
    try:
        return bool(os.environ.get("WANDB_API_KEY") or netrc.netrc().authenticators(host))
    except (OSError, netrc.NetrcParseError):
        return False


def load_wandb():
    """The package. Raises UserError where it is missing."""
    try:
        import wandb
    except ImportError:
        raise UserError(
            "wandb: the recipe names a project, but the package wandb is not installed; pip install wandb, or "
            "wandb: null"
        ) from None
    return wandb


class Wandb:
    """A run in the given project; offline where nobody is logged in. Raises UserError when the package is missing."""

    def __init__(self, project: str, output: Path, recipe: dict):
        wandb = load_wandb()
        mode = os.environ.get("WANDB_MODE") or ("online" if logged_in() else "offline")
        output.mkdir(parents=True, exist_ok=True)
        self.run = wandb.init(
            project=project,
            dir=str(output),
            config=recipe,
            mode=mode,
            name=output.name,
            settings=wandb.Settings(silent=True),
        )

    def write(self, line: dict) -> None:
        flat = {k: v for k, v in line.items() if not isinstance(v, (list, dict))}
        flat |= {f"{k}/{i + 1}": x for k, v in line.items() if isinstance(v, list) for i, x in enumerate(v)}
        flat |= {f"{k}/{name}": x for k, v in line.items() if isinstance(v, dict) for name, x in v.items()}
        self.run.log(flat, step=line["step"])

    def finish(self) -> None:
        self.run.finish()
