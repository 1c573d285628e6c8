"""recipe -> target -> rows -> features -> head.loss -> DeepSpeed -> drafter directory. One straight line."""

import json
import math
import shutil
import time
from pathlib import Path

import torch

from draftsmith.models.chat import load_tokenizer, stop_ids
from draftsmith.models.errors import UserError
from draftsmith.models.formats import load_drafter, save_drafter
from draftsmith.models.heads import Eagle3Config, Eagle3Head
from draftsmith.models.heads.vocabulary import most_frequent
from draftsmith.models.targets import TextTarget
from draftsmith.train import data, distributed
from draftsmith.train.checkpoint import Checkpoints, termination
from draftsmith.train.muon import MuonAdamW
from draftsmith.train.recipe import DrafterRecipe
from draftsmith.train.step import TrainingStep


def build_head(recipe: DrafterRecipe, target: TextTarget, rows: list[data.Row], stops: set[int]) -> tuple[Eagle3Head, float]:
    """The head with its draft vocabulary, and the share of supervised tokens that it covers."""
    spec, counts = recipe.head, data.token_counts(rows, target.vocab_size)
    config = Eagle3Config.for_target(target.config, spec.intermediate_size, spec.draft_vocab_size)
    ids = most_frequent(counts, config.draft_vocab_size, sorted(stops))
    torch.manual_seed(recipe.seed)
    head = Eagle3Head(config, target.embedding, ids)
    head.start_from(target)
    return head, float(counts[ids].sum() / counts.sum())


def build_optimizer(recipe: DrafterRecipe, head: Eagle3Head):
    spec = recipe.optimization
    if spec.name == "adamw":
        return torch.optim.AdamW(head.parameters(), lr=spec.lr, betas=(0.9, 0.95), weight_decay=0.0)
    if recipe.engine.zero_stage > 0:
        raise UserError(f"engine.zero_stage: found {recipe.engine.zero_stage}, expected 0 with optimization.name muon (it needs whole matrices)")
    named = list(head.named_parameters())
    return MuonAdamW([p for n, p in named if p.ndim == 2 and "lm_head" not in n], [p for n, p in named if p.ndim != 2 or "lm_head" in n],
                     spec.muon_lr, spec.lr)


def rate_scale(step: int, total: int, warmup: float) -> float:
    """Learning-rate factor: linear rise over the first `warmup` share of the steps, then linear fall to zero."""
    rise = max(1, round(warmup * total))
    return min((step + 1) / rise, (total - step) / max(1, total - rise))


def train(recipe: DrafterRecipe, report=print) -> Path:
    """Trains a drafter and returns its directory, `output/drafter`. `output/log.jsonl` holds one line per step.

    A killed or terminated run goes on from its last checkpoint when called again (`Terminated` is raised after SIGTERM).
    """
    with distributed.processes() as (rank, world, device):
        return run(recipe, rank, world, device, report if rank == 0 else (lambda line: None))


