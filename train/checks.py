"""What of a recipe can be known to be wrong before its rows are prepared, which takes minutes: for training and dry
runs alike.
"""

from dataclasses import replace
from pathlib import Path

import torch

from draftsmith.models.features import FeatureSpec, Shared
from draftsmith.models.formats import fetch, read_files, told_once_a_run
from draftsmith.models.grow import parse_tree
from draftsmith.models.targets import Description, TextTarget
from draftsmith.train.checkpoint import Checkpoints, finished, latest
from draftsmith.train.distributed import check_dtype
from draftsmith.train.estimate import head_like
from draftsmith.train.features import check_cached
from draftsmith.train.gto import Gto
from draftsmith.train.lora import Adapter
from draftsmith.train.preparation import head_config
from draftsmith.train.recipe import DrafterRecipe
from draftsmith.train.soft_budget import SoftBudget
from draftsmith.train.start import open_start
from draftsmith.train.telemetry import load_wandb


def check(recipe: DrafterRecipe, described: Description, rank: int = 0) -> None:
    """rank: of this process; the first one alone needs what records the run. Raises UserError for a head that cannot
    draft for the target or start from its drafter, for settings that exclude each other, and for packages and
    precisions that are not here.
    """
    check_dtype(recipe.engine.dtype)
    head_config(recipe, described)
    with torch.device("meta"):
        head = head_like(recipe, described.config, torch.empty(described.vocab_size, described.config.hidden_size))
    check_target(recipe, described, replace(head.feature_spec, trees=recipe.on_trees))
    if recipe.data.features == "cached":
        check_cached(head.feature_spec)
    if recipe.gto is not None:
        Gto(recipe.gto, None, set())
    if recipe.soft_budget is not None:
        SoftBudget(recipe.soft_budget, set())
    if recipe.evaluation.rows:
        parse_tree(recipe.evaluation.tree)
    if recipe.lora is not None:
        Adapter(head, recipe.lora, recipe.head.start_from, recipe.seed)
    if recipe.wandb is not None and rank == 0:
        load_wandb()
    if recipe.head.start_from is not None:
        check_start(recipe, described)


def check_target(recipe: DrafterRecipe, described: Description, spec: FeatureSpec) -> None:
    """What training asks of a target beside decoding, of a small one of its form where there can be one."""
    small = TextTarget.check(described.config, recipe.target)
    if small is None:
        return
    if recipe.engine.target == "sharded":
        small.shard(lambda layers: layers)
    small.check_features(spec)


def check_start(recipe: DrafterRecipe, described: Description) -> None:
    """Of the target the drafter meets the shape alone: whether an embedding that lies beside it is the target's is seen
    when the target is loaded.
    """
    stored = read_files(fetch(recipe.head.start_from))
    shape = described.vocab_size, described.config.hidden_size
    own = [t for name, t in stored.tensors.items() if name.endswith("embed_tokens.weight") and t.shape == shape]
    embedding = own[0] if own else torch.zeros(1, dtype=stored.dtype).expand(shape)
    config, layers = described.config, described.config.num_hidden_layers
    open_start(recipe, stored, Shared(embedding), config, layers, told_once_a_run)


def check_output(output: Path, settings: dict) -> None:
    """Raises UserError where another run left its drafter or a checkpoint. settings: those that are known so far."""
    finished(output / "drafter", settings)
    checkpoints = Checkpoints(output / "checkpoints", settings, rank=0, world=1)
    if place := latest(checkpoints.folder):
        checkpoints.read(place)
