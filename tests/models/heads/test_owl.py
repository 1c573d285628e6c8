"""OWL: the cell equals the reference's numbers, training equals drafting, the fused loss equals its definition."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from draftsmith.eval.decode import generate
from draftsmith.eval.measurement.predict import predicted_chain_tau
from draftsmith.eval.sampling import Sampling
from draftsmith.models.drafters import HeadDrafter, NoDrafter
from draftsmith.models.errors import UserError
from draftsmith.models.features import Features, Shared
from draftsmith.models.formats import arctic
from draftsmith.models.grow import parse_tree
from draftsmith.models.heads import OwlConfig, OwlHead, OwlObjective, distill
from draftsmith.models.heads.owl import Beam
from tests.conftest import pack, tiny_target
from tests.eval.test_decode import PROMPTS
from tests.models.heads.documents import cut, documents, place

GOLDEN = """
 0.753211 -0.910381 0.962353 -0.903119 0.739526 -0.490476 0.184749
  -0.021831 -0.609813 1.170991 -1.596854 1.838192 -1.867118 1.680287
 0.382291 -0.667158 0.874932 -0.981603 0.974844 -0.855437 0.637179
  -0.037869 -0.529183 1.035085 -1.421378 1.643422 -1.675561 1.514080
 0.092537 -0.518600 0.884735 -1.148635 1.279804 -1.263085 1.100410 
  0.109698 -0.595894 1.013231 -1.313484 1.461957 -1.441493 1.254457
