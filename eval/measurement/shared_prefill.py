"""Several methods behind one prefill: where a prompt takes seconds and its decoding little more, it is processed once
for all of them.

The session's taps are those of all methods together; each method is shown its own. Prompts that start like the one
before keep those rows, and only what differs is processed.
"""

from collections.abc import Iterable
from dataclasses import replace

import torch

from draftsmith.models.drafters import Drafter
from draftsmith.models.features import Features, FeatureSpec
from draftsmith.models.targets import Prefill, TextTarget
from draftsmith.models.tree import DraftTree


def shared_spec(specs: Iterable[FeatureSpec]) -> FeatureSpec:
    """All taps, and the one probe that there may be. Raises ValueError for probes of several heads."""
    specs = list(specs)
    probing = [spec for spec in specs if spec.probe is not None]
    if any(spec.probe is not probing[0].probe for spec in probing):
        raise ValueError("found probes of several heads, expected those of one: a session processes one kind")
    taps = tuple(dict.fromkeys(tap for spec in specs for tap in spec.taps))
    return replace(probing[0] if probing else specs[0], taps=taps, distribution=None)


class Tapped:
    """A drafter in a session that reads more taps than the drafter's own, and probes that it may not ask for. width: of
    one tap.
    """

    def __init__(self, drafter: Drafter, shared: FeatureSpec, width: int):
        self.feature_spec = replace(shared, distribution=drafter.feature_spec.distribution)
        self.drafter, self.size = drafter, drafter.size
        self.propose, self.select = drafter.propose, drafter.select
        self.columns = torch.cat(
            [torch.arange(width) + width * shared.taps.index(tap) for tap in drafter.feature_spec.taps]
            or [torch.arange(0)]
        )

    def own(self, features: Features) -> Features:
        probes = None if self.drafter.feature_spec.probe is None else features.probes
        return replace(features, hidden=features.hidden[..., self.columns.to(features.hidden.device)], probes=probes)

    def begin(self, features, root):
        self.drafter.begin(self.own(features), root)

    def observe(self, features, root):
        self.drafter.observe(self.own(features), root)

    def join(self, features, root):
        self.drafter.join(self.own(features), root)

    def __str__(self):
        return str(self.drafter)


class SharedSession:
    """One prompt at a time. least: rows that two prompts must have in common for them to be kept."""

    def __init__(self, target: TextTarget, spec: FeatureSpec, capacity: int, least: int = 64):
        self.session, self.spec, self.least = target.open(spec, 1, capacity), spec, least
        self.tokens: list[int] = []

    def prefill(self, prompt: list[int]) -> Prefill:
        """Processes a prompt, or what of it differs from the one before; what was decoded since is dropped."""
        same = next(
            (i for i, (a, b) in enumerate(zip(self.tokens, prompt)) if a != b), min(len(self.tokens), len(prompt))
        )
        same = self.session.reachable(min(same, len(prompt) - 1))
        if same < self.least:
            self.rewind(0)
            self.found = self.session.prefill([prompt])
        else:
            self.rewind(same)
            self.found = self._continue(prompt[same:], same)
        self.tokens = prompt
        return self.found

    def rewind(self, length: int | None = None) -> None:
        """Back to the first `length` rows, by default to the end of the prompt."""
        self.session.rewind(
            torch.tensor([len(self.tokens) if length is None else length], device=self.session.target.device)
        )

    def _continue(self, tokens: list[int], same: int) -> Prefill:
        """The new rows are a tree that is one chain, all of it committed."""
        device, before = self.session.target.device, self.found.features
        tree = DraftTree.of(
            torch.tensor([tokens], device=device), torch.arange(-1, len(tokens) - 1, device=device)[None]
        )
        tree = replace(tree, probes=self.spec.probe is not None)
        verified = self.session.verify(tree)
        path, counts = torch.arange(len(tokens), device=device)[None], torch.tensor([len(tokens)], device=device)
        self.session.commit(path, counts)
        new = verified.features(tree, path, counts)
        join = lambda name: torch.cat([getattr(before, name)[:, :same], getattr(new, name)], 1)  # noqa: E731
        probes = join("probes") if tree.probes else None
        return Prefill(verified.logits[:, -1], Features(join("tokens"), join("hidden"), counts + same, probes))
