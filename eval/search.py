"""Diverse verifier tree search (DVTS; Beeching et al., 2024): answers are grown step by step, and of several samples of
each step the one that a scorer prefers goes on. A small one, with one drafter for all beams and steps, so that a
drafter that learns (`lasting`) sees the whole search as one problem.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from draftsmith.eval.decode import Trace, generate
from draftsmith.eval.sampling import Sampling
from draftsmith.eval.verification.verifier import MATCH, Verifier
from draftsmith.models.drafters import Drafter
from draftsmith.models.features import FeatureSpec
from draftsmith.models.targets import TextTarget
from draftsmith.models.tree import DraftTree

Score = Callable[[list[int], list[int]], float]


@dataclass
class Beam:
    """tokens: the answer so far; steps: the traces of its steps; score: that of the answer; ended: behind a stop."""

    tokens: list[int] = field(default_factory=list)
    steps: list[Trace] = field(default_factory=list)
    score: float = 0.0
    ended: bool = False


def search(
    target: TextTarget,
    drafter: Drafter,
    prompt: list[int],
    score: Score,
    borders: set[int],
    stops: set[int],
    sampling: Sampling,
    beams: int = 4,
    width: int = 4,
    steps: int = 8,
    step_tokens: int = 64,
    rule: Verifier = MATCH,
) -> tuple[list[Beam], list[Trace]]:
    """(the beams, the best first; the traces of all samples). Every beam samples its next step `width` times (up to a
    token of `borders` or `stops`, at most `step_tokens`) and keeps the sample with the highest score(prompt, answer).
    The samples of step s are the requests s * beams * width, ..., so that under matching they depend on no drafter.
    """
    found, traces = [Beam() for _ in range(beams)], []
    for step in range(steps):
        going = [number for number, beam in enumerate(found) if not beam.ended]
        if not going:
            break
        asked = [(number, sample) for number in going for sample in range(width)]
        samples = generate(
            target,
            drafter,
            [prompt + found[number].tokens for number, _ in asked],
            sampling,
            step_tokens,
            stops | borders,
            [(step * beams + number) * width + sample for number, sample in asked],
            verifier=rule,
        )
        traces += samples
        for number in going:
            before = found[number]
            grown = [
                Beam(before.tokens + trace.tokens, [*before.steps, trace], 0.0, trace.tokens[-1] in stops)
                for (of, _), trace in zip(asked, samples)
                if of == number
            ]
            for beam in grown:
                beam.score = score(prompt, beam.tokens)
            found[number] = max(grown, key=lambda beam: beam.score)
    return sorted(found, key=lambda beam: -beam.score), traces


def log_probability(target: TextTarget) -> Score:
    """Where no reward model is at hand: the target's own mean log-probability of an answer, at temperature 1."""

    @torch.inference_mode()
    def score(prompt: list[int], answer: list[int]) -> float:
        session = target.open(FeatureSpec(taps=()), 1, len(prompt) + len(answer))
        first = session.prefill([prompt]).logits[:, None]
        chain = torch.arange(-1, len(answer) - 1, device=target.device)[None]
        tokens = torch.tensor([answer], device=target.device)
        logits = torch.cat([first, session.verify(DraftTree.of(tokens, chain)).logits[:, :-1]], 1)
        return float(logits.float().log_softmax(-1).gather(2, tokens[..., None]).mean())

    return score
