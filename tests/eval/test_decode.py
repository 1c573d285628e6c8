"""The decode loop: nothing changes but the speed. Greedy identity, position-keyed sampling identity, exact enumeration,
counting.
"""

import itertools

import pytest
import torch

from draftsmith.eval.decode import generate
from draftsmith.eval.sampling import Noise, Sampling, perturb, process, seen_tokens
from draftsmith.eval.verification.verifier import follow
from draftsmith.models.drafters import HeadDrafter, NoDrafter
from draftsmith.models.errors import UserError
from draftsmith.models.features import FeatureSpec
from draftsmith.models.grow import DynamicTree, chain, parse_tree
from draftsmith.models.heads import Eagle3Objective
from draftsmith.models.tree import DraftTree
from tests.conftest import tiny_head, tiny_target, trained_head
from tests.models.heads.documents import packed

PROMPTS = [[3, 1, 4], [1, 5, 9, 2, 6, 5, 3, 5], [8], [9, 7, 9, 3, 2]]
TREES = ["chain:3", "dynamic:4x3x10", "eagle"]


@pytest.mark.parametrize("tree", TREES)
@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(),
        Sampling(repetition_penalty=1.3),
        Sampling(1.0, seed=3),
        Sampling(0.6, top_k=5, seed=4),
        Sampling(1.3, top_p=0.7, seed=5),
        Sampling(0.9, top_k=20, top_p=0.9, repetition_penalty=1.2, seed=6),
    ],
    ids=str,
)
def test_speculative_decoding_emits_what_plain_decoding_emits(target, tree, sampling):
    head = trained_head(target, 50)
    plain = [generate(target, NoDrafter(), [p], sampling, 20, {7}, [r])[0] for r, p in enumerate(PROMPTS)]
    batched = generate(target, HeadDrafter(head, parse_tree(tree)), PROMPTS, sampling, 20, {7})
    assert [t.tokens for t in batched] == [t.tokens for t in plain]
    if sampling.temperature <= 1:  # hotter, this drafter hardly ever meets the target's draw
        assert sum(sum(t.accepted) for t in batched) > 0


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(0.8, seed=3)], ids=["greedy", "sampled"])
def test_passes_are_told_as_they_end(target, head, sampling):
    told = {request: [] for request in (5, 3, 8, 9)}
    emit = lambda request, tokens: told[request].append(tokens)  # noqa: E731
    drafter = HeadDrafter(head, DynamicTree(4, 3, 10))
    traces = generate(target, drafter, PROMPTS, sampling, 20, {7}, list(told), emit=emit)
    for passes, trace in zip(told.values(), traces):
        assert [len(tokens) for tokens in passes] == [1, *trace.emitted]
        assert [token for tokens in passes for token in tokens] == trace.tokens


def test_plain_decoding_equals_generate_of_transformers(target):
    for prompt in PROMPTS:
        want = target.model.generate(
            torch.tensor([prompt]),
            max_new_tokens=20,
            do_sample=False,
            eos_token_id=7,
            pad_token_id=0,
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        )[0, len(prompt) :].tolist()
        assert generate(target, NoDrafter(), [prompt], Sampling(), 20, {7})[0].tokens == want


class Oracle:
    """Drafts the target's own greedy continuation, wrong from level `right` on."""

    feature_spec = FeatureSpec(taps=())

    def __init__(self, text, depth, right):
        self.text, self.depth, self.right, self.size = text, depth, right, depth + 1

    def begin(self, features, root):
        self.at, self.root = 0, root

    def propose(self, draw):
        ahead = self.text[self.at + 1 : self.at + 1 + self.depth]
        ahead = [t if i < self.right else (t + 1) % 61 for i, t in enumerate(ahead + [0] * (self.depth - len(ahead)))]
        return DraftTree.of(torch.tensor([[int(self.root), *ahead]]), torch.arange(-1, self.depth)[None])

    def observe(self, features, root):
        self.at += int(features.lengths)
        self.root = root

    def select(self, rows):
        pass


@pytest.mark.parametrize("right", [0, 2, 4])
def test_acceptance_length_of_an_oracle_is_its_right_levels_plus_one(target, right):
    text = generate(target, NoDrafter(), [PROMPTS[0]], Sampling(), 41)[0].tokens
    trace = generate(target, Oracle(text, 4, right), [PROMPTS[0]], Sampling(), 1 + 4 * (right + 1))[0]
    assert trace.tokens == text[: len(trace.tokens)]
    assert trace.accepted == [right] * 4 and trace.emitted == [right + 1] * 4 and trace.drafted == [4] * 4


