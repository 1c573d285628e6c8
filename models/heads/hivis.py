"""The HiViS head (arXiv 2509.23928): EAGLE-1's layer over text rows only, with a learned vector for every drafting
step.

Visual tokens are hidden from the drafter; images reach it through the target's features at text rows, which have
attended to them. `fc` joins [embedding, feature, r_k], r_k one row of `residual` for all rows of step k, hence W_r r_k
+ b is a bias of its own for each step. Rows of the target's own features have r_0, nodes k levels below the root r_k,
and deeper ones than were trained the last r.

Stage 1 trains one step, stage 2 several, which is HASS over the head's own detached features: keys and values of step k
have r_k as well. Keys out of sight weigh nothing (-inf), as in drafting; the authors' code gives them score 0 and is
not copied in that.
"""

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from annotated_types import Gt
from torch import nn

from draftsmith.models.errors import UserError
from draftsmith.models.features import Features, FeatureSpec, Shared, TrainingFeatures
from draftsmith.models.heads import decoding
from draftsmith.models.heads.decoding import Context
from draftsmith.models.heads.eagle import EagleConfig, EagleHead, EagleObjective
from draftsmith.models.heads.rooted import RootedTrees

# a round goes on while the target's choice is among so many of the head's most probable tokens (the authors' code)
ALIVE = 5


@dataclass(frozen=True)
class HivisShape:
    """What a recipe may choose of a head. intermediate_size: None = the target's; qkv_bias: whether queries, keys and
    values have a bias, as the target's have in the authors' heads; residuals: steps with a vector of their own;
    positions: "compact" counts the rows that are kept, "original" leaves gaps where images were; drop_ids: token ids
    hidden beside the visual tokens (markers around images) in what the target did not write.
    """

    intermediate_size: Annotated[int, Gt(0)] | None
    qkv_bias: bool
    residuals: Annotated[int, Gt(0)]
    positions: Literal["compact", "original"]
    drop_ids: list[int]


@dataclass(frozen=True)
class HivisObjective(EagleObjective):
    """EAGLE's, and mask: "none" trains every step on all of its rows, "path" only while at each earlier step of the
    round the target's choice was among the head's five most probable tokens.
    """

    mask: Literal["none", "path"]


@dataclass(frozen=True)
class HivisConfig(EagleConfig):
    """`fc` always has a bias."""

    qkv_bias: bool = False
    residuals: int = 1
    positions: Literal["compact", "original"] = "compact"
    drop_ids: tuple[int, ...] = ()

    @classmethod
    def for_target(
        cls,
        config,
        intermediate_size: int | None = None,
        qkv_bias: bool = False,
        residuals: int = 1,
        positions: str = "compact",
        drop_ids=(),
    ) -> "HivisConfig":
        """A head for a target's text config. Raises UserError for a target without rope, and for ids that are none of
        its tokens.
        """
        if wrong := [i for i in drop_ids if not 0 <= i < config.vocab_size]:
            raise UserError(f"head.drop_ids: found {wrong[0]}, expected ids below the target's {config.vocab_size}")
        base = EagleConfig.for_target(config, intermediate_size, True)
        return cls(**vars(base), qkv_bias=qkv_bias, residuals=residuals, positions=positions, drop_ids=tuple(drop_ids))


class HivisHead(EagleHead):
    """residual [residuals, h] beside what `EagleHead` has."""

    name, Shape, Objective, Config = "hivis", HivisShape, HivisObjective, HivisConfig
    inputs = 3
    regress = None  # its rows begin in a different way

    def __init__(self, config: HivisConfig, shared: Shared, ids: torch.Tensor | None = None):
        super().__init__(config, shared, ids)
        self.residual = nn.Parameter(torch.empty(config.residuals, config.hidden_size, device=shared.embedding.device))
        nn.init.xavier_uniform_(self.residual)

    @torch.no_grad()
    def grow(self, config: HivisConfig) -> None:
        """Stage 2 starts from stage 1's only row, for every step."""
        if self.config.residuals == 1 < config.residuals:
            self.residual = nn.Parameter(self.residual.repeat(config.residuals, 1))
            self.config = HivisConfig(**vars(self.config) | {"residuals": config.residuals})

    @property
    def feature_spec(self) -> FeatureSpec:
        return FeatureSpec(taps=self.config.taps, rows="text", drop_ids=self.config.drop_ids)

    def enter(self, tokens: torch.Tensor, hidden: torch.Tensor, step: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        """As `EagleHead.enter`, for rows of one drafting step."""
        row = self.residual[min(step, len(self.residual) - 1)].to(hidden.dtype).expand_as(hidden)
        x = self.fc(torch.cat([self.embed(tokens), hidden, row], -1))
        return x, x

    def places(self, features: TrainingFeatures) -> torch.Tensor:
        """[T] positions of the packed rows."""
        return features.packing.positions if self.config.positions == "compact" else features.positions

    def alive(self, parts: torch.Tensor, rank: torch.Tensor, objective: HivisObjective) -> torch.Tensor:
        """As `EagleHead.alive`. Rows are rounds here, so that the path to step k is the same row's earlier steps."""
        if objective.mask == "none":
            return parts
        hits = (rank < ALIVE).cumprod(0).bool()
        return parts & torch.cat([torch.ones_like(parts[:1]), hits[:-1]])

    def prefill(self, features: Features) -> Context:
        """As `LayerHead.prefill`, over text rows."""
        return decoding.prefill(self, features, None if self.config.positions == "compact" else features.positions)

    def root_at(self, features: TrainingFeatures, at: torch.Tensor) -> RootedTrees:
        """As `LayerHead.root_at`."""
        return decoding.root_at(self, features, at, self.places(features))
