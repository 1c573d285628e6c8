"""What a GGUF file says of itself, and whether what transformers made of it says the same.

transformers leaves out tensors and figures that it has no place for, without a word: attention biases, a rope that is
scaled, a sliding window. A target that lacks one would answer, only not as the model does.
"""

import json
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import pre_tokenizers

from draftsmith.models.errors import SHOWN, UserError

ROPE_FACTORS = "rope_freqs.weight"  # Llama 3.1 and later: one divisor for each rotary frequency
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
# Figures that no tensor's shape shows, and the names that they have in a config.
FIGURES = {
    "context_length": "max_position_embeddings",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.sliding_window": "sliding_window",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
    "rope.freq_base": "rope_theta",
    "rope.scaling.type": "rope_type",
    "rope.scaling.factor": "factor",
    "logit_scale": "logits_scaling",
    "embedding_scale": "embedding_multiplier",
    "residual_scale": "residual_multiplier",
}
# How byte-level BPE splits a text first (`tokenizer.ggml.pre`), where transformers has no rule of that name.
GPT2_SPLITS = {"gpt-2", "olmo"}
DIGIT_SPLITS = {"smollm", "starcoder", "refact", "command-r"}  # every digit by itself, then as GPT-2


@dataclass(frozen=True)
class Header:
    """metadata: the single values, none of the lists; words: how many tokens there are; sizes: how many numbers each
    tensor has; factors: the divisors of the rotary frequencies [D / 2], where there are any; quantisation: its kind as
    users know it, `Q4_1`.
    """

    metadata: dict
    words: int
    sizes: dict[str, int]
    factors: torch.Tensor | None
    quantisation: str

    @classmethod
    def read(cls, file: Path) -> "Header":
        from gguf import GGUFReader, GGUFValueType, LlamaFileType

        reader = GGUFReader(file)
        metadata = {
            key: field.contents() for key, field in reader.fields.items() if field.types[:1] != [GGUFValueType.ARRAY]
        }
        kinds, factors = Counter(), None
        for tensor in reader.tensors:
            kinds[tensor.tensor_type.name] += int(tensor.n_elements)
            if tensor.name == ROPE_FACTORS:
                factors = torch.tensor(tensor.data).float()
        named = {kind.value: kind.name for kind in LlamaFileType}.get(metadata.get("general.file_type"))
        quantisation = (named or kinds.most_common(1)[0][0]).removeprefix("MOSTLY_").removeprefix("ALL_")
        words = reader.fields.get("tokenizer.ggml.tokens")
        sizes = {tensor.name: int(tensor.n_elements) for tensor in reader.tensors}
        return cls(metadata, len(words.data) if words else 0, sizes, factors, quantisation)

    @property
    def architecture(self) -> str:
        return self.metadata.get("general.architecture", "")

    @property
    def end_ids(self) -> list[int]:
        """Every id that ends an answer: of the text, of a turn, of a message."""
        found = (self.metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom"))
        return sorted({token for token in found if token is not None})

    def check_tensors(self, model, where: str) -> None:
        """Every number of the file is a number of the model. Raises UserError that names the tensors which are not."""
        from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, get_tensor_name_map

        held = sum(size for name, size in self.sizes.items() if name != ROPE_FACTORS)
        trained = sum(parameter.numel() for parameter in model.parameters())  # tied ones once
        names = dict(model.named_parameters(remove_duplicate=False))
        if trained <= held <= trained + sum(v.numel() for key, v in model.state_dict().items() if key not in names):
            return
        kinds = {name: kind for kind, name in MODEL_ARCH_NAMES.items()}
        names = get_tensor_name_map(kinds.get(self.architecture, MODEL_ARCH.LLAMA), model.config.num_hidden_layers)
        known = {names.get_name(key, (".weight", ".bias")) for key in model.state_dict()}
        surplus = sorted(name for name in self.sizes if name not in known and name != ROPE_FACTORS)
        more = f" and {len(surplus) - SHOWN} more" if len(surplus) > SHOWN else ""
        raise UserError(
            f"{where}: found {held:,} numbers, expected the {trained:,} of the model that transformers makes of it; "
            f"without place are {', '.join(surplus[:SHOWN]) or 'parts of its tensors'}{more}"
        )

    def check_figures(self, config, where: str) -> None:
        """The figures of the metadata are those of the config. Raises UserError that names the one which is not."""
        rope = getattr(config, "rope_parameters", None) or {}
        rope = rope.get("full_attention", rope)
        for key, name in FIGURES.items():
            said = self.metadata.get(f"{self.architecture}.{key}")
            if said is None or (key, said) == ("rope.scaling.type", "none"):
                continue
            found = rope.get(name) if key.startswith("rope.") else getattr(config, name, None)
            if said != found and not (_number(said) and _number(found) and math.isclose(said, found, rel_tol=1e-5)):
                raise UserError(
                    f"{where}: {self.architecture}.{key}: found {said}, but this transformers reads {name} {found}"
                )

    def llama3_rope(self, config, where: str) -> dict:
        """The rope of Llama 3.1 and later whose divisors the file holds (transformers leaves them out)."""
        rope = {**config.rope_parameters, **LLAMA3, "rope_type": "llama3", "factor": float(self.factors.max())}
        plain = rope["rope_theta"] ** -(torch.arange(len(self.factors)) / len(self.factors))
        length, low, high = (
            rope["original_max_position_embeddings"],
            rope["low_freq_factor"],
            rope["high_freq_factor"],
        )
        smooth = ((length * plain / (2 * math.pi) - low) / (high - low)).clamp(0, 1)
        expected = 1 / ((1 - smooth) / rope["factor"] + smooth)
        if not torch.allclose(self.factors, expected, rtol=1e-3):
            raise UserError(f"{where}: found {ROPE_FACTORS} of another form, expected those of Llama 3.1 ({LLAMA3})")
        return rope

    def fit_tokenizer(self, tokenizer, rows: int, where: str, say: Callable[[str], None]) -> None:
        """Special tokens and the splitting of texts as the file says. rows: of the embedding. Raises UserError for more
        tokens than that.
        """
        if self.words > rows:
            raise UserError(f"{where}: found {self.words} tokens, expected at most {rows} (rows of the embedding)")
        for role, key in {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}.items():
            if (token := self.metadata.get(f"tokenizer.ggml.{key}_token_id")) is not None:
                setattr(tokenizer, f"{role}_token", tokenizer.convert_ids_to_tokens(token))
        if self.metadata.get("tokenizer.ggml.model") != "gpt2":
            return
        split = self.metadata.get("tokenizer.ggml.pre", "none")
        if split in DIGIT_SPLITS:
            tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
                [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
            )
        elif split not in GPT2_SPLITS | known_splits():
            say(
                f"{where}: found a tokenizer that splits texts as {split}, which this transformers does not know; "
                f"some tokens may differ from those of other engines"
            )

    def drop_unknown(self, file: Path) -> None:
        """Takes out of a tokenizer.json the tokens that transformers gives every tokenizer of a kind, and that neither
        the file nor the model has.
        """
        stored = json.loads(file.read_text("utf-8"))
        stored["added_tokens"] = [token for token in stored["added_tokens"] if token["id"] < self.words]
        file.write_text(json.dumps(stored, ensure_ascii=False), "utf-8")


def known_splits() -> set[str]:
    """The names of splits that this transformers follows; older ones follow none."""
    try:
        from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS
    except ImportError:
        return set()
    return set(GGUF_PRE_TOKENIZER_SPLITS)


def _number(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