def test_tokens_behind_eos_and_the_limit_do_not_count(target):
    text = generate(target, NoDrafter(), [PROMPTS[0]], Sampling(), 41)[0].tokens
    trace = generate(target, Oracle(text, 4, 4), [PROMPTS[0]], Sampling(), 8)[0]
    assert trace.tokens == text[:8] and trace.emitted == [5, 2] and trace.accepted == [4, 4]
    eos = text[3]
    trace = generate(target, Oracle(text, 4, 4), [PROMPTS[0]], Sampling(), 41, {eos})[0]
    assert trace.tokens == text[: text.index(eos) + 1] and sum(trace.emitted) == len(trace.tokens) - 1


def test_matching_takes_repeated_siblings_and_deepest_path():
    tree = DraftTree.of(torch.tensor([[1, 5, 5, 6, 7, 8]]), torch.tensor([[-1, 0, 0, 2, 3, 0]]))
    accepted = follow(tree, torch.tensor([[5, 9, 6, 7, 4, 0]]))
    assert accepted.path[0, : accepted.counts[0]].tolist() == [0, 2, 3, 4] and accepted.next_token.item() == 4


def test_sample_and_match_has_exactly_the_targets_law():
    """Enumeration: the noise line of each position is cut at every CDF border; the pieces that give a text are its
    probability.
    """
    torch.manual_seed(0)
    vocab, length = 4, 3
    contexts = [list(itertools.product(range(vocab), repeat=d)) for d in range(length)]
    law = {c: (torch.randn(vocab, dtype=torch.float64) * 2).softmax(0) for level in contexts for c in level}
    borders = {c: [0.0, *law[c].cumsum(0).tolist()[:-1], 1.0] for c in law}
    tree = DraftTree.of(torch.tensor([[0, 2, 2, 1, 3, 1]]), torch.tensor([[-1, 0, 0, 0, 1, 2]]))  # siblings repeated
    nodes = [(), (2,), (2,), (1,), (2, 3), (2, 1)]
    cuts = [sorted({b for c in level for b in borders[c]}) for level in contexts]
    joint = {}
    for pieces in itertools.product(*[list(zip(c, c[1:])) for c in cuts]):
        pick = lambda c: sum(sum(pieces[len(c)]) / 2 >= b for b in borders[c][1:-1])  # noqa: E731
        accepted = follow(tree, torch.tensor([[pick(c) for c in nodes]]))
        text = [*tree.tokens[0, accepted.path[0, 1 : accepted.counts[0]]].tolist(), int(accepted.next_token)]
        while len(text) < length:  # later passes go on with the noise of the later positions
            text.append(pick(tuple(text)))
        mass = 1.0
        for low, high in pieces:
            mass *= high - low
        joint[tuple(text)] = joint.get(tuple(text), 0.0) + mass
    for text in itertools.product(range(vocab), repeat=length):
        want = float(law[()][text[0]] * law[text[:1]][text[1]] * law[text[:2]][text[2]])
        assert abs(joint.get(text, 0.0) - want) < 1e-12


def test_two_token_marginals_match_the_target_chi_square(target, head):
    """2,000 keyed requests through the real loop: the law of the first two sampled tokens behind the prompt."""
    prompt, count, spread = [3, 1, 4], 2000, Sampling(0.5, top_k=3, seed=11)
    traces = generate(target, HeadDrafter(head, DynamicTree(4, 2, 8)), [prompt] * count, spread, 2)
    tree = lambda ids: DraftTree.root_only(torch.tensor(ids))  # noqa: E731
    law = {}
    first = process(target.model(torch.tensor([prompt])).logits[:, -1:], spread, None, tree([4]))[0, 0].softmax(-1)
    for a in first.nonzero().flatten().tolist():
        second = process(target.model(torch.tensor([prompt + [a]])).logits[:, -1:], spread, None, tree([a]))[
            0, 0
        ].softmax(-1)
        for b in second.nonzero().flatten().tolist():
            law[a, b] = float(first[a] * second[b]) * count
    seen = {}
    for trace in traces:
        seen[tuple(trace.tokens)] = seen.get(tuple(trace.tokens), 0) + 1
    assert set(seen) <= set(law)
    statistic = sum((seen.get(k, 0) - e) ** 2 / e for k, e in law.items())
    freedom = len(law) - 1
    assert statistic < freedom + 4 * (2 * freedom) ** 0.5, (statistic, freedom)


