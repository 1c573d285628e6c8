"""Draft heads by name. A head is an `nn.Module` with `feature_spec`, `loss`, `prefill`, `extend`, `roots` and `expand`."""

from draftsmith.models.heads.eagle3 import Eagle3Config, Eagle3Head

HEADS = {Eagle3Head.name: Eagle3Head}

__all__ = ["HEADS", "Eagle3Config", "Eagle3Head"]
