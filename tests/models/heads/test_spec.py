"""`[SPEC]`: what the drafter starts from is the same in training and in decoding, learns, changes no text, and is
stored beside the head.
"""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from draftsmith.eval.decode import generate
from draftsmith.eval.measurement.choose import Recorder
from draftsmith.eval.measurement.predict import predicted_chain_tau
from draftsmith.eval.sampling import Sampling
from draftsmith.models.drafters import HeadDrafter, NoDrafter
from draftsmith.models.errors import UserError
from draftsmith.models.features import Features
from draftsmith.models.formats import load_drafter, save_drafter
from draftsmith.models.grow import DynamicTree, parse_tree
from draftsmith.models.heads import OwlConfig, OwlHead, OwlObjective
from draftsmith.models.heads.owl import SPEC_UNIT
from tests.conftest import pack, tiny_target
from tests.eval.test_decode import PROMPTS
from tests.models.formats.test_formats import change_config
from tests.models.heads.documents import documents, place
from tests.models.heads.test_owl import STEPS, zeros


def spec_owl(target, width: int = 24, noise: float = 0.5) -> OwlHead:
    torch.manual_seed(1)
    head = OwlHead(OwlConfig.for_target(target.config, width, STEPS, "replace"), target.shared)
    head.start_from(target)
    for name, parameter in head.named_parameters():
        torch.nn.init.normal_(parameter, std=noise if name != "spec" else noise / SPEC_UNIT)
    return head.eval()


def drafted_from_a_session(target, head, row: list[int], after: list[int]) -> torch.Tensor:
    """Log-probabilities behind the last of `after`, drafted behind a prompt as decoding does it."""
    session = target.open(head.feature_spec, 1, len(row) + 1)
    beam = head.roots(head.prefill(session.prefill([row]).features))
    for token in after:
        got, beam = head.expand(beam, torch.tensor([[token]]), zeros(1, 1))
    return got[0, 0]


def test_training_step_k_row_t_equals_drafting_behind_a_prompt_that_a_probe_ends(target):
    head = spec_owl(target)
    rows = documents(target)
    training, compared = pack(target, head, rows, [4, 8, 9]), 0
    for k, (at, states) in enumerate(head.unroll(training, STEPS)):
        for row, got in zip(at.tolist(), head.logits(states)):
            b, t = place(training, row)
            want = drafted_from_a_session(target, head, rows[b][: t + 1], rows[b][t + 1 : t + 2 + k])
            torch.testing.assert_close(got.log_softmax(-1), want, atol=2e-5, rtol=1e-5)
            compared += 1
    assert compared == sum(range(6, 10)) + sum(range(0, 4))


def test_trees_hung_into_a_packed_row_start_from_its_probes(target):
    head = spec_owl(target)
    rows = documents(target)
    training = pack(target, head, rows, [4, 4, 4])
    at = torch.tensor([4, 9, 14 + 5])
    first, _ = head.expand(head.root_at(training, at), training.tokens[at, None], zeros(3, 1))
    for p, row in enumerate(at.tolist()):
        b, t = place(training, row)
        torch.testing.assert_close(
            first[p, 0], drafted_from_a_session(target, head, rows[b][:t], [rows[b][t]]), atol=2e-5, rtol=1e-5
        )
    assert torch.autograd.grad(first.sum(), head.spec)[0].abs().sum() > 0


