"""Rules compared on the same drafted trees: accepted tokens in expectation over the verifier's noise, beside one
sampled number each.

The expectation given the tree is known in closed form (`Law.expected`); its mean over trees is that of the sampled
number with the verifier's own randomness taken out (Rao-Blackwell), so that it varies less. Differences of rules are
paired tree by tree.
"""

from collections import defaultdict

from draftsmith.eval.verification.ceiling import ceiling
from draftsmith.eval.verification.schedule import schedule
from draftsmith.eval.verification.support import target_ids
from draftsmith.eval.verification.verifier import Verifier
from draftsmith.models.tree import Kind


class Recorder(Verifier):
    """Decodes by the first of `rules` and notes all of them. per request, in order of its cycles:

    expected[rule], sampled[rule] (the same uniform number for every rule), first[rule]: the chance that any drafted
    token is accepted, and best: the greatest possible such chance (`ceiling`), for sampled trees whose root has
    children of one kind.
    """

    def __init__(self, rules: list[Verifier], ceilings: bool = False):
        self.rules, self.ceilings, self.name = rules, ceilings, rules[0].name
        self.expected, self.sampled, self.first = ({rule.name: defaultdict(list) for rule in rules} for _ in range(3))
        self.best = defaultdict(list)

    def check(self, tree):
        for rule in self.rules:
            rule.check(tree)

    def __call__(self, tree, logits, noise):
        self.check(tree)
        for rule in self.rules:
            law = rule.law(tree, logits)
            last = law.draw(noise.uniform(1, logits.device))
            lengths = law.depths.gather(1, last[:, None])[:, 0]
            for notes, values in (
                (self.expected, law.expected),
                (self.sampled, lengths),
                (self.first, 1 - law.stop[:, 0]),
            ):
                for request, value in zip(noise.requests, values.tolist()):
                    notes[rule.name][request].append(value)
        if self.ceilings:
            self._note_ceiling(tree, logits, noise)
        return self.rules[0](tree, logits, noise)

    def _note_ceiling(self, tree, logits, noise):
        p, plan = logits[:, 0].softmax(-1), schedule(tree)
        q = target_ids(tree.q.to(p.dtype), tree.ids, p.size(1))[:, 0]
        drafts, kind = int((plan.children[0, 0] >= 0).sum()), Kind(tree.form.kinds[0][int(plan.children[0, 0, 0])])
        for request, value in zip(noise.requests, ceiling(p, q, drafts, kind).tolist()):
            self.best[request].append(value)
