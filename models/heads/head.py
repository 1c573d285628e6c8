"""What all draft heads have; `draftsmith.models.heads` lists the rest of their contract."""

from torch import nn


class DraftHead(nn.Module):
    """A head says what it can beyond the contract by having it: `regress`, `grow` and `follow` are None where not."""

    tables: tuple[str, ...] = ()
    regress = grow = follow = None