"""  # of the reference module in fp64, methods/owl.md, section 1.6: [step, position, token]
ORDER = (
    "forget_emb.0.weight",
    "forget_proj.0.weight",
    "forget_proj.1.weight",
    "input_proj.0.weight",
    "input_proj.1.weight",
    "cell_proj.0.weight",
    "cell_proj.1.weight",
    "output_proj.0.weight",
    "output_proj.1.weight",
    "cell_ln.0.weight",
    "cell_ln.0.bias",
    "state_ln.0.weight",
    "state_ln.0.bias",
    "head.0.weight",
)  # ArcticTraining's keys, in the order in which the golden values are numbered
STEPS = 4


def tiny_owl(target, steps: int = STEPS, width: int = 24, seed: int = 1) -> OwlHead:
    torch.manual_seed(seed)
    head = OwlHead(OwlConfig.for_target(target.config, inner_dim=width, n_predict=steps), target.shared)
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return head.eval()


def supervised(target, head, starts=(4, 4, 4)):
    return pack(target, head, documents(target), list(starts))


def zeros(*shape):
    return torch.zeros(*shape, dtype=torch.long)


def decoding(training, head, lengths=(14, 12, 10)):
    """Right-padded features of the documents of a packed row."""
    parts = [range(a, b) for a, b in zip(training.packing.borders, training.packing.borders[1:])]
    index = torch.tensor([[*part, *[part[-1]] * (max(lengths) - len(part))] for part in parts])
    return Features(training.tokens[index], training.hidden[index], torch.tensor(lengths))


# The cell


def test_golden_logits_of_the_reference():
    config = OwlConfig(input_hidden_dim=6, inner_dim=4, vocab_size=7, n_predict=3)
    shapes = arctic.expected_shapes(config)
    tensors = {
        name: torch.sin(0.7 * torch.arange(torch.Size(shapes[name]).numel(), dtype=torch.float64) + p + 1).reshape(
            shapes[name]
        )
        for p, name in enumerate(ORDER)
    }
    stored, _ = arctic.write(OwlHead(config, Shared(torch.zeros(7, 6))), torch.float32)
    head = arctic.read(stored, tensors, Shared(torch.zeros(7, 6, dtype=torch.float64)), None, Path("golden"))
    hidden, tokens = (
        torch.cos(0.3 * torch.arange(12, dtype=torch.float64)).reshape(2, 1, 6),
        torch.tensor([2, 5, 1, 3, 0]),
    )
    beam = Beam(hidden)
    for step, want in enumerate(torch.tensor([float(x) for x in GOLDEN.split()], dtype=torch.float64).reshape(3, 2, 7)):
        _, beam = head.expand(beam, tokens[step : step + 2, None], zeros(2, 1))
        torch.testing.assert_close(head.logits(beam.state)[:, 0], want, atol=6e-7, rtol=0)


@pytest.mark.parametrize(
    ("n", "width", "alpha"),
    [
        (3, 4, 0.7210007627),
        (3, 4096, 23.072),
        (3, 6144, 28.257),
        (3, 5120, 25.795),
        (8, 4096, 13.615),
        (8, 2048, 9.627),
    ],
)
def test_the_embedding_is_scaled_by_the_width_and_the_steps(n, width, alpha):
    assert OwlConfig(8, width, 9, n).alpha == pytest.approx(alpha, abs=5e-4)


# Training equals drafting


def test_training_step_k_row_t_equals_sequential_drafting(target):
    head = tiny_owl(target)
    training = supervised(target, head)
    rows, compared = decoding(training, head), 0
    for k, (at, states) in enumerate(head.unroll(training, STEPS)):
        for row, got in zip(at.tolist(), head.logits(states)):
            b, t = place(training, row)
            beam = head.roots(head.prefill(cut(rows, b, t + 1)))
            for step in range(k + 1):
                want, beam = head.expand(beam, rows.tokens[b, t + 1 + step].view(1, 1), zeros(1, 1))
            torch.testing.assert_close(got.log_softmax(-1), want[0, 0], atol=1e-5, rtol=1e-5)
            compared += 1
    assert compared == sum(range(6, 10)) + sum(range(4, 8)) + sum(range(2, 6))


def test_drafting_in_a_ragged_batch_equals_one_by_one_and_siblings_share_their_parents_state(target):
    head = tiny_owl(target)
    features = decoding(supervised(target, head), head)
    root, second, third = (
        torch.tensor([[5], [6], [7]]),
        torch.tensor([[1, 2], [3, 4], [8, 9]]),
        torch.tensor([[11, 12], [13, 14], [15, 16]]),
    )
    parents = torch.tensor([[1, 0], [0, 0], [1, 1]])
    _, beam = head.expand(head.roots(head.prefill(features)), root, zeros(3, 1))
    _, beam = head.expand(beam, second, zeros(3, 2))
    batched, _ = head.expand(beam, third, parents)
    for b, n in enumerate(features.lengths.tolist()):
        for i in range(2):  # the path root, parent, node alone
            alone = head.roots(head.prefill(cut(features, b, n)))
            for token in (root[b, 0], second[b, parents[b, i]], third[b, i]):
                want, alone = head.expand(alone, token.view(1, 1), zeros(1, 1))
            torch.testing.assert_close(batched[b, i], want[0, 0], atol=1e-5, rtol=1e-5)


def test_a_round_forgets_the_rounds_before_it_and_the_context_does_not_grow(target):
    """All that is kept of a request is the last committed row, however long it is: drafting costs the same at every
    length.
    """
    head = tiny_owl(target)
    features = decoding(supervised(target, head), head)
    context = head.prefill(cut(features, 0, 3))
    size = context.hidden.shape
    for start, stop in ((3, 6), (6, 7), (7, 14)):
        _, beam = head.expand(head.roots(context), features.tokens[:1, start : start + 1], zeros(1, 1))
        head.expand(beam, torch.tensor([[3, 4]]), zeros(1, 2))
        head.extend(
            context,
            Features(features.tokens[:1, start:stop], features.hidden[:1, start:stop], torch.tensor([stop - start])),
        )
        assert context.hidden.shape == size and torch.equal(context.hidden, features.hidden[:1, stop - 1])


def test_trees_hung_into_a_packed_row_equal_drafting_behind_its_documents_cut_there(target):
    head = tiny_owl(target)
    training = supervised(target, head)
    rows = decoding(training, head)
    at = torch.tensor([5, 9, 14 + 4, 26 + 9])
    beam = head.root_at(training, at)
    first, beam = head.expand(beam, training.tokens[at, None], zeros(4, 1))
    second, _ = head.expand(beam, torch.tensor([[1, 2], [3, 4], [5, 6], [7, 8]]), zeros(4, 2))
    for p, row in enumerate(at.tolist()):
        b, t = place(training, row)
        alone = head.roots(head.prefill(cut(rows, b, t)))
        want, alone = head.expand(alone, training.tokens[row].view(1, 1), zeros(1, 1))
        torch.testing.assert_close(first[p], want[0])
        torch.testing.assert_close(
            second[p], head.expand(alone, torch.tensor([[1, 2], [3, 4], [5, 6], [7, 8]])[p : p + 1], zeros(1, 2))[0][0]
        )
    gradients = torch.autograd.grad(second.sum(), list(head.parameters()))
    assert all(g.abs().sum() > 0 for g in gradients)


# The loss


@pytest.mark.parametrize(("chunk", "product"), [(1, 1), (1, 2**24), (2**20, 2**24)])
def test_loss_and_gradients_equal_the_plain_definition(chunk, product, monkeypatch):
    """fp64: a mean of cross-entropies for each step, added up; rows, and products, of 64 and all at once."""
    monkeypatch.setattr(distill, "CHUNK", chunk)
    monkeypatch.setattr(distill, "PRODUCT", product)
    target = tiny_target()
    target.model.double()
    head = tiny_owl(target).double()
    features = pack(target, head, documents(target, (80, 40, 3)), [2, 0, 3])
    loss, sums = head.loss(features, OwlObjective(STEPS, 0.0))
    plain, right = 0.0, []
    for k, (rows, states) in enumerate(head.unroll(features, STEPS)):
        losses = F.cross_entropy(head.logits(states), features.tokens[rows + 2 + k], reduction="none")
        plain = plain + losses.mean()
        assert sums["loss"][k].item() == pytest.approx(losses.sum().item(), rel=1e-6)
        teacher = {
            row: logits.argmax()
            for row, logits in zip(
                (features.packing.rows + 1).tolist(), features.teacher.project(features.teacher.final)
            )
        }
        right.append(
            sum(
                bool(logits.argmax() == teacher[row + 1 + k]) for row, logits in zip(rows.tolist(), head.logits(states))
            )
        )
    torch.testing.assert_close(loss, plain, atol=1e-12, rtol=1e-12)
    assert sums["right"].tolist() == right and sums["rows"].tolist() == features.packing.counts(STEPS)
    for a, b in zip(
        torch.autograd.grad(loss, list(head.parameters())), torch.autograd.grad(plain, list(head.parameters()))
    ):
        torch.testing.assert_close(a, b, atol=1e-11, rtol=1e-10)


def test_packed_documents_equal_documents_alone(target):
    head = tiny_owl(target)
    rows, objective = documents(target), OwlObjective(STEPS, 0.0)
    together = pack(target, head, rows, [4, 0, 7])
    loss, sums = head.loss(together, objective)
    parts = [
        head.loss(pack(target, head, [row], [start]), objective, together.packing.counts(STEPS))
        for row, start in zip(rows, [4, 0, 7])
    ]
    torch.testing.assert_close(sum(p[0] for p in parts), loss)
    for name, value in sums.items():
        torch.testing.assert_close(sum(p[1][name] for p in parts), value)


def test_loss_without_taught_rows_is_zero_with_gradients_and_steps_must_be_those_of_the_head(target):
    head = tiny_owl(target)
    loss, sums = head.loss(supervised(target, head, (14, 12, 10)), OwlObjective(STEPS, 0.0))
    loss.backward()
    assert (
        loss.item() == 0 and all(p.grad is not None for p in head.parameters()) and sums["rows"].tolist() == [0] * STEPS
    )
    with pytest.raises(UserError, match="objective.steps: found 3, expected head.n_predict 4"):
        head.loss(supervised(target, head), OwlObjective(3, 0.0))


@pytest.fixture(scope="module")
def learned():
    """A target, a head trained for 200 steps on its own greedy texts, and the losses."""
    target = tiny_target()
    torch.manual_seed(0)
    head = OwlHead(OwlConfig.for_target(target.config, inner_dim=64, n_predict=STEPS), target.shared)
    rows = [p + t.tokens for p, t in zip(PROMPTS, generate(target, NoDrafter(), PROMPTS, Sampling(), 40))]
    features, losses = pack(target, head, rows, [1] * len(rows)), []
    optimizer = torch.optim.AdamW(head.parameters(), lr=3e-3)
    for _ in range(200):
        loss, _ = head.loss(features, OwlObjective(STEPS, 0.0))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return target, head.eval(), losses


def test_loss_goes_down(learned):
    losses = learned[2]
    assert losses[-1] < 0.1 * losses[0] and losses[50] < 0.8 * losses[0], (losses[0], losses[50], losses[-1])


# Decoding


@pytest.mark.parametrize("tree", ["chain:3", "dynamic:4x5x12", "eagle"])
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(1.0, seed=3)], ids=["T=0", "T=1"])
def test_decoding_emits_what_plain_decoding_emits(learned, tree, sampling):
    target, head, _ = learned
    plain = [generate(target, NoDrafter(), [p], sampling, 20, {7}, [r])[0] for r, p in enumerate(PROMPTS)]
    drafted = generate(target, HeadDrafter(head, parse_tree(tree)), PROMPTS, sampling, 20, {7})
    assert [t.tokens for t in drafted] == [t.tokens for t in plain]
    if sampling.temperature == 0:  # it has seen only greedy texts
        assert sum(sum(t.accepted) for t in drafted) > 20


def test_the_predicted_chain_is_the_measured_one(learned):
    target, head, _ = learned
    traces = generate(target, HeadDrafter(head, parse_tree(f"chain:{STEPS}")), PROMPTS, Sampling(), 24)
    measured = sum(sum(t.emitted) for t in traces) / sum(len(t.emitted) for t in traces)
    assert predicted_chain_tau(target, head, PROMPTS, traces, STEPS) == pytest.approx(measured, abs=1e-9)
