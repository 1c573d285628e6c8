"""What a run starts from: its head, the head's own start in closed form before the first step, and its optimizer."""

from collections.abc import Callable

import torch
from torch import nn

from draftsmith.models.errors import UserError
from draftsmith.models.features import Shared, TrainingFeatures
from draftsmith.models.formats import fetch, load_drafter, open_head, read_files
from draftsmith.models.formats.layout import Stored
from draftsmith.models.heads.regression import FEWEST, wanted_rows
from draftsmith.models.heads.vocabulary import most_frequent
from draftsmith.models.targets import TextTarget
from draftsmith.train.gto import Gto
from draftsmith.train.optimizers import AdamW, MuonAdamW
from draftsmith.train.recipe import DrafterRecipe
from draftsmith.train.schedule import Schedule
from draftsmith.train.soft_budget import SoftBudget

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def target_dtype(name: str, device: torch.device) -> torch.dtype | None:
    """Of the target, for an `engine.dtype`: that one on a CPU, which without it computes in fp32; elsewhere what its
    checkpoint has (None).
    """
    return DTYPES[name] if device.type == "cpu" else None


def build_head(recipe: DrafterRecipe, target: TextTarget, counts: torch.Tensor, stops: set[int]) -> nn.Module:
    """The head with its draft vocabulary (the most frequent ids of the data), fresh or from a drafter directory."""
    spec, kind = recipe.head, recipe.kind
    if spec.start_from is not None:
        stored = read_files(fetch(spec.start_from))
        silent = lambda line: None  # noqa: E731  (told before the rows were prepared)
        return open_start(recipe, stored, target.shared, target.config, target.layers, silent).train()
    config = kind.Config.for_target(target.config, **spec.shape)
    ids = most_frequent(counts, config.draft_vocab_size, sorted(stops))
    torch.manual_seed(recipe.seed)
    head = kind(config, target.shared, ids)
    head.start_from(target)
    return head


def open_start(
    recipe: DrafterRecipe, stored: Stored, shared: Shared, config, layers: int, tell: Callable[[str], None]
) -> nn.Module:
    """The drafter of `head.start_from`, with what a wider head of the recipe adds. config, layers: the target's; tell:
    as for `open_head`. Raises UserError for a drafter of another head, shape or target.
    """
    spec, kind = recipe.head, recipe.kind
    wanted = kind.Config.for_target(config, **spec.shape)
    head = open_head(stored, shared, layers, tell=tell)
    if type(head) is not kind:
        raise UserError(f"head.name: found {kind.name}, expected {head.name} as in {spec.start_from}")
    if head.grow is not None:
        head.grow(wanted)
    for key in spec.shape:
        if getattr(head.config, key) != getattr(wanted, key):
            raise UserError(
                f"head.{key}: found {getattr(wanted, key)}, expected {getattr(head.config, key)} as in "
                f"{spec.start_from}"
            )
    return head


def tree_objectives(recipe: DrafterRecipe, target: TextTarget, stops: set[int]) -> list[Callable]:
    """What the recipe optimises on trees, beside the head's own objective."""
    found = [build_gto(recipe, target, stops)] if recipe.gto else []
    return found + ([SoftBudget(recipe.soft_budget, stops)] if recipe.soft_budget else [])


def build_gto(recipe: DrafterRecipe, target: TextTarget, stops: set[int]) -> Gto:
    """With a frozen copy of the drafter that the run starts from, in the precision of the one that is trained."""
    frozen = load_drafter(recipe.head.start_from, target.shared, target.layers)
    return Gto(recipe.gto, frozen.to(target.device, DTYPES[recipe.engine.dtype]).eval().requires_grad_(False), stops)


def regress(
    head: nn.Module, schedule: Schedule, features: Callable[[list[int]], TrainingFeatures], say: Callable[[str], None]
) -> None:
    """Lets a head that can start in closed form do so, over rows of the first steps (the same in every process)."""
    if head.regress is None:
        return
    samples, rows, wanted = [], 0, wanted_rows(head.regressors)
    parts = (part for _, epoch, bins in schedule.after(0) if epoch == 0 for part in bins)
    while rows < wanted and (part := next(parts, None)):
        samples.append(features(part))
        rows += len(samples[-1].packing.rows)
    if rows >= FEWEST * head.regressors:
        head.regress(samples)
        say(f"the head starts from a regression over {rows:,} rows")


def build_optimizer(recipe: DrafterRecipe, head: nn.Module):
    spec = recipe.optimization
    if spec.name == "adamw":
        return AdamW([p for p in head.parameters() if p.requires_grad], lr=spec.lr, betas=(0.9, 0.95), weight_decay=0.0)
    matrices, rest = muon_parts(head)
    return MuonAdamW(matrices, rest, spec.muon_lr, spec.lr)


def muon_parts(head: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """What Muon trains and what it leaves to AdamW: vectors, and matrices with one row a token."""
    parts = ([], [])
    for name, parameter in head.named_parameters():
        parts[parameter.ndim != 2 or any(table in name for table in head.tables)].append(parameter)
    return parts
