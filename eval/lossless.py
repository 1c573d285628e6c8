"""Proof that decoding with a drafter changes nothing: every tree, batch size and way of sampling against plain
decoding, one prompt at a time.

In fp32 the texts must be equal; a difference is tolerated, and listed, only where the top-2 gap of the plain scores
(logits, and at temperature > 0 their position-keyed noise) is below `measure.NEAR_TIE`. In lower precision a pass over
a tree and a pass over one token round differently, so that near-ties of any width may fall otherwise: there the first
divergence of each text is listed with its gap, and nothing is claimed.
"""

from dataclasses import dataclass, replace

import torch

from draftsmith.eval.measurement.measure import IDENTITY, decode_batches, divergences
from draftsmith.eval.measurement.progress import Progress
from draftsmith.eval.sampling import Sampling
from draftsmith.models.drafters import Drafter, NoDrafter
from draftsmith.models.errors import UserError
from draftsmith.models.targets import TextTarget


@dataclass(frozen=True)
class Comparison:
    """One method under one sampling and batch size. differences: {"prompt", "token" (its place behind the prompt),
    "plain", "found" (ids; None behind a text's end), "margin" (top-2 gap of the plain scores there), "tolerated"}.
    """

    target: str
    dtype: str
    method: str
    sampling: Sampling
    batch: int
    texts: int
    tokens: int
    differences: list[dict]

    @property
    def lossless(self) -> bool:
        return all(d["tolerated"] for d in self.differences)

    @property
    def claimed(self) -> bool:
        """Whether identity is promised: not in lower precision."""
        return getattr(torch, self.dtype) in IDENTITY


def prove(
    target: TextTarget,
    drafters: dict[str, Drafter],
    prompts: list[list[int]],
    stops: set[int],
    samplings: list[Sampling],
    batches: list[int],
    max_new_tokens: int,
    report=print,
) -> list[Comparison]:
    """Every drafter, sampling and batch size; plain decoding in batches is one of the methods. Request ids are the
    prompts' places.
    """
    found, dtype = [], str(target.dtype).removeprefix("torch.")
    methods = {"plain": NoDrafter()} | drafters
    for sampling in samplings:
        plain = decode_batches(target, NoDrafter(), prompts, sampling, max_new_tokens, stops, 1, margins=True)
        for batch in batches:
            for name, drafter in methods.items():
                if name == "plain" and batch == 1:
                    continue  # the reference itself
                progress = Progress(
                    report, f"{target.name} {dtype}, {describe(sampling)}, batch {batch}, {name}", len(prompts)
                )
                traces = decode_batches(target, drafter, prompts, sampling, max_new_tokens, stops, batch, progress)
                differences = []
                for d in divergences(plain, traces):
                    ids = [t[d["prompt"]].tokens[d["token"] :][:1] for t in (plain, traces)]
                    differences.append(d | dict(zip(("plain", "found"), (i[0] if i else None for i in ids))))
                found.append(
                    Comparison(
                        target.name,
                        dtype,
                        name,
                        sampling,
                        batch,
                        len(prompts),
                        sum(len(t.tokens) for t in plain),
                        differences,
                    )
                )
    return found


def describe(sampling: Sampling) -> str:
    """What differs from greedy decoding."""
    if replace(sampling, seed=0) == Sampling():
        return "greedy"
    parts = [
        f"T={sampling.temperature:g}",
        f"top-k {sampling.top_k}" if sampling.top_k else "",
        f"top-p {sampling.top_p:g}" if sampling.top_p < 1 else "",
        f"penalty {sampling.repetition_penalty:g}" if sampling.repetition_penalty != 1 else "",
    ]
    return " ".join(part for part in parts if part)


def dtype_of(name: str) -> torch.dtype:
    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    if name not in dtypes:
        raise UserError(f"dtype: found {name}, expected fp32, bf16 or fp16")
    return dtypes[name]
