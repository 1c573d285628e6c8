"""TrainingStep: the module that the DeepSpeed engine holds. Everything that touches parameters happens in its one `forward`."""

from torch import nn

from draftsmith.models.features import Features


class TrainingStep(nn.Module):
    """A head and its objective's settings."""

    def __init__(self, head: nn.Module, steps: int, decay: float):
        super().__init__()
        self.head, self.steps, self.decay = head, steps, decay

    def forward(self, features: Features):
        """-> (loss, metrics {name: [steps]})."""
        return self.head.loss(features, self.steps, self.decay)
