"""What tests/benchmarks/gpu.py measures: a random target and head of a real one's shape, and how much of them."""

from dataclasses import dataclass, replace

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from draftsmith.models.features import Packing, Shared, Teacher, TrainingFeatures
from draftsmith.models.heads import Eagle3Config, Eagle3Head
from draftsmith.models.targets import TextTarget

LLAMA_8B = dict(
    vocab_size=128256,
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
    max_position_embeddings=131072,
    rms_norm_eps=1e-5,
    tie_word_embeddings=False,
    rope_parameters={
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
)
TOY = {
    **LLAMA_8B,
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 7,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}


@dataclass(frozen=True)
class Scale:
    """How much is measured. Lengths are in tokens; patience in seconds ends the search for the longest training
    sequence.
    """

    shape: dict  # of the large target, arguments of LlamaConfig
    draft_vocab: int
    copied: int  # bytes of the buffer whose copy gives the bandwidth
    context: int  # committed rows before a verify pass or a draft
    repeats: int  # timed calls, of which the median is reported
    loop_tokens: int  # new tokens of each run of the section `overhead`
    prompts: int
    new_tokens: int  # of each prompt of the section `bundled`
    steps: int  # training-time-test steps
    length: int  # of the timed training sequence, and where the search for the longest starts
    longest: int
    patience: float


FULL = Scale(LLAMA_8B, 32000, 4 << 30, 512, 30, 128, 64, 64, 7, 2048, 131072, 60.0)
QUICK = replace(FULL, repeats=10, loop_tokens=32, prompts=12, new_tokens=48, patience=20.0)
TINY = Scale(TOY, 64, 1 << 20, 24, 2, 4, 2, 10, 3, 24, 48, 5.0)


def random_target(scale: Scale, device: torch.device) -> TextTarget:
    """The large target, bf16, its weights drawn on the device."""
    torch.manual_seed(0)
    with torch.device(device):
        return TextTarget(AutoModelForCausalLM.from_config(LlamaConfig(**scale.shape), dtype=torch.bfloat16), "random")


def random_head(scale: Scale, embedding: torch.Tensor) -> Eagle3Head:
    """EAGLE-3's head for the large target in the embedding's dtype, on its device."""
    config = Eagle3Config.for_target(LlamaConfig(**scale.shape), draft_vocab_size=scale.draft_vocab)
    with torch.device(embedding.device):
        return Eagle3Head(config, Shared(embedding), torch.arange(scale.draft_vocab)).to(embedding.dtype)


def random_tokens(scale: Scale, count: int) -> list[int]:
    return torch.randint(3, scale.shape["vocab_size"], (count,), device="cpu").tolist()


def random_features(scale: Scale, head: Eagle3Head, output: torch.Tensor, length: int) -> TrainingFeatures:
    """One training document written by the target throughout; output [V, h] stands for its output head."""
    device, dtype = output.device, output.dtype
    packing = Packing((0, length), torch.ones(length, dtype=torch.bool))
    tokens = torch.randint(3, scale.shape["vocab_size"], (length,), device=device)
    hidden = torch.randn(length, head.fc.in_features, device=device, dtype=dtype)
    final = torch.randn(len(packing.rows), output.size(1), device=device, dtype=dtype)

    def project(states, ids):
        return torch.nn.functional.linear(states, output if ids is None else output[ids])

    return TrainingFeatures(tokens, hidden, packing, Teacher(final, project))
