"""What a user is told of a target once, before any work: everything in which it does not mean what it seems to."""

from draftsmith.models.heads.layer import rope_difference, target_rope
from draftsmith.models.stops import Stops

NO_RULE = {  # keys of a generation config that change no distribution
    "transformers_version",
    "_from_model_config",
    "_commit_hash",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "decoder_start_token_id",
    "max_length",
    "max_new_tokens",
    "use_cache",
    "cache_implementation",
    "cache_config",
    "disable_compile",
    "return_dict_in_generate",
    "output_attentions",
    "output_hidden_states",
    "output_logits",
    "output_scores",
}
NO_EFFECT = {  # beside None, false and empty lists
    "temperature": 1,
    "top_k": 0,
    "top_p": 1,
    "min_p": 0,
    "typical_p": 1,
    "epsilon_cutoff": 0,
    "eta_cutoff": 0,
    "repetition_penalty": 1,
    "encoder_repetition_penalty": 1,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "min_length": 0,
    "min_new_tokens": 0,
    "num_beams": 1,
    "num_beam_groups": 1,
    "num_return_sequences": 1,
    "length_penalty": 1,
    "diversity_penalty": 0,
    "guidance_scale": 1,
}
SHOWN = 60  # characters of a value


def notes(target, reader, name: str, head=None) -> list[str]:
    """One line each. target: `TextTarget` or `Description`; reader: its tokenizer, or the `Reader` of one that sees;
    name: as the user gave it; head: the config of a head that is made for it.
    """
    lines = [*Stops.of(target, reader).notes(), *rules_left_out(target.generation_config)]
    lines += [*ids_without_rows(target, reader), *shorter_context(target), *own_rope(target, head)]
    lines += slow_trees(target)
    return [f"target {name}: {line}" for line in lines]


def decoding_rules(generation_config) -> dict:
    """What a generation config (None: there is none) has every `generate` of transformers do by default."""
    found = {} if generation_config is None else generation_config.to_diff_dict()
    return {
        key: value
        for key, value in sorted(found.items())
        if key not in NO_RULE
        and value is not None
        and value is not False
        and value not in ([], {})
        and NO_EFFECT.get(key) != value
    }


def rules_left_out(generation_config) -> list[str]:
    rules = decoding_rules(generation_config)
    if not rules:
        return []
    said = ", ".join(
        f"{key} {value if len(f'{value}') <= SHOWN else f'{value}'[:SHOWN] + '...'}" for key, value in rules.items()
    )
    return [f"generation_config.json asks for {said}; no method applies any of it: all decode by the command's options"]


def ids_without_rows(target, reader) -> list[str]:
    vocabulary = getattr(reader, "tokenizer", reader).get_vocab()
    beyond = sorted((i, token) for token, i in vocabulary.items() if i >= target.vocab_size)
    if not beyond:
        return []
    shown = ", ".join(token for _, token in beyond[:3]) + (", ..." if len(beyond) > 3 else "")
    return [
        f"{len(beyond)} of its tokenizer's {len(vocabulary)} tokens ({shown}) have ids that its embedding of "
        f"{target.vocab_size} rows does not; texts with them cannot be used"
    ]


def shorter_context(target) -> list[str]:
    whole = target.config.max_position_embeddings
    if target.context_length == whole:
        return []
    return [
        f"its longrope turns otherwise behind {target.context_length} tokens: it is used up to there, not to {whole}"
    ]


def own_rope(target, head) -> list[str]:
    if not hasattr(head, "rope_parameters"):
        return []
    found = rope_difference(target_rope(target.config))
    return [f"the head has a plain rope of its own, since none computes the target's ({found})"] if found else []


def slow_trees(target) -> list[str]:
    if not target.by_level:
        return []
    return ["its Mamba-1 layers take a tree one level after the other: a pass costs more the deeper the tree is"]
