"""What the configs of heads with decoder layers share: a layer's shapes and its rope, which are the target's."""

from dataclasses import dataclass

from draftsmith.models.heads.layer import rope_of


@dataclass(frozen=True)
class LayerConfig:
    """The first fields of such a config. n_predict: how many tokens a head always drafts (None: as many as it is asked
    for); columns: whether it chooses visual rows by the column means of the prompt.
    """

    n_predict, columns = None, False  # no fields

    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_parameters: dict
    max_position_embeddings: int
    vocab_size: int


def of_target(config, name: str, intermediate_size: int | None) -> dict:
    """These fields for a target's text config: its widths and its rope; intermediate_size: None = the target's. Raises
    UserError, which names the head, for a target without rope.
    """
    return {
        "hidden_size": config.hidden_size,
        "intermediate_size": intermediate_size or config.intermediate_size,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        "rms_norm_eps": getattr(config, "rms_norm_eps", 1e-6),  # the head's own where the target has other norms
        "rope_parameters": rope_of(config, name),
        "max_position_embeddings": config.max_position_embeddings,
        "vocab_size": config.vocab_size,
    }
