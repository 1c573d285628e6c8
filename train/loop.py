"""recipe -> target -> rows -> features -> head.loss -> DeepSpeed -> drafter directory. One straight line."""

import contextlib
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import nn

from draftsmith.models.errors import UserError
from draftsmith.models.files import alone
from draftsmith.models.formats import load_drafter, save_drafter
from draftsmith.models.noise import seed_of
from draftsmith.models.targets import TextTarget, describe
from draftsmith.train import distributed
from draftsmith.train.about import measured, trained
from draftsmith.train.checkpoint import (
    UNWRITABLE,
    Checkpoints,
    Terminated,
    finished,
    latest,
    termination,
    unwritable,
)
from draftsmith.train.checks import check, check_output
from draftsmith.train.features import Cached, Online
from draftsmith.train.lora import Adapter
from draftsmith.train.partitioned import consolidated, gathered, size
from draftsmith.train.preparation import Prepared, prepared
from draftsmith.train.recipe import DrafterRecipe
from draftsmith.train.schedule import Schedule, held_out, rate_scale
from draftsmith.train.start import build_head, build_optimizer, regress, target_dtype, tree_objectives
from draftsmith.train.step import TrainingStep
from draftsmith.train.telemetry import Log, Progress, Stopwatch, Wandb, figures

PERSISTENT = 20  # steps in a row with gradients that are not finite, after which a run ends

Evaluator = Callable[
    [TextTarget, nn.Module, list[list[int]], set[int]], float
]  # acceptance length on prompts, given the stop ids


@dataclass
class State:
    """Where a run stands: what a checkpoint keeps beside the engine. best: {"tau", "step"} of the best drafter so
    far.
    """

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    skipped: int = 0
    in_a_row: int = 0
    best: dict | None = None


def train(
    recipe: DrafterRecipe, report=print, evaluator: Evaluator | None = None, engine_extra: dict | None = None
) -> Path:
    """Trains a drafter and returns its directory, `output/drafter`. `output/log.jsonl` holds one line per step.

    A killed or terminated run goes on from its last checkpoint when called again (`Terminated` is raised after
    SIGTERM and Ctrl-C); a finished one is left as it is. evaluator: measures the acceptance length on the held-out rows
    (`evaluation.rows` of the recipe).
    """
    with distributed.launched() as (rank, world, local), contextlib.ExitStack() as stack:
        say = report if rank == 0 else (lambda line: None)
        described = describe(recipe.target)
        check(recipe, described, rank)  # what it refuses leaves no folder behind
        output = Path(recipe.output)
        silent = {
            "output": True,
            "wandb": True,
            "engine": {"checkpoint_minutes"},
            "data": {"max_image_pixels", "chat_template_kwargs"},
        }  # the last two are part of the rows' key
        settings = recipe.model_dump(mode="json", exclude=silent)
        if described.weights is not None:
            settings["weights"] = described.weights.sha256
        check_output(output, settings)
        if rank == 0:
            stack.enter_context(alone(output, "train", recipe.output))
        made = prepared(recipe, described, output / "rows", say, waits=local != 0)
        settings["rows"] = made.rows.key
        if finished(output / "drafter", settings):
            say(
                f"{recipe.output}/drafter is there already, trained by this recipe on these rows; remove it to train "
                f"again"
            )
            return output / "drafter"
        with distributed.process_group(rank, world, local) as device:
            return Run(recipe, settings, made, rank, world, device, say, evaluator, engine_extra or {}).train()


