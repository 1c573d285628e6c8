"""Attention statistics equal those of eager attention, in all families; selection by entropy on attentions made by
hand.
"""

from types import SimpleNamespace

import pytest
import torch

from draftsmith.models.errors import UserError
from draftsmith.models.features import Middle
from draftsmith.models.targets import attention
from draftsmith.models.targets.attention import Watch, column_sums, row_entropy
from tests.tiny_vision import CONFIGS, document, plain, tiny_model

every_family = pytest.mark.parametrize("family", CONFIGS)


def watched(model, ids, images, **asked):
    with Watch(model.get_decoder(), **asked) as watch:
        out = plain(model, ids, images)
    return watch, out.logits


def eager(model, ids, images):
    """(logits, attentions [L, H, N, N], states entering the layers [L, N, h]) by the model's own eager attention."""
    model.set_attn_implementation("eager")
    out = plain(model, ids, images, output_attentions=True, output_hidden_states=True)
    model.set_attn_implementation("sdpa")
    assert len(out.attentions) == 8
    return out.logits, torch.cat(out.attentions), torch.cat(out.hidden_states)


@every_family
def test_entropies_and_columns_equal_those_of_eager_attention(family, monkeypatch):
    """In weight_blocks of one query and one key head, with two pictures; the model's logits do not change."""
    monkeypatch.setattr(attention, "CHUNK", 1)
    model, (ids, images) = tiny_model(family), document(family, [3, 5, 4], wide=True)
    logits, weights, states = eager(model, ids, images)
    asking = torch.arange(len(ids))[None] < 15
    watch, own = watched(model, ids, images, asking=asking, middle=Middle("token", (0, 8), "input"))
    torch.testing.assert_close(own, logits, atol=2e-5, rtol=0)
    entropy = -torch.xlogy(weights, weights).sum(-1).mean(1)
    torch.testing.assert_close(watch.entropies[0], entropy.T, atol=1e-5, rtol=0)
    torch.testing.assert_close(watch.sums[0], weights[-1, :, :15].mean(0).sum(0), atol=1e-5, rtol=0)
    torch.testing.assert_close(watch.state[0], states[entropy.argmin(0), torch.arange(len(ids))], atol=2e-5, rtol=0)
    assert model.get_decoder().config._attn_implementation == "sdpa" and not hasattr(
        model.get_decoder().layers[0].self_attn, "note"
    )


@every_family
def test_statistics_are_computed_in_fp32_in_a_bf16_model(family):
    """Row 0 sees only itself: its entropy is exactly 0, where an epsilon in bf16 would leave dirt; each row's weights
    sum to 1.
    """
    model, (ids, images) = tiny_model(family).bfloat16(), document(family, [4, 3])
    images = {k: v.bfloat16() if v.is_floating_point() else v for k, v in images.items()}
    watch, _ = watched(
        model, ids, images, asking=torch.ones(1, len(ids), dtype=torch.bool), middle=Middle("token", (1, 3), "output")
    )
    assert watch.entropies.dtype == watch.sums.dtype == torch.float32 and torch.isfinite(watch.entropies).all()
    assert (watch.entropies[0, 0] == 0).all()
    assert watch.sums.sum() == pytest.approx(len(ids), abs=1e-4)


def inputs(scores, mask=None):
    """Queries and keys whose scores are the ones given [Q, K]; causal unless a mask is given."""
    query = scores[None, None]
    key = torch.eye(scores.size(1))[None, None]
    causal = torch.full_like(scores, torch.finfo(torch.float32).min).triu(1) if mask is None else mask
    return query, key, causal[None, None], 1.0


def test_equal_scores_give_the_logarithm_of_what_is_seen():
    torch.testing.assert_close(row_entropy(*inputs(torch.zeros(6, 6)))[0], torch.arange(1, 7).float().log())


def test_masked_entries_weigh_exactly_nothing():
    """Whatever their scores are: entropies and columns are bit-equal."""
    torch.manual_seed(0)
    scores, asking = torch.randn(6, 6), torch.ones(1, 6, dtype=torch.bool)
    wild = scores + 1e4 * torch.ones(6, 6).triu(1)
    assert torch.equal(row_entropy(*inputs(scores)), row_entropy(*inputs(wild)))
    assert torch.equal(column_sums(*inputs(scores), asking), column_sums(*inputs(wild), asking))


def chosen(entropies: list[list[float]], middle: Middle, real=None):
    """Which layer's state is kept for each token, given every layer's entropies: layer l takes in the state l and
    leaves l + 0.5.
    """
    watch = Watch(
        SimpleNamespace(layers=[]),
        middle=middle,
        real=torch.ones(1, len(entropies[0])) if real is None else torch.tensor([real]).float(),
    )
    for layer, row in enumerate(entropies):
        watch.found.append(torch.tensor([row]))
        state = torch.full((1, len(row), 1), float(layer))
        watch.choose(None, (state,), state + 0.5)
    return watch.state[0, :, 0].tolist()


def test_the_sharpest_layer_is_chosen_by_token_or_by_document():
    entropies = [[3.0, 1.0, 2.0], [1.0, 1.0, 9.0], [2.0, 0.5, 2.0]]
    assert chosen(entropies, Middle("token", (0, 3), "input")) == [1, 2, 0]
    assert chosen(entropies, Middle("token", (0, 3), "output")) == [1.5, 2.5, 0.5]
    assert chosen(entropies, Middle("sample", (0, 3), "input")) == [2, 2, 2]
    assert chosen(entropies, Middle("sample", (0, 3), "input"), real=[1, 1, 0]) == [1, 1, 1]  # padding does not count
    assert chosen([[1.0], [1.0]], Middle("token", (0, 2), "input")) == [0]  # ties: the lowest


def test_layers_outside_the_target_and_eager_targets_are_refused():
    model, (ids, images) = tiny_model("llava"), document("llava", [3, 2])
    with pytest.raises(UserError, match=r"middle.layers: found 1..9, expected a range inside 0..8"):
        watched(model, ids, images, middle=Middle("token", (1, 9), "output"))
    assert model.get_decoder().config._attn_implementation == "sdpa"
    model.set_attn_implementation("eager")
    with pytest.raises(UserError, match="found a target with eager attention, expected sdpa"):
        watched(model, ids, images, middle=Middle("token", (1, 3), "output"))
