"""Draft heads. A head is an `nn.Module` with `feature_spec`, `loss`, `prefill`, `extend`, `roots` and `expand`."""

from draftsmith.models.heads.eagle3 import Eagle3Config, Eagle3Head

__all__ = ["Eagle3Config", "Eagle3Head"]
