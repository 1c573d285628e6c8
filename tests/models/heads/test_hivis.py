"""HiViS: EAGLE with a bias for each step over text rows; training equals drafting, nothing visual enters, decoding is
lossless.
"""

from dataclasses import replace
from itertools import accumulate

import pytest
import torch
import torch.nn.functional as F

from draftsmith.eval.decode import generate
from draftsmith.eval.sampling import Sampling
from draftsmith.models.drafters import HeadDrafter, NoDrafter
from draftsmith.models.errors import UserError
from draftsmith.models.features import Features, Packing
from draftsmith.models.formats import save_drafter
from draftsmith.models.grow import parse_tree
from draftsmith.models.heads import EagleConfig, EagleHead, EagleObjective, HivisConfig, HivisHead, HivisObjective
from draftsmith.models.targets import ImagePrompt
from draftsmith.train.recipe import DrafterRecipe, read_recipe
from draftsmith.train.start import build_head
from tests.conftest import ROOT, pack
from tests.models.heads.documents import documents
from tests.tiny_vision import END, IMAGE, START, document, tiny_vision

GOAL = HivisObjective(steps=3, ce_weight=0.1, topk_weight=1.0, topk=10, noise=0.0, mask="none")
ZERO = torch.zeros(1, 1, dtype=torch.long)
BIASES = [f"layers.0.self_attn.{name}_proj.bias" for name in "qkv"]
DROPPED = {"llava": [], "qwen2_5_vl": [START, END], "gemma3": [START, END]}
both_places = pytest.mark.parametrize("positions", ["compact", "original"])


def hivis_head(target, family="llava", residuals=3, positions="compact", std=0.3) -> HivisHead:
    torch.manual_seed(1)
    head = HivisHead(
        HivisConfig.for_target(
            target.config,
            qkv_bias=family == "qwen2_5_vl",
            residuals=residuals,
            positions=positions,
            drop_ids=DROPPED[family],
        ),
        target.shared,
    )
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter, std=std) if parameter.ndim == 2 else torch.nn.init.uniform_(
            parameter, 0.5, 1.5
        )
    torch.nn.init.normal_(head.residual, std=3.0)  # wildly different rows
    return head.eval()


def exact(family="llava", **shape):
    """Both in fp64."""
    target = tiny_vision(family)
    target.model.double()
    return target, hivis_head(target, family, **shape).double()


def packed(target, family, head):
    """Documents with several images, one, and none; the target wrote the last eight tokens of each."""
    texts = [document(family, [3, 5, 12], 1), document(family, [4, 11], 2), document(family, [14], 3)]
    mask = torch.cat([torch.arange(len(ids)) >= len(ids) - 8 for ids, _ in texts])
    packing = Packing((0, *accumulate(len(ids) for ids, _ in texts)), mask)
    return target.features(
        torch.tensor([token for ids, _ in texts for token in ids]),
        packing,
        head.feature_spec,
        [images for _, images in texts],
    ), texts


def truncated(features, row) -> Features:
    """What decoding has of packed row `row`'s document up to and with it."""
    start = max(border for border in features.packing.borders if border <= row)
    mine = slice(start, row + 1)
    return Features(
        features.tokens[None, mine],
        features.hidden[None, mine],
        torch.tensor([row + 1 - start]),
        positions=features.positions[None, mine],
    )


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
@both_places
def test_training_step_k_row_t_equals_sequential_drafting(family, positions):
    target, head = exact(family, positions=positions)
    training, texts = packed(target, family, head)
    hidden_ids = {IMAGE, *DROPPED[family]}
    assert training.tokens.tolist() == [token for ids, _ in texts for token in ids if token not in hidden_ids]
    compared = 0
    for k, (rows, output) in enumerate(head.unroll(training, 3)):
        for row, got in zip(rows.tolist(), output):
            beam = head.roots(head.prefill(truncated(training, row)))
            for step in range(k + 1):
                _, beam = head.expand(beam, training.tokens[row + 1 + step].view(1, 1), ZERO)
            torch.testing.assert_close(beam.hidden[0, 0], got, atol=1e-10, rtol=1e-10)
            compared += 1
    assert compared == 3 * (7 + 6 + 5)