def run(recipe: DrafterRecipe, rank: int, world: int, device: torch.device, say) -> Path:
    """The training of one process. Every rank sees the same rows and takes its share of each batch; rank 0 writes."""
    import deepspeed

    spec = recipe.optimization
    target, tokenizer = TextTarget.load(recipe.target, device=device), load_tokenizer(recipe.target)
    if recipe.data.max_length > target.context_length:
        raise UserError(f"data.max_length: found {recipe.data.max_length}, expected at most the target's {target.context_length}")
    stops = stop_ids(target, tokenizer)
    rows = data.read_rows(recipe.data.files, tokenizer, stops, target.vocab_size, recipe.data.max_length)
    per_epoch = len(rows) // (spec.batch_rows * world * spec.accumulation)
    total = math.floor(per_epoch * spec.epochs)
    if total < 1:
        raise UserError(f"data.files: found {len(rows)} rows, expected at least one batch of {spec.batch_rows * world * spec.accumulation}")
    head, coverage = build_head(recipe, target, rows, stops)
    settings = recipe.model_dump(mode="json", exclude={"output": True, "engine": {"checkpoint_minutes"}})
    checkpoints = Checkpoints(Path(recipe.output) / "checkpoints", settings, rank, world)
    place = checkpoints.latest()
    if place is not None and checkpoints.read(place)["world_size"] != world:
        warm = load_drafter(place / "drafter", target.embedding, target.layers)
        head.load_state_dict(warm.state_dict())
        say(f"{place} was written by {checkpoints.read(place)['world_size']} processes, this run has {world}: its weights are a warm start, "
            "optimizer and schedule begin anew")
    optimizer = build_optimizer(recipe, head)
    engine, *_ = deepspeed.initialize(
        model=TrainingStep(head, recipe.objective.steps, recipe.objective.decay), model_parameters=head.parameters(), optimizer=optimizer,
        config=distributed.engine_config(recipe.engine.zero_stage, recipe.engine.dtype, spec.batch_rows, spec.accumulation, spec.clip))
    rates = [group["lr"] for group in engine.optimizer.param_groups]
    say(f"{len(rows)} rows, {sum(len(r.tokens) for r in rows):,} tokens, {sum(sum(r.mask) for r in rows):,} written by the target; "
        f"head {sum(p.numel() for p in head.parameters()) / 1e6:.2f} M parameters, draft vocabulary covers {coverage:.2%}; "
        f"{total} steps on {world} process{'es' * (world > 1)}")
    output, about = Path(recipe.output), {"target": recipe.target, "recipe": recipe.model_dump(), "world_size": world, "draft_vocab_coverage": coverage}
    state = {"step": 0, "tokens": 0, "seconds": 0.0}
    if place is not None and checkpoints.read(place)["world_size"] == world:
        checkpoints.load(engine, place)
        state = checkpoints.read(place)
        say(f"resumed at step {state['step']}")
    log = Log(output / "log.jsonl", state["step"]) if rank == 0 else None
    started, saved, tokens, shown = time.time() - state["seconds"], time.time(), state["tokens"], 0.0
    with termination() as terminated:
        for step, epoch, batches in schedule(recipe, rows, world, state["step"], total):
            scale, figures = rate_scale(step - 1, total, spec.warmup), 0.0
            for group, rate in zip(engine.optimizer.param_groups, rates):
                group["lr"] = rate * scale
            for batch in batches:
                features = target.features(*data.collate([rows[i] for i in batch[rank::world]], target.device), head.feature_spec)
                loss, metrics = engine(features)
                engine.backward(loss)
                engine.step()
                tokens += sum(len(rows[i].tokens) for i in batch)
                figures = figures + torch.cat([loss.detach()[None], metrics["conditional"], metrics["accuracy"]]) / spec.accumulation
            due = rank == 0 and time.time() - saved > recipe.engine.checkpoint_minutes * 60
            asked = figures.new_tensor([float(due), float(terminated())])
            if world > 1:
                deepspeed.comm.all_reduce(figures)
                deepspeed.comm.all_reduce(asked)
                figures /= world
            if not math.isfinite(figures[0]):
                raise UserError(f"step {step}: loss is {float(figures[0])}, expected a finite number; lower optimization.lr or muon_lr")
            seconds = time.time() - started
            if rank == 0:
                line = progress(step, total, epoch, tokens, seconds, figures.tolist())
                log.write(line)
                if time.time() - shown > 10 or step == total:
                    shown = time.time()
                    say(format_progress(line))
            if bool(asked.any()) and step < total:
                written = {"tokens": tokens, "seconds": seconds}
                checkpoints.save(engine, step, written, lambda folder, s=step: save_drafter(head, folder, {**about, "steps": s, **written}, torch.float32))
                saved = time.time()
                if asked[1] > 0:
                    raise Terminated(f"terminated; step {step} is saved in {checkpoints.folder}, the same command resumes there")
    folder = output / "drafter"
    if rank == 0:
        save_drafter(head, folder, {**about, "steps": total, "tokens": tokens, "seconds": round(time.time() - started, 1)})
        shutil.rmtree(checkpoints.folder, ignore_errors=True)
        say(f"drafter saved in {folder}")
    deepspeed.comm.barrier()
    return folder


class Terminated(Exception):
    """The run was asked to stop and saved its state."""


def schedule(recipe: DrafterRecipe, rows: list[data.Row], world: int, done: int, total: int):
    """Yields (step, epoch, global micro-batches of row numbers) for steps done + 1 .. total."""
    spec, step = recipe.optimization, 0
    for epoch in range(math.ceil(spec.epochs)):
        batches = data.epoch_batches(rows, spec.batch_rows, world, recipe.seed, epoch)
        for first in range(0, len(batches) - spec.accumulation + 1, spec.accumulation):
            step += 1
            if done < step <= total:
                yield step, epoch, batches[first:first + spec.accumulation]


class Log:
    """log.jsonl, one line per step; lines behind the step that a run resumes from are dropped."""

    def __init__(self, path: Path, step: int):
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = path.read_text().splitlines()[:step] if step and path.exists() else []
        self.file = path.open("w")
        self.file.writelines(line + "\n" for line in kept)

    def write(self, line: dict) -> None:
        self.file.write(json.dumps(line) + "\n")
        self.file.flush()


def progress(step: int, total: int, epoch: int, tokens: int, seconds: float, figures: list[float]) -> dict:
    """One log line; figures = [loss, conditional..., accuracy...], means over all processes. conditional[k]: right at step k given right
    before; accuracy[k]: right up to step k."""
    steps = len(figures) // 2
    return {"step": step, "total": total, "epoch": epoch, "loss": figures[0], "conditional": figures[1:1 + steps], "accuracy": figures[1 + steps:],
            "tokens_per_second": tokens / seconds, "seconds": seconds, "left": seconds / step * (total - step)}


def format_progress(line: dict) -> str:
    minutes, seconds = divmod(int(line["left"]), 60)
    steps = " ".join(f"{a:.2f}" for a in line["conditional"])
    return (f"step {line['step']}/{line['total']} loss {line['loss']:.3f} right given right before {steps} "
            f"{line['tokens_per_second']:.0f} tok/s left {minutes}:{seconds:02d}")
