"""What a drafter is. The decode loop knows nothing else of whatever proposes trees.

begin(features, root)      a new batch of requests: features of the prompts, the first emitted token of each
propose(draw) -> DraftTree trees whose roots are the last emitted tokens; only trees that sample use `draw`
observe(features, root)    features of the rows just committed (old root and accepted nodes), the newly emitted token
select(rows)               go on with only these requests
join(features, root)       more requests, behind those that go on: as in `begin`
"""

from typing import Protocol

import torch

from draftsmith.models.features import Features, FeatureSpec
from draftsmith.models.noise import Draw
from draftsmith.models.tree import DraftTree


class Drafter(Protocol):
    feature_spec: FeatureSpec
    size: int  # rows of the largest tree that the target processes, root and probes included

    def begin(self, features: Features, root: torch.Tensor) -> None: ...
    def propose(self, draw: Draw) -> DraftTree: ...
    def observe(self, features: Features, root: torch.Tensor) -> None: ...
    def select(self, rows: torch.Tensor) -> None: ...
    def join(self, features: Features, root: torch.Tensor) -> None: ...
