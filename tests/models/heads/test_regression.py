"""Heads that start in closed form: what they then compute is the linear map that was fitted."""

import torch

from draftsmith.eval.measurement.prompts import read_prompts
from draftsmith.launch.methods import bundled
from draftsmith.models.chat import load_tokenizer
from draftsmith.models.heads import Eagle3Config, Eagle3Head, EagleConfig, EagleHead, regression
from draftsmith.models.targets import TextTarget
from tests.conftest import pack, tiny_target


def test_ridge_finds_the_map_that_made_its_rows_whatever_the_units():
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(4000, 5, generator=generator) * torch.tensor([1e3, 1.0, 1e-3, 1.0, 0.0])
    wanted = torch.randn(5, 3, generator=generator) / torch.tensor([1e3, 1.0, 1e-3, 1.0, 1.0])[:, None]
    found = regression.ridge(inputs, inputs @ wanted)
    torch.testing.assert_close(inputs @ found, inputs @ wanted, atol=0.05, rtol=0.05)
    assert bool(found.isfinite().all())


def test_principal_directions_keep_what_a_map_of_that_rank_says():
    generator = torch.Generator().manual_seed(0)
    outputs = torch.randn(50, 3, generator=generator) @ torch.randn(3, 8, generator=generator)
    kept = regression.principal(outputs, 3)
    torch.testing.assert_close(outputs @ kept @ kept.T, outputs, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(kept.T @ kept, torch.eye(3), atol=1e-5, rtol=1e-5)


def samples(target, head, count):
    """Rows of random tokens: 20 of each are the target's."""
    generator = torch.Generator().manual_seed(3)
    draw = lambda length: torch.randint(0, target.vocab_size, (length,), generator=generator).tolist()  # noqa: E731
    return [pack(target, head, [draw(14), draw(16)], [3, 5]) for _ in range(count)]


@torch.no_grad()
def explained(found, wanted):
    """The share of the wanted numbers' squares that is found."""
    return 1 - float((found - wanted).square().sum() / (wanted - wanted.mean(0)).square().sum())


def test_an_eagle_head_starts_as_the_fitted_map_of_token_and_feature():
    target = tiny_target()
    head = EagleHead(EagleConfig.for_target(target.config, bias=False), target.shared)
    rows = samples(target, head, 40)
    head.regress(rows)
    found, wanted, inputs = [], [], []
    for row in rows:
        here, ahead = regression.every_row(row)
        seen = torch.cat([target.embedding[row.tokens[ahead]], row.hidden[here]], -1)
        (supervised, output), *_ = head.unroll(row, 1)
        places = [here.tolist().index(r) for r in supervised.tolist()]
        torch.testing.assert_close(output, (seen @ head.fc.weight.T)[places], atol=1e-5, rtol=1e-5)
        found.append(output)
        wanted.append(row.hidden[supervised + 1])
        inputs.append(seen[places])
    found, wanted, seen = torch.cat(found), torch.cat(wanted), torch.cat(inputs)
    best = seen @ torch.linalg.lstsq(seen, wanted).solution
    assert explained(found, wanted) > explained(best, wanted) - 0.05


@torch.no_grad()
def test_an_eagle3_head_starts_as_the_fitted_maps_and_attends_to_its_own_row():
    """On a target that was trained, and functions that it reads: states have a part that hardly changes."""
    name = "bundled:targets/code"
    target, tokenizer = TextTarget.load(name), load_tokenizer(name)
    texts = [prompt.tokens for prompt in read_prompts(bundled("bundled:prompts/code.jsonl"), tokenizer, 40)]
    torch.manual_seed(0)
    head = Eagle3Head(Eagle3Config.for_target(target.config), target.shared)
    head.start_from(target)
    rows = [pack(target, head, [text], [1]) for text in texts]
    head.regress(rows)
    attention, scale, weights, parts = head.midlayer.self_attn, head.norm.weight, [], []
    for row in rows:
        state = head.first(row.hidden)
        seen = head.midlayer.widen(head._embed(row.tokens.roll(-1)), state)
        cos, sin = head.angles(row.packing.positions)
        query, (key, value) = attention.query(seen, cos, sin), attention.key_value(seen, cos, sin)
        alone = state + attention.o_proj(attention.repeat(value, 1).flatten(1))  # each row attends to itself only
        scores = torch.einsum("qhd,khd->hqk", query, attention.repeat(key, 1)) * attention.scale
        scores = scores.masked_fill(torch.ones(scores.shape[1:]).triu(1).bool(), float("-inf"))
        weights.append(scores.softmax(-1).diagonal(dim1=1, dim2=2)[:, 1:])
        places, index = regression.supervised_pairs(row)
        final = row.teacher.final / scale
        found = head.unroll(row, 1)[0][1]
        parts.append((row.hidden[places], state[places], final[index - 1], alone[places], final[index], found[index]))
    assert float(torch.cat(weights, 1).median()) > 0.8
    taps, state, now, alone, following, found = (torch.cat(kind) for kind in zip(*parts))
    best = taps @ torch.linalg.lstsq(taps, now).solution
    assert explained(state, now) > explained(best, now) - 0.05
    assert explained(alone, following) > 0.4 > 0 > explained(state, following)
    assert explained(found, alone) > 0.7


def test_rows_that_are_not_finite_are_left_out():
    nan = torch.full((1, 2), float("nan"))
    parts = [(torch.ones(3, 2), torch.arange(3)), (torch.cat([nan, torch.zeros(1, 2)]), torch.tensor([7, 8]))]
    states, tokens = regression.joined(parts)
    assert tokens.tolist() == [0, 1, 2, 8] and bool(states.isfinite().all())


def test_rows_that_a_regression_asks_for_keep_within_memory():
    for regressors in (16, 1728, 12288):
        rows = regression.wanted_rows(regressors)
        assert 8 * regressors <= rows <= 40 * regressors
        assert rows == 8 * regressors or rows * regressors <= regression.SIZE
    assert regression.wanted_rows(1728) == 40 * 1728 and regression.wanted_rows(12288) == 8 * 12288