def test_processing_per_node_uses_the_nodes_own_ancestors():
    tree = DraftTree.of(torch.tensor([[1, 2, 3]]), torch.tensor([[-1, 0, 0]]))
    seen = seen_tokens([[0, 1]], 5, "cpu")
    got = process(torch.tensor([[[2.0, -2.0, 4.0, 4.0, 4.0]] * 3]), Sampling(repetition_penalty=2.0), seen, tree)
    assert got[0].tolist() == [[1, -4, 4, 4, 4], [1, -4, 2, 4, 4], [1, -4, 4, 2, 4]]
    top = process(torch.log(torch.tensor([[[0.5, 0.3, 0.15, 0.05]]])), Sampling(1.0, top_p=0.8), None, tree)[0, 0]
    assert top.isinf().tolist() == [False, False, True, True]
    assert process(torch.tensor([[[3.0, 1.0, 2.0]]]), Sampling(1.0, top_k=2), None, tree)[0, 0].isinf().tolist() == [
        False,
        True,
        False,
    ]


def test_perturbed_argmax_samples_the_distribution_and_depends_on_its_key_alone():
    logits = torch.log(torch.tensor([[[0.2, 0.3, 0.5]] * 2000]))
    got = perturb(logits, Sampling(1.0, seed=1), [0], torch.arange(2000)[None])[0].argmax(-1)
    share = torch.bincount(got, minlength=3) / 2000
    assert (share - torch.tensor([0.2, 0.3, 0.5])).abs().max() < 4 * 0.5 / 2000**0.5
    again = perturb(logits[:, :7].repeat(2, 1, 1), Sampling(1.0, seed=1), [5, 0], torch.arange(7).repeat(2, 1))
    assert torch.equal(again[1].argmax(-1), got[:7]) and not torch.equal(again[0], again[1])
    assert torch.equal(perturb(logits, Sampling(), [0], torch.arange(2000)[None]), logits)


def test_noise_only_along_the_walk_chooses_what_noise_everywhere_does():
    """Trees with siblings of one token, padding, and rows of several requests; the walk itself is `follow`'s."""
    generator, long = torch.Generator().manual_seed(0), 0
    for seed in range(200):
        parents = torch.tensor([[-1] + [int(torch.randint(0, n, (), generator=generator)) for n in range(1, 9)]] * 2)
        parents[1, 7:] = -1
        tree = DraftTree.of(torch.randint(0, 3, (2, 9), generator=generator), parents)
        logits = torch.randn(2, 9, 3, generator=generator)
        noise = Noise(Sampling(1.0, seed=seed), [4, 9], [11, 3])
        whole, walked = noise.perturb(logits, tree).argmax(-1), noise.chosen(logits, tree)
        assert torch.equal(walked[:, 0], whole[:, 0])
        for a, b in zip(vars(follow(tree, whole)).values(), vars(follow(tree, walked)).values()):
            assert torch.equal(a, b)
        long += int(follow(tree, whole).counts.max()) > 2
    assert long > 50  # walks of several tokens were among them


def test_prompts_that_do_not_fit_are_refused(target, head):
    with pytest.raises(UserError, match="prompt 1: found no tokens"):
        generate(target, NoDrafter(), [[1], []], Sampling(), 4)
    with pytest.raises(UserError, match="prompt 0: found 250 tokens, expected at most 242"):
        generate(target, HeadDrafter(head, chain(3)), [[1] * 250], Sampling(), 10)
    with pytest.raises(UserError, match="sampling"):
        Sampling(top_p=0.0)


def test_bf16_target_decodes_and_trains_an_fp32_head():
    target = tiny_target()
    target.model.to(torch.bfloat16)
    head = tiny_head(target)
    assert head.fc.weight.dtype == torch.float32  # a head of another dtype than its target
    assert len(generate(target, HeadDrafter(head, chain(2)), [[3, 1]], Sampling(), 6)[0].tokens) == 6
    loss, _ = head.loss(packed(target, head), Eagle3Objective(steps=3, decay=0.8))
    assert torch.isfinite(loss)