class Run:
    """One process of a run. Every process knows all rows and takes its share of each step; the first one writes."""

    def __init__(
        self,
        recipe: DrafterRecipe,
        settings: dict,
        made: Prepared,
        rank: int,
        world: int,
        device: torch.device,
        say,
        evaluator: Evaluator | None,
        engine_extra: dict,
    ):
        rows, stops = made.rows, made.stops
        self.recipe, self.rows, self.stops, self.rank, self.world, self.say, self.evaluator = (
            recipe,
            rows,
            stops,
            rank,
            world,
            say,
            evaluator,
        )
        self.pictures = made.pictures
        self.output, spec, self.objective = Path(recipe.output), recipe.optimization, recipe.goal
        conversations = int(rows.conversations[-1]) + 1
        numbers, self.kept = held_out(
            rows.conversations, min(recipe.evaluation.rows, conversations // 2) if evaluator else 0, recipe.seed
        )
        self.schedule = Schedule(
            rows.lengths, numbers, spec.batch_tokens, world * spec.accumulation, recipe.seed, spec.epochs
        )
        tokens = int(rows.lengths[numbers].sum())
        if self.schedule.total < 1:
            raise UserError(
                f"data.files: found {len(numbers)} rows, {tokens:,} tokens; expected at least one step of "
                f"{world * spec.accumulation} x "
                f"{spec.batch_tokens} tokens (optimization.batch_tokens)"
            )
        self.target = TextTarget.load(recipe.target, target_dtype(recipe.engine.dtype, device), device)
        self.head = build_head(recipe, self.target, rows.counts, stops).to(device)
        self.adapter = Adapter(self.head, recipe.lora, recipe.head.start_from, recipe.seed) if recipe.lora else None
        self.coverage = float(rows.counts[self.head.ids.cpu()].sum() / rows.counts.sum())
        self.about = {
            "target": recipe.target,
            "weights": asdict(self.target.weights) if self.target.weights else None,
            "recipe": recipe.model_dump(),
            "settings": settings,
            "trained": trained(recipe, rows, made.renderer),
            "measured": measured(recipe) if len(self.kept) else None,
            "world_size": world,
            "draft_vocab_coverage": self.coverage,
        }
        self.checkpoints, self.state = Checkpoints(self.output / "checkpoints", settings, rank, world), State()
        place = latest(self.checkpoints.folder)
        found = self.checkpoints.read(place) if place else None
        resumes = found is not None and found["world_size"] == world
        if found and not resumes:
            if self.adapter is None:
                self.head.load_state_dict(
                    load_drafter(place / "drafter", self.target.shared, self.target.layers).state_dict()
                )
            else:
                self.adapter.load(self.adapter.read(place / "adapter"))
            say(
                f"{place} was written by {found['world_size']} processes, this run has {world}: its weights are a "
                f"warm start, "
                "optimizer and schedule begin anew"
            )
        if recipe.engine.target == "sharded":
            distributed.shard(self.target)
        self.features = self._features()
        if found is None and recipe.head.start_from is None and recipe.head.regression:
            regress(self.head, self.schedule, self.features, say)
        beside = tree_objectives(recipe, self.target, stops)
        self.optimizer = build_optimizer(recipe, self.head)
        self.engine = distributed.engine(
            TrainingStep(self.head, self.objective, beside),
            self.optimizer,
            distributed.engine_config(
                recipe.engine.zero_stage, recipe.engine.dtype, spec.accumulation, spec.clip, engine_extra
            ),
        )
        self.rates = [group["lr"] for group in self.engine.optimizer.param_groups]
        if resumes:
            self.checkpoints.load(self.engine, place)
            self.state = State(**found["state"])
            say(f"resumed at step {self.state.step}")
        say(
            f"{len(numbers):,} rows, {tokens:,} tokens, {int(rows.mask.sum()):,} written by the target; head "
            f"{size(self.head.parameters()) / 1e6:.2f} M parameters, "
            f"{size(p for p in self.head.parameters() if p.requires_grad) / 1e6:.2f} M of them "
            f"trained, draft vocabulary covers {self.coverage:.2%}; {self.schedule.total} steps on {world} "
            f"process{'es' * (world > 1)}"
        )

    def _features(self):
        """Where a step's features come from."""
        spec = replace(self.head.feature_spec, trees=self.recipe.on_trees)
        if self.recipe.data.features == "online":
            return Online(self.target, self.rows, spec, self.pictures)
        return Cached(self.target, self.rows, spec, self.output / "features", self.rank, self.say)

    def train(self) -> Path:
        """All steps that are left, then the drafter directory."""
        recipe, state, total = self.recipe, self.state, self.schedule.total
        logs = self._logs()
        progress, watch = (
            Progress(self.say, total, self.coverage, self.objective.weights),
            Stopwatch(self.target.device),
        )
        started, saved, current = time.time() - state.seconds, time.time(), None
        with termination() as asked:
            for number, epoch, bins in self.schedule.after(state.step):
                if epoch != current:
                    current = epoch
                    self._meet()
                scale, before = (
                    rate_scale(number - 1, total, recipe.optimization.warmup, recipe.optimization.schedule),
                    self._skipped(),
                )
                sums = self._step(number, bins, scale, watch)
                skipped = self._skipped() - before
                state.step, state.tokens, state.seconds = (
                    number,
                    state.tokens + sums.pop("tokens"),
                    time.time() - started,
                )
                state.skipped, state.in_a_row = state.skipped + skipped, (state.in_a_row + skipped) * skipped
                line = {
                    "step": number,
                    "total": total,
                    "epoch": epoch,
                    **figures(sums, self.objective.weights),
                    "skipped": state.skipped,
                    "learning_rate": self.rates[-1] * scale,
                    "tokens_per_second": state.tokens / state.seconds,
                    "seconds": state.seconds,
                    "left": state.seconds / number * (total - number),
                    "coverage": self.coverage,
                    "split": watch.take(),
                }
                if number in self._measured():
                    line["tau"] = self._measure()
                for log in logs:
                    log.write(line)
                progress(line, sums, line["split"])
                if state.in_a_row >= PERSISTENT:
                    raise UserError(
                        f"step {number}: found gradients that are not finite in {state.in_a_row} steps in a row, "
                        f"expected finite ones; "
                        "lower optimization.lr or muon_lr"
                    )
                due, stop = self._any(
                    time.time() - saved > recipe.engine.checkpoint_minutes * 60 and self.rank == 0, bool(asked)
                )
                if due or stop or number == total:  # behind the last step too: what follows may meet a full disk
                    self._save()
                    saved = time.time()
                    if stop:
                        raise Terminated(
                            f"terminated; step {number} is saved in {self.checkpoints.folder}, the same command "
                            f"resumes there",
                            asked[0] if asked else signal.SIGTERM,
                        )
        for log in logs:
            log.finish()
        return self._finish()

    def _step(self, number: int, bins: list[list[int]], scale: float, watch: Stopwatch) -> dict[str, torch.Tensor]:
        """Optimizer step `number` over this process's bins; sums over the rows of all processes, on the CPU."""
        for group, rate in zip(self.engine.optimizer.param_groups, self.rates):
            group["lr"] = rate * scale
        with watch.phase("data"):
            steps, share = self.objective.steps, len(bins)  # DeepSpeed averages the loss over all bins of a step
            counts = [
                max(1, n) / share for n in self.rows.pack([row for part in bins for row in part])[1].counts(steps)
            ]
        sums: dict[str, torch.Tensor] = {}
        for part in bins[self.rank :: self.world]:
            with watch.phase("target"):
                features = replace(self.features(part), seed=seed_of(self.recipe.seed, number, part))
            with watch.phase("drafter"):
                loss, more = self.engine(features, counts)
                self.engine.backward(loss)
            with watch.phase("optimizer"):
                self.engine.step()
            sums = {name: value + sums.get(name, 0) for name, value in more.items()}
        flat = torch.cat(list(sums.values())).double()
        if self.world > 1:
            torch.distributed.all_reduce(flat)
        parts = flat.cpu().split([len(value) for value in sums.values()])
        return {**dict(zip(sums, parts)), "tokens": sum(int(self.rows.lengths[part].sum()) for part in bins)}

    def _skipped(self) -> int:
        return self.optimizer.skipped + getattr(self.engine, "skipped_steps", 0)

    def _any(self, *flags: bool) -> list[bool]:
        """Each flag, raised where any process raised it."""
        if self.world == 1:
            return list(flags)
        raised = torch.tensor([float(f) for f in flags], device=self.target.device)
        torch.distributed.all_reduce(raised)
        return [bool(r) for r in raised.tolist()]

    def _meet(self) -> None:
        """Before an epoch: what every process wrote of the features is there for all."""
        self.features.flush()
        distributed.barrier(self.world)
        self.features.refresh()

    def _logs(self) -> list:
        if self.rank > 0:
            return []
        logs = [Log(self.output / "log.jsonl", self.state.step)]
        return (
            [*logs, Wandb(self.recipe.wandb, self.output, self.recipe.model_dump(mode="json"))]
            if self.recipe.wandb
            else logs
        )

    def _measured(self) -> set[int]:
        """The steps after which the acceptance length is measured, the last one among them."""
        times, total = self.recipe.evaluation.times, self.schedule.total
        return {round(total * (i + 1) / times) for i in range(times)} if len(self.kept) else set()

    def _prompt(self, number: int):
        tokens = self.rows.prompt(number)
        return self.pictures.prompt(tokens, self.rows.images(number)) if self.rows.seen else tokens

    def _measure(self) -> float:
        """Acceptance length on the held-out rows' prompts; the best drafter so far is kept in `output/best`."""
        head, adapter = self._now()
        tau = self.evaluator(self.target, head, [self._prompt(n) for n in self.kept], self.stops)
        if self.state.best is None or tau >= self.state.best["tau"]:
            self.state.best = {"tau": tau, "step": self.state.step}
            if self.rank == 0:
                self._write(head, adapter, self.output / "best")
        self.say(
            f"step {self.state.step}: acceptance length {tau:.3f} on {len(self.kept)} held-out prompts (best "
            f"{self.state.best['tau']:.3f} at "
            f"step {self.state.best['step']})"
        )
        return tau

    def _save(self) -> None:
        """A checkpoint of all processes. Raises UserError when it cannot be written; the one before stays."""
        head, adapter = self._now()
        self.features.flush()
        self.checkpoints.save(
            self.engine, asdict(self.state), lambda place: self._write(head, adapter, place, torch.float32)
        )

    def _finish(self) -> Path:
        """The drafter directory: the best measured drafter, or the last one; what it was adapted by stands in
        `output/adapter`.
        """
        folder, best, (head, adapter) = self.output / "drafter", self.state.best, self._now()
        if self.rank == 0:
            if best is not None and best["step"] < self.state.step:
                head = load_drafter(self.output / "best" / "drafter", self.target.shared, self.target.layers)
                adapter = adapter and self.adapter.read(self.output / "best" / "adapter")
                self.say(
                    f"the drafter of step {best['step']} is kept: acceptance length {best['tau']:.3f} on the "
                    f"held-out prompts"
                )
            try:
                self._write(head, adapter, self.output)
            except UNWRITABLE as error:
                raise unwritable(folder, error, self.output) from None
            for leftover in (self.checkpoints.folder, self.output / "best"):
                shutil.rmtree(leftover, ignore_errors=True)
            self.say(f"drafter saved in {folder}" + (f", adapter in {self.output / 'adapter'}" if adapter else ""))
        distributed.barrier(self.world)
        return folder

    def _now(self) -> tuple[nn.Module, dict[str, torch.Tensor] | None]:
        """The drafter as it stands, and what its adapter holds (None without lora); all processes call this."""
        stage = self.recipe.engine.zero_stage
        with gathered(self.head, stage):
            adapter = self.adapter.state() if self.adapter else None
        return consolidated(self.head, stage), adapter

    def _write(
        self, head: nn.Module, adapter: dict[str, torch.Tensor] | None, place: Path, dtype: torch.dtype = torch.bfloat16
    ) -> None:
        """`place/drafter`, and before it `place/adapter`: where there is a drafter its adapter is there too."""
        if adapter is not None:
            self.adapter.save(place / "adapter", adapter)
        save_drafter(head, place / "drafter", {**self.about, **asdict(self.state)}, dtype)
