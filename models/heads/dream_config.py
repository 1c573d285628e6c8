"""What a recipe says of the DREAM head and its training, and its shapes; see heads/dream.py for what the choices
mean.
"""

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le

from draftsmith.models.errors import UserError
from draftsmith.models.heads.config import LayerConfig, of_target
from draftsmith.models.heads.divergences import Distillation


@dataclass(frozen=True)
class DreamShape:
    """What a recipe may choose of a head. intermediate_size: None = the target's; keep_ratio: share of the visual rows
    that feed it; positions: of its rows once some are dropped; middle_*: `Middle`, layers first .. last - 1 compete
    (None: from 1, to 40 % of the target's less one).
    """

    intermediate_size: Annotated[int, Gt(0)] | None
    keep_ratio: Annotated[float, Gt(0), Le(1)]
    positions: Literal["original", "compact"]
    middle_granularity: Literal["token", "sample"]
    middle_first: Annotated[int, Ge(0)] | None
    middle_last: Annotated[int, Gt(0)] | None
    middle_feature: Literal["output", "input"]


@dataclass(frozen=True)
class DreamObjective(Distillation):
    """steps: drafted steps that are trained, each of weight 1 (paper: 1; deeper levels of a tree then use the head's
    own states, which it never saw in training); the weights of the three losses (paper: 0.2, 0.2, 1.0), the first two
    at step 0 alone; noise: width of the uniform noise on the target's states in a document of 512 tokens (0.2). What
    `Distillation` has is of the third.
    """

    steps: Annotated[int, Gt(0)]
    feature_weight: Annotated[float, Ge(0)]
    middle_weight: Annotated[float, Ge(0)]
    kl_weight: Annotated[float, Ge(0)]
    noise: Annotated[float, Ge(0)]

    @property
    def weights(self) -> list[float]:
        return [1.0] * self.steps


@dataclass(frozen=True)
class DreamConfig(LayerConfig):
    """Shapes of a head; it drafts all of the target's vocabulary. Decoding needs keep_ratio and positions as they were
    in training.
    """

    keep_ratio: float
    positions: str
    middle_granularity: str
    middle_first: int
    middle_last: int
    middle_feature: str

    @classmethod
    def for_target(
        cls,
        config,
        intermediate_size: int | None = None,
        keep_ratio: float = 0.75,
        positions: str = "original",
        middle_granularity: str = "token",
        middle_first: int | None = None,
        middle_last: int | None = None,
        middle_feature: str = "output",
    ) -> "DreamConfig":
        """A head for a target's text config: its widths and its rope. Raises UserError for a target without rope and
        for layers it lacks.
        """
        layers = config.num_hidden_layers
        first = min(1, layers - 1) if middle_first is None else middle_first
        last = max(first + 1, int(0.4 * layers) - 1) if middle_last is None else middle_last
        if not 0 <= first < last <= layers:
            raise UserError(
                f"head.middle_first, head.middle_last: found {first}, {last}, expected 0 <= first < last <= the "
                f"target's {layers} layers"
            )
        return cls(
            **of_target(config, "dream", intermediate_size),
            keep_ratio=keep_ratio,
            positions=positions,
            middle_granularity=middle_granularity,
            middle_first=first,
            middle_last=last,
            middle_feature=middle_feature,
        )

    @property
    def columns(self) -> bool:
        """Whether visual rows are chosen, by the column means of the prompt."""
        return self.keep_ratio < 1

    @property
    def draft_vocab_size(self) -> int:
        return self.vocab_size

    @property
    def saved_per_row(self) -> int:
        """Numbers that training keeps for each row: inputs of the products, norms and rotations of three blocks."""
        return (
            24 * self.hidden_size
            + 12 * self.intermediate_size
            + (9 * self.num_attention_heads + 12 * self.num_key_value_heads) * self.head_dim
        )
