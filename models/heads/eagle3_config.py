"""The shapes of an EAGLE-3 head, and what it is trained for."""

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Gt, Le, Lt

from draftsmith.models.errors import UserError
from draftsmith.models.heads.config import LayerConfig, of_target
from draftsmith.models.heads.divergences import Distillation


@dataclass(frozen=True)
class Eagle3Shape:
    """What a recipe may choose of a head (None = as the target has it). fc_norm: a norm for each tap before `fc`;
    norm_output: the output goes through the last norm before the next step reads it, too (both: EAGLE-3.1).
    sliding_window: how many rows a row attends to, its own included (None = all before it). candidate_rank: in place of
    a draft vocabulary, an output head of this rank over all of the vocabulary; its num_candidates most probable tokens
    are scored exactly (heads/lowrank.py).
    """

    intermediate_size: Annotated[int, Gt(0)] | None
    draft_vocab_size: Annotated[int, Gt(0)] | None
    fc_norm: bool = False
    norm_output: bool = False
    sliding_window: Annotated[int, Gt(0)] | None = None
    candidate_rank: Annotated[int, Gt(0)] | None = None
    num_candidates: Annotated[int, Gt(0)] | None = None


@dataclass(frozen=True)
class Eagle3Objective(Distillation):
    """Training-time test: steps (EAGLE-3 reference: 7), and decay (0.8): step k weighs decay^k; beside what
    `Distillation` has. rows: which rows go on after a step (heads/rows.py): all, greedy (the first choice was the
    target's), top (the target's was among the ten best), or a share of them, drawn at random and weighed accordingly.
    """

    steps: Annotated[int, Gt(0)]
    decay: Annotated[float, Gt(0), Le(1)]
    rows: Literal["all", "greedy", "top"] | Annotated[float, Gt(0), Lt(1)] = "all"

    @property
    def weights(self) -> list[float]:
        return [self.decay**k for k in range(self.steps)]


@dataclass(frozen=True)
class Eagle3Config(LayerConfig):
    """Shapes of a head. taps are Hugging Face `hidden_states` indices, ascending (low, mid, high); the rest of what is
    not the target's is that of `Eagle3Shape`.
    """

    draft_vocab_size: int
    taps: tuple[int, ...]
    fc_norm: bool = False
    norm_output: bool = False
    sliding_window: int | None = None
    candidate_rank: int | None = None
    num_candidates: int | None = None

    @classmethod
    def for_target(
        cls, config, intermediate_size: int | None = None, draft_vocab_size: int | None = None, **changes
    ) -> "Eagle3Config":
        """A head for a target's text config: its widths, its rope, taps (2, n // 2, n - 3). changes: what else
        `Eagle3Shape` has.

        Raises UserError below 7 layers, without such a rope, for more draft tokens than the target has, and for a
        low-rank output head over less than the target's vocabulary.
        """
        if (draft_vocab_size or 0) > config.vocab_size:
            raise UserError(
                f"head.draft_vocab_size: found {draft_vocab_size}, expected at most the target's {config.vocab_size}"
            )
        layers = config.num_hidden_layers
        if layers < 7:
            raise UserError(
                f"eagle3: found a target of {layers} layers, expected at least 7 (taps 2, n // 2, n - 3 must differ)"
            )
        return cls(
            **of_target(config, "eagle3", intermediate_size),
            draft_vocab_size=draft_vocab_size or config.vocab_size,
            taps=(2, layers // 2, layers - 3),
            **changes,
        ).checked()

    def checked(self) -> "Eagle3Config":
        """Itself. Raises UserError for keys that do not go together."""
        if (self.candidate_rank is None) != (self.num_candidates is None):
            raise UserError(
                f"head.num_candidates: found {self.num_candidates} with candidate_rank {self.candidate_rank}, expected "
                f"both or neither"
            )
        if self.candidate_rank is None:
            return self
        if self.draft_vocab_size != self.vocab_size:
            raise UserError(
                f"head.draft_vocab_size: found {self.draft_vocab_size}, expected null (all {self.vocab_size} ids) with "
                f"candidate_rank"
            )
        for name, most in (("candidate_rank", self.hidden_size), ("num_candidates", self.vocab_size)):
            if getattr(self, name) > most:
                raise UserError(f"head.{name}: found {getattr(self, name)}, expected at most {most}")
        return self

    @property
    def saved_per_row(self) -> int:
        """Numbers that training keeps for each row and step (what the forward of `unroll` keeps and its backward
        adds).
        """
        return (
            10 * self.hidden_size
            + 5 * self.intermediate_size
            + (3 * self.num_attention_heads + 4 * self.num_key_value_heads) * self.head_dim
        )