def test_the_gradient_reaches_the_embedding_through_the_frozen_target():
    """Against a finite difference along a random direction, in fp64 but for the target's norms; the target's own
    weights get none.
    """
    target = tiny_target()
    target.model.double()
    head = spec_owl(target).double()
    features, objective = pack(target, head, documents(target), [4, 4, 4]), OwlObjective(STEPS, 0.0)
    gradient = torch.autograd.grad(head.loss(features, objective)[0], head.spec)[0]
    direction = torch.randn(32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def loss(shift):
        with torch.no_grad():
            head.spec += shift * direction
            value = head.loss(features, objective)[0].item()
            head.spec -= shift * direction
        return value

    assert (gradient * direction).sum().item() == pytest.approx((loss(4e-3) - loss(-4e-3)) / 8e-3, rel=5e-3)
    assert all(p.grad is None and not p.requires_grad for p in target.model.parameters())


def test_dropped_documents_start_from_the_targets_own_states_and_the_seed_says_which(target):
    head = spec_owl(target)
    plain = OwlHead(replace(head.config, spec_mode="off"), target.shared)
    plain.load_state_dict({name: value for name, value in head.state_dict().items() if name != "spec"})
    rows = documents(target)
    features, own = pack(target, head, rows, [4, 4, 4]), pack(target, plain, rows, [4, 4, 4])
    loss = lambda dropout, seed=0: head.loss(replace(features, seed=seed), OwlObjective(STEPS, dropout))[0].item()  # noqa: E731
    assert loss(1.0) == pytest.approx(plain.loss(own, OwlObjective(STEPS, 0.0))[0].item(), rel=1e-6) and loss(
        1.0
    ) != loss(0.0)
    seen = {}
    for seed in range(40):  # each of the 8 choices among 3 documents has a loss of its own
        assert loss(0.5, seed) == loss(0.5, seed)
        seen[round(loss(0.5, seed), 6)] = seed
    assert len(seen) == 8, seen


def test_drafting_starts_from_the_targets_own_state_where_no_probe_rode_along(target):
    head = spec_owl(target)
    hidden, probes = torch.randn(2, 5, 32), torch.randn(2, 5, 32)
    features = Features(zeros(2, 5), hidden, torch.tensor([5, 3]), probes)
    context = head.prefill(features)
    assert torch.equal(context.hidden, torch.stack([probes[0, 4], probes[1, 2]]))
    head.extend(context, replace(features, probes=None))
    assert torch.equal(context.hidden, torch.stack([hidden[0, 4], hidden[1, 2]]))


@pytest.fixture(scope="module")
def learned():
    """A target and a head with [SPEC] that learned some of its greedy texts."""
    target = tiny_target()
    torch.manual_seed(0)
    head = OwlHead(OwlConfig.for_target(target.config, 64, STEPS, "replace"), target.shared)
    head.start_from(target)
    rows = [p + t.tokens for p, t in zip(PROMPTS, generate(target, NoDrafter(), PROMPTS, Sampling(), 40))]
    features, optimizer, losses = (
        pack(target, head, rows, [1] * len(rows)),
        torch.optim.AdamW(head.parameters(), lr=3e-3),
        [],
    )
    for _ in range(120):
        loss, _ = head.loss(features, OwlObjective(STEPS, 0.0))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return target, head.eval(), losses


def test_the_embedding_starts_as_the_mean_of_the_targets_and_moves(learned):
    target, head, losses = learned
    start = target.embedding.mean(0)
    fresh = OwlHead(head.config, target.shared)
    fresh.start_from(target)
    torch.testing.assert_close(fresh.feature_spec.probe, start)
    assert (head.feature_spec.probe - start).abs().max() > 0.004 and losses[-1] < 0.3 * losses[0]


@pytest.mark.parametrize("tree", ["chain:3", "dynamic:4x5x12", "sampled:chain:3"])
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(1.0, seed=3)], ids=["T=0", "T=1"])
def test_decoding_emits_what_plain_decoding_emits(learned, tree, sampling):
    """Real rows do not see probes, so that texts are those of plain decoding; the drafter is of use because it sees
    them.
    """
    target, head, _ = learned
    plain = [generate(target, NoDrafter(), [p], sampling, 20, {7}, [r])[0] for r, p in enumerate(PROMPTS)]
    drafter = HeadDrafter(head, parse_tree(tree))
    assert drafter.size == 2 * drafter.policy.size  # rows of the target
    drafted = generate(target, drafter, PROMPTS, sampling, 20, {7})
    assert [t.tokens for t in drafted] == [t.tokens for t in plain]
    if sampling.temperature == 0:
        assert sum(sum(t.accepted) for t in drafted) > 20


def test_the_predicted_chain_is_the_measured_one(learned):
    target, head, _ = learned
    traces = generate(target, HeadDrafter(head, parse_tree(f"chain:{STEPS}")), PROMPTS, Sampling(), 24)
    measured = sum(sum(t.emitted) for t in traces) / sum(len(t.emitted) for t in traces)
    assert predicted_chain_tau(target, head, PROMPTS, traces, STEPS) == pytest.approx(measured, abs=1e-9)


def test_recorded_drafts_are_those_of_decoding(learned):
    """The recorder that chooses trees proposes nothing, but probes ride along: its first drafts equal those of a tree
    behind the prompt.
    """
    target, head, _ = learned
    recorder = Recorder(head, DynamicTree(3, 2, 8))
    tokens = generate(target, recorder, PROMPTS[:1], Sampling(), 6)[0].tokens
    for i, (_, found) in enumerate(recorder.drafts):
        want = drafted_from_a_session(target, head, PROMPTS[0] + tokens[:i], [tokens[i]])
        torch.testing.assert_close(found.scores[0, :3], want.topk(3).values, atol=2e-5, rtol=1e-5)


def test_the_embedding_is_stored_beside_what_the_engine_reads(tmp_path, target):
    head = spec_owl(target)
    for parameter in head.parameters():
        parameter.data = parameter.data.to(torch.bfloat16).float()
    folder = save_drafter(head, tmp_path / "drafter", {"target": "none"})
    config, tensors = json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")
    assert config["owl"] == {"spec_mode": "replace"} and len(tensors) == 15
    assert torch.equal(tensors["spec_embedding"].float(), head.feature_spec.probe)
    again = load_drafter(folder, target.shared)
    assert again.config == head.config and torch.equal(again.spec, head.spec)
    change_config(owl=None)(folder)
    with pytest.raises(UserError, match="spec_embedding: unknown key"):
        load_drafter(folder, target.shared)
    change_config(owl={"spec_mode": "concat"})(folder)
    with pytest.raises(UserError, match="owl.spec_mode: found 'concat', expected off or replace"):
        load_drafter(folder, target.shared)