def trained(head, features, steps, mask="none"):
    optimizer = torch.optim.AdamW(head.parameters(), lr=5e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        head.loss(features, replace(GOAL, mask=mask))[0].backward()
        optimizer.step()
    head.zero_grad()


def unrolled(head, features, row, depth, places):
    """One round written out: every row of the context once, then fed on itself; all keys and values kept, the softmax
    over these alone.
    """
    start, attention = max(b for b in features.packing.borders if b <= row), head.layer.self_attn
    keys, values, output = [], [], None
    for k, t in [(0, t) for t in range(start, row + 1)] + [(k, row + k) for k in range(1, depth + 1)]:
        feature = features.hidden[t] if k == 0 else output
        embedded = F.embedding(features.tokens[t + 1], head.shared.embedding)
        x = head.fc(torch.cat([embedded, feature, head.residual[k]]))
        cos_sin = head.angles(places[min(t, row)] + k)
        key, value = (attention.repeat(y, 0) for y in attention.key_value(x, *cos_sin))
        keys.append(key)
        values.append(value)
        share = (torch.einsum("hd,thd->ht", attention.query(x, *cos_sin), torch.stack(keys)) * attention.scale).softmax(
            -1
        )
        output = head.layer.finish(x, torch.einsum("ht,thd->hd", share, torch.stack(values)))
    return output


@both_places
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_stacked_training_equals_a_cached_unroll_with_every_steps_own_residual(family, positions):
    target, head = exact(family, positions=positions)
    features, _ = packed(target, family, head)
    places = torch.cat([torch.arange(b - a) for a, b in zip(features.packing.borders, features.packing.borders[1:])])
    places = places if positions == "compact" else features.positions
    for k, (rows, output) in enumerate(head.unroll(features, 3)):
        for row, got in zip(rows.tolist(), output):
            torch.testing.assert_close(got, unrolled(head, features, row, k, places), atol=1e-10, rtol=1e-10)


def eagle_like(head, step) -> EagleHead:
    """EAGLE with W_r r_k + b for a bias."""
    names, h = EagleConfig.__dataclass_fields__, head.config.hidden_size
    eagle = EagleHead(EagleConfig(**{name: getattr(head.config, name) for name in names}), head.shared).to(
        head.fc.weight.dtype
    )
    state = {name: value for name, value in head.state_dict().items() if name != "residual"}
    state["fc.bias"] = head.fc.bias + head.fc.weight[:, 2 * h :] @ head.residual[step]
    eagle.load_state_dict(state | {"fc.weight": head.fc.weight[:, : 2 * h]})
    return eagle


def test_a_residual_is_a_bias_of_its_step():
    target, head = exact()
    hidden, tokens = torch.randn(5, head.config.hidden_size, dtype=torch.float64), torch.tensor([3, 1, 4, 1, 5])
    with torch.no_grad():
        for step in range(3):
            torch.testing.assert_close(
                head.enter(tokens, hidden, step)[0],
                eagle_like(head, step).enter(tokens, hidden)[0],
                atol=1e-12,
                rtol=1e-12,
            )
        assert torch.equal(
            head.enter(tokens, hidden, 2)[0], head.enter(tokens, hidden, 7)[0]
        )  # beyond the trained steps the last one
        assert not torch.allclose(head.enter(tokens, hidden, 1)[0], head.enter(tokens, hidden, 2)[0])


def test_with_equal_residuals_over_text_it_is_hass(target):
    target.model.double()
    head = hivis_head(target).double()
    head.residual.data[:] = head.residual[:1].clone()
    eagle, rows = eagle_like(head, 0), documents(target)
    ours, theirs = (
        h.loss(pack(target, h, rows, [4, 0, 7]), goal)
        for h, goal in (
            (head, GOAL),
            (eagle, EagleObjective(**{name: getattr(GOAL, name) for name in EagleObjective.__dataclass_fields__})),
        )
    )
    torch.testing.assert_close(ours[0], theirs[0])
    for name, value in theirs[1].items():
        torch.testing.assert_close(ours[1][name], value)


def test_path_mask_equals_brute_force_and_gradients_reach_every_residual():
    target, head = exact(std=0.12)
    features, _ = packed(target, "llava", head)
    trained(head, features, 12)  # right now and then
    final = dict(zip((features.packing.rows + 1).tolist(), features.teacher.final))
    losses, alive, counts = [], {}, []
    for k, (rows, output) in enumerate(head.unroll(features, 3)):
        losses.append([])
        for row, a in zip(rows.tolist(), output):
            f = final[row + 1 + k]
            q, logp = target.project(f).softmax(-1), target.project(a).log_softmax(-1)
            top = q.topk(10).indices
            if alive.setdefault(row, True):
                losses[-1].append(F.smooth_l1_loss(a, f) - 0.1 * (q * logp).sum() - (q[top] * logp[top]).sum())
            alive[row] = alive[row] and bool((logp.topk(5).indices == q.argmax()).any())
        counts.append(len(losses[-1]))
    assert 21 == counts[0] > counts[1] > counts[2] > 0  # neither empty nor idle
    loss, sums = head.loss(features, replace(GOAL, mask="path"))
    torch.testing.assert_close(loss, sum(torch.stack(part).mean() for part in losses))
    assert sums["rows"].tolist() == [21, 18, 15]
    loss.backward()
    assert (head.residual.grad.abs().sum(1) > 0).all()


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
@both_places
def test_trees_hung_in_a_packed_row_equal_trees_behind_the_truncated_document(family, positions):
    target, head = exact(family, positions=positions)
    training, _ = packed(target, family, head)
    at = torch.tensor([1, 3, 5, 14, 18, 22, 38, 45])
    tokens, parents = torch.tensor([[1, 2]]).expand(len(at), -1), torch.tensor([[1, 0]]).expand(len(at), -1)
    _, beam = head.expand(head.root_at(training, at), training.tokens[at][:, None], ZERO.expand(len(at), 1))
    _, beam = head.expand(beam, tokens, ZERO.expand(len(at), 2))
    got, _ = head.expand(beam, tokens, parents)
    for p, row in enumerate(at.tolist()):
        _, beam = head.expand(
            head.roots(head.prefill(truncated(training, row - 1))), training.tokens[row].view(1, 1), ZERO
        )
        _, beam = head.expand(beam, tokens[:1], ZERO.expand(1, 2))
        want, _ = head.expand(beam, tokens[:1], parents[:1])
        torch.testing.assert_close(got[p], want[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "gemma3"])
@both_places
def test_prefill_has_only_text_and_sees_images_through_features(family, positions):
    target = tiny_vision(family)
    head = hivis_head(target, family, positions=positions)
    ids, images = document(family, [3, 5, 4], 1)
    other = {name: value + 1 if value.is_floating_point() else value for name, value in images.items()}
    drafted = []
    for pictures in (images, other):
        features = target.open(head.feature_spec, 1, 8).prefill([ImagePrompt(ids, pictures)]).features
        assert features.lengths.tolist() == [12] and not {IMAGE, *DROPPED[family]} & set(features.tokens[0].tolist())
        context = head.prefill(features)
        assert context.cache.lengths.tolist() == [11]  # the twelfth waits for the root
        assert context.shift.tolist() == [len(ids) - 12 if positions == "original" else 0]
        drafted.append(head.expand(head.roots(context), torch.tensor([[7]]), ZERO)[0])
    assert (drafted[0] - drafted[1]).abs().max() > 1e-3


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
@both_places
def test_decoding_with_it_is_plain_greedy_decoding(family, positions):
    target = tiny_vision(family)
    head = hivis_head(target, family, positions=positions, std=0.12)
    prompts = [
        ImagePrompt(*document(family, [0, 7], 1)),
        ImagePrompt(*document(family, [3, 5, 4], 2)),
        document(family, [9], 3)[0],
    ]
    plain = generate(target, NoDrafter(), prompts, Sampling(), 20)
    texts = [(list(p) + t.tokens, getattr(p, "images", {})) for p, t in zip(prompts, plain)]
    mask = torch.cat([torch.arange(len(ids)) >= len(p) for (ids, _), p in zip(texts, prompts)])
    packing = Packing((0, *accumulate(len(ids) for ids, _ in texts)), mask)
    features = target.features(
        torch.tensor([i for ids, _ in texts for i in ids]), packing, head.feature_spec, [images for _, images in texts]
    )
    trained(head, features, 30, "path")
    drafted = generate(target, HeadDrafter(head, parse_tree("dynamic:4x3x10")), prompts, Sampling(), 20)
    assert [t.tokens for t in drafted] == [t.tokens for t in plain]
    assert sum(sum(t.accepted) for t in drafted) > 5  # several lengths of walks occurred


@both_places
def test_rounds_leave_the_cache_that_a_fresh_prefill_has(positions):
    target, head = exact("qwen2_5_vl", positions=positions)
    training, _ = packed(target, "qwen2_5_vl", head)
    whole = truncated(training, 19)

    def cut(a, b):
        return Features(
            whole.tokens[:, a:b], whole.hidden[:, a:b], torch.tensor([b - a]), positions=whole.positions[:, a:b]
        )  # noqa: E731

    grown, fresh = head.prefill(cut(0, 12)), head.prefill(whole)
    for start, stop in ((12, 15), (15, 16), (16, 20)):
        _, beam = head.expand(head.roots(grown), whole.tokens[:, start].view(1, 1), ZERO)
        head.expand(beam, torch.tensor([[3, 4]]), ZERO.expand(-1, 2))
        head.extend(grown, cut(start, stop))
    (a, _), (b, _) = (head.expand(head.roots(context), torch.tensor([[5]]), ZERO) for context in (grown, fresh))
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_gradients_of_the_biases_are_those_of_finite_differences():
    """A step's own gradient: later steps take the head's features as they are. A bias of all keys changes nothing but
    what the rope makes of it.
    """
    target, head = exact("qwen2_5_vl")
    features, _ = packed(target, "qwen2_5_vl", head)
    goal = replace(GOAL, steps=1)
    head.loss(features, goal)[0].backward()
    parameters = dict(head.named_parameters())
    for name in BIASES:
        bias, direction = (
            parameters[name],
            torch.randn(parameters[name].shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64),
        )
        values = []
        for size in (1e-6, -1e-6):
            with torch.no_grad():
                bias += size * direction
                values.append(head.loss(features, goal)[0])
                bias -= size * direction
        assert (values[0] - values[1]) / 2e-6 == pytest.approx(
            (bias.grad * direction).sum().item(), rel=1e-5
        ) and bias.grad.abs().sum() > 1e-3, name


def recipe_of(name, *more) -> DrafterRecipe:
    return read_recipe(ROOT / "recipes" / f"hivis-{name}.yaml", DrafterRecipe, more)


def test_stage_two_starts_from_the_row_of_stage_one(tmp_path):
    target = tiny_vision("llava")
    one = hivis_head(target, residuals=1)
    folder = save_drafter(one, tmp_path / "one", {}, torch.float32)

    def start(residuals):
        return build_head(
            recipe_of("llava-1.5-7b", f"head.start_from={folder}", f"head.residuals={residuals}"),  # noqa: E731
            target,
            torch.zeros(61),
            set(),
        )

    two = start(3)
    assert (
        two.config.residuals == 3
        and torch.equal(two.residual, one.residual.expand(3, -1))
        and torch.equal(two.fc.weight, one.fc.weight)
    )
    folder = save_drafter(two, tmp_path / "two", {}, torch.float32)
    with pytest.raises(UserError, match="head.residuals: found 4, expected 3"):
        start(4)


def test_recipes_hold_the_authors_values():
    stage = HivisObjective(steps=1, ce_weight=0.1, topk_weight=0.0, topk=10, noise=0.2, mask="none")
    for name in ("llava-1.5-7b", "llava-1.6-7b", "qwen2.5-vl-7b", "smolvlm", "gemma3"):
        recipe = recipe_of(name)
        assert recipe.head.qkv_bias == (name == "qwen2.5-vl-7b")
        assert recipe.goal == stage and recipe.kind is HivisHead and recipe.head.residuals == 1 and recipe.gto is None
    assert (
        recipe_of("qwen2.5-vl-7b").head.drop_ids == [151652, 151653]
        and recipe_of("qwen2.5-vl-7b").head.positions == "original"
    )
    second = recipe_of(
        "llava-1.5-7b", "head.residuals=3", "objective.steps=3", "objective.topk_weight=1.0", "objective.mask=path"
    )
    assert second.goal == replace(GOAL, noise=0.2, mask="path")
