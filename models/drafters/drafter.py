"""What a drafter is. The decode loop knows nothing else of whatever proposes trees.

begin(features, root)      a new batch of requests: features of the prompts, the first emitted token of each
propose(draw) -> DraftTree trees whose roots are the last emitted tokens; only trees that sample use `draw`
observe(features, root)    features of the rows just committed (old root and accepted nodes), the newly emitted token
select(rows)               go on with only these requests
join(features, root)       more requests, behind those that go on: as in `begin`
nbytes                     bytes that it has learned into beside the texts of its requests; 0 where nothing is learned

idle says what a drafter does in passes in which a selector lets another one draft (`eval/selecting.py`): it may
"propose", which costs next to nothing and leaves no trace; it may "predict" behind the rows that were verified
(`follow`, and `propose_behind` once it is chosen; `HeadDrafter`); None where it can do neither: no selector takes it.

A drafter that a cascade may draft with (`Rewindable`) can also go back, since what it was told there may be given up:
mark() -> state            what is observed from here on moves it, and teaches it nothing that lasts
restore(state)             back to where it stood; the next `observe` tells the rows that were kept once more
"""

from typing import Any, Literal, Protocol, runtime_checkable

import torch

from draftsmith.models.features import Features, FeatureSpec
from draftsmith.models.noise import Draw
from draftsmith.models.tree import DraftTree

Idle = Literal["propose", "predict"] | None


class Drafter(Protocol):
    feature_spec: FeatureSpec
    size: int  # rows of the largest tree that the target processes, root and probes included
    idle: Idle
    nbytes: int

    def begin(self, features: Features, root: torch.Tensor) -> None: ...
    def propose(self, draw: Draw) -> DraftTree: ...
    def observe(self, features: Features, root: torch.Tensor) -> None: ...
    def select(self, rows: torch.Tensor) -> None: ...
    def join(self, features: Features, root: torch.Tensor) -> None: ...


@runtime_checkable
class Rewindable(Drafter, Protocol):
    """Marks may be nested, and are restored in the reverse order; between a mark and its `restore` there is no `select`
    and no `join`.
    """

    def mark(self) -> Any: ...
    def restore(self, state: Any) -> None: ...
