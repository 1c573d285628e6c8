"""Shared fixtures: a tiny random Llama as target and a tiny random EAGLE-3 head for it, fp32, seeded."""

import os
from itertools import accumulate

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from draftsmith.eval.decode import generate
from draftsmith.eval.sampling import Sampling
from draftsmith.models.drafter import NoDrafter
from draftsmith.models.features import Packing, TrainingFeatures
from draftsmith.models.heads import Eagle3Config, Eagle3Head
from draftsmith.models.targets import TextTarget


def tiny_target(layers: int = 7, vocab: int = 61, seed: int = 0, **changes) -> TextTarget:
    torch.manual_seed(seed)
    config = LlamaConfig(**{**dict(
        vocab_size=vocab, hidden_size=32, intermediate_size=48, num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=2,
        head_dim=8, max_position_embeddings=256, initializer_range=0.3), **changes})
    return TextTarget(LlamaForCausalLM(config).float(), "tiny")


def tiny_head(target: TextTarget, draft_vocab: int | None = None, seed: int = 1, sharpness: float = 0.3) -> Eagle3Head:
    torch.manual_seed(seed)
    config = Eagle3Config.for_target(target.config, draft_vocab_size=draft_vocab)
    ids = None if draft_vocab is None else torch.randperm(target.vocab_size)[:draft_vocab].sort().values
    head = Eagle3Head(config, target.embedding, ids)
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter, std=sharpness) if parameter.ndim == 2 else torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return head.eval()


def pack(target: TextTarget, head, rows: list[list[int]], starts: list[int]) -> TrainingFeatures:
    """Rows of ids as one packed row; of row i the target wrote what stands from starts[i] on."""
    mask = torch.cat([torch.arange(len(row)) >= start for row, start in zip(rows, starts)])
    packing = Packing((0, *accumulate(map(len, rows))), mask)
    return target.features(torch.tensor([token for row in rows for token in row]), packing, head.feature_spec)


def trained_head(target: TextTarget, draft_vocab: int | None = None) -> Eagle3Head:
    """A tiny head trained for a moment on the target's own greedy text: right now and then, so that walks of every length occur."""
    head, prompts = tiny_head(target, draft_vocab), [[3, 1, 4], [1, 5, 9, 2, 6, 5, 3, 5], [8], [9, 7, 9, 3, 2]]
    rows = [p + t.tokens for p, t in zip(prompts, generate(target, NoDrafter(), prompts, Sampling(), 40))]
    features = pack(target, head, rows, [0] * len(rows))
    optimizer = torch.optim.AdamW(head.parameters(), lr=5e-3)
    for _ in range(25):
        loss, _ = head.loss(features, steps=4, decay=0.8)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return head


@pytest.fixture
def target():
    return tiny_target()


@pytest.fixture
def head(target):
    return tiny_head(target, draft_vocab=40)
