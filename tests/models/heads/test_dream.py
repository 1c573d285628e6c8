"""DREAM: what a row sees, training equals drafting, trees equal their paths, lossless decoding."""

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
from draftsmith.models.formats import load_drafter, save_drafter
from draftsmith.models.grow import parse_tree
from draftsmith.models.heads import DreamConfig, DreamHead, DreamObjective
from draftsmith.train.recipe import DrafterRecipe, read_recipe
from tests.conftest import ROOT, tiny_target
from tests.models.heads.documents import place
from tests.models.targets.test_vision import packed, prompts_of
from tests.tiny_vision import tiny_vision

PLAIN = DreamObjective(steps=1, feature_weight=0.2, middle_weight=0.2, kl_weight=1.0, noise=0.0)
H = 32
both = pytest.mark.parametrize("family", ["llava", "gemma3", "qwen2_5_vl"])
ratios = pytest.mark.parametrize("ratio", [1.0, 0.5])


def dream_head(target, ratio=0.5, seed=1, **shape) -> DreamHead:
    torch.manual_seed(seed)
    head = DreamHead(DreamConfig.for_target(target.config, keep_ratio=ratio, **shape), target.shared)
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter, std=0.2) if parameter.ndim == 2 else torch.nn.init.uniform_(
            parameter, 0.5, 1.5
        )
    return head.eval()


def zeros(*shape):
    return torch.zeros(*shape, dtype=torch.long)


def cut(features, start, count) -> Features:
    """The first rows of one document of a packed row, as a prompt; columns stay those of the document's own prompt."""
    mine = slice(start, start + count)
    return Features(
        features.tokens[None, mine],
        features.hidden[None, mine],
        torch.tensor([count]),
        visual=features.visual[None, mine],
        columns=None if features.columns is None else features.columns[None, mine],
    )


def states_of(head, embedded, states, kept):
    """The head's states [n, h] at all kept rows of one document."""
    rows = head.rows(embedded, states, kept)
    return head.norm(head._self_block(head.layers[2], rows.x2, head.angles(rows.positions))[0])


def rows_of(head, n=9, seed=0, kept=None):
    draw = torch.Generator().manual_seed(seed)
    embedded, states = torch.randn(2, n, H, generator=draw)
    return embedded, states, torch.ones(n, dtype=torch.bool) if kept is None else kept


# What a row sees


@pytest.mark.parametrize("dropped", [(), (2, 3)])
def test_a_row_sees_embeddings_up_to_its_own_and_states_before_it(target, dropped):
    """Row 0 sees no state at all: with a uniform mixture there, the last state would change every row."""
    head, kept = dream_head(target), torch.tensor([i not in dropped for i in range(9)])
    embedded, states, _ = rows_of(head)
    base, places = states_of(head, embedded, states, kept), kept.nonzero().flatten().tolist()
    for j in range(9):
        moved = states.clone()
        moved[j] += 1
        changed = (states_of(head, embedded, moved, kept) - base).abs().amax(-1) > 1e-6
        assert changed.tolist() == [i > j for i in places]
        moved = embedded.clone()
        moved[j] += 1
        changed = (states_of(head, moved, states, kept) - base).abs().amax(-1) > 1e-6
        assert changed.tolist() == [j not in dropped and i >= j for i in places]


def test_a_new_head_does_not_look_at_the_states_and_learns_to_by_its_gates(target):
    head = DreamHead(DreamConfig.for_target(target.config), target.shared)
    embedded, states, kept = rows_of(head)
    output = states_of(head, embedded, states, kept)
    assert torch.equal(output, states_of(head, embedded, torch.randn(9, H), kept))
    cross = dict(head.layers[1].named_parameters())
    gradient = dict(zip(cross, torch.autograd.grad((output * torch.randn(9, H)).sum(), list(cross.values()))))
    assert {name for name, g in gradient.items() if g.abs().sum() > 0} == {"attn_gate", "mlp_gate"}


def by_formula(head, embedded, states):
    """Section 3 written out for one document without dropped rows: (the head's states, block 0's outputs) [N, h]."""
    c, w, n = head.config, dict(head.named_parameters()), len(embedded)
    half = torch.arange(c.head_dim // 2) * 2 / c.head_dim
    angle = torch.arange(n)[:, None] / c.rope_parameters["rope_theta"] ** half

    def norm(x, name):
        return x * (x.square().mean(-1, keepdim=True) + c.rms_norm_eps).rsqrt() * w[f"{name}.weight"]

    def heads(x, name, count):
        return (x @ w[f"{name}.weight"].T).unflatten(-1, (count, c.head_dim)).transpose(0, 1)

    def turn(x):
        a, b = x.chunk(2, -1)
        return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)

    def mixed(query, key, value, seen, name):
        key, value = (x.repeat_interleave(c.num_attention_heads // c.num_key_value_heads, 0) for x in (key, value))
        weights = (query @ key.mT / c.head_dim**0.5).masked_fill(~seen, -torch.inf).softmax(-1).nan_to_num(0.0)
        return (weights @ value).transpose(0, 1).flatten(1) @ w[f"{name}.o_proj.weight"].T

    def mlp(x, name):
        gate, up = (
            norm(x, f"{name}.post_attention_layernorm") @ w[f"{name}.mlp.{part}_proj.weight"].T
            for part in ("gate", "up")
        )
        return (F.silu(gate) * up) @ w[f"{name}.mlp.down_proj.weight"].T

    def self_block(x, u, name):
        q, k, v = (
            heads(u, f"{name}.self_attn.{part}_proj", count)
            for part, count in (
                ("q", c.num_attention_heads),
                ("k", c.num_key_value_heads),
                ("v", c.num_key_value_heads),
            )
        )
        a = x + mixed(turn(q), turn(k), v, torch.ones(n, n).tril().bool(), f"{name}.self_attn")
        return a + mlp(a, name)

    x1, cross = self_block(embedded, embedded, "layers.0"), "layers.1.cross_attn"
    q = norm(heads(norm(x1, "layers.1.input_layernorm"), f"{cross}.q_proj", c.num_attention_heads), f"{cross}.q_norm")
    k = norm(heads(states, f"{cross}.k_proj", c.num_key_value_heads), f"{cross}.k_norm")
    v = heads(states, f"{cross}.v_proj", c.num_key_value_heads)
    b = x1 + w["layers.1.attn_gate"].tanh() * mixed(q, k, v, torch.ones(n, n).tril(-1).bool(), cross)
    x2 = b + w["layers.1.mlp_gate"].tanh() * mlp(b, "layers.1")
    return norm(self_block(x2, norm(x2, "layers.2.input_layernorm"), "layers.2"), "norm"), x1


def test_the_blocks_are_the_written_out_formulas(target):
    """No norm before block 0 nor of the states, no positions in the cross-attention, gates through tanh; the middle is
    supervising block 0.
    """
    head = dream_head(target)
    embedded, states, kept = rows_of(head)
    for got, want in zip(
        (states_of(head, embedded, states, kept), head.rows(embedded, states, kept).x1),
        by_formula(head, embedded, states),
    ):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


# Training equals drafting


@both
@ratios
@pytest.mark.parametrize("positions", ["original", "compact"])
def test_training_rows_equal_sequential_drafting(family, ratio, positions):
    """Step k, row t: the k-th token behind the root, over the head's own states."""
    target = tiny_vision(family)
    head, compared = dream_head(target, ratio, positions=positions), 0
    training = packed(family, target, head.feature_spec)[0]
    steps = [
        dict(zip(rows.tolist(), head.logits(outputs).log_softmax(-1))) for rows, outputs in head.unroll(training, 4)
    ]
    for row in training.packing.rows.tolist():
        b, t = place(training, row)
        beam = head.roots(head.prefill(cut(training, training.packing.borders[b], t + 1)))
        for k, step in enumerate(steps):
            if row in step:
                want, beam = head.expand(beam, training.tokens[row + 1 + k].view(1, 1), zeros(1, 1))
                torch.testing.assert_close(step[row], want[0, 0], atol=1e-5, rtol=1e-5)
                compared += 1
    assert compared == 3 * (5 + 4 + 3 + 2)  # answers of six tokens


@both
def test_the_gradients_of_training_rows_are_those_of_whole_documents(family):
    target = tiny_vision(family)
    head = dream_head(target)
    training = packed(family, target, head.feature_spec)[0]
    plain, numbers = [], training.packing.rows + 1
    for rows in head.documents(training):
        whole = rows.x1.new_zeros(len(rows.kept), H)
        plain.append(
            whole.index_copy(
                0,
                rows.kept.nonzero().flatten(),
                head.norm(head._self_block(head.layers[2], rows.x2, head.angles(rows.positions))[0]),
            )
        )
    ((_, output),) = head.unroll(training, 1)
    torch.testing.assert_close(output, torch.cat(plain)[numbers], atol=1e-5, rtol=1e-5)
    slope = torch.randn(output.shape, generator=torch.Generator().manual_seed(0))
    for a, b in zip(
        *(torch.autograd.grad((x * slope).sum(), list(head.parameters())) for x in (output, torch.cat(plain)[numbers]))
    ):
        torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-3)


@both
@ratios
def test_rows_added_one_by_one_equal_a_prompt_and_speculation_leaves_no_trace(family, ratio):
    target = tiny_vision(family)
    head = dream_head(target, ratio)
    training, _, packing = packed(family, target, head.feature_spec)
    start, prompt, stop = packing.borders[1], int(packing.prompts[1]), packing.borders[2]
    count = stop - start
    grown = head.prefill(cut(training, start, prompt))
    for a, b in ((prompt, prompt + 3), (prompt + 3, prompt + 4), (prompt + 4, count - 1)):
        _, beam = head.expand(head.roots(grown), training.tokens[start + a].view(1, 1), zeros(1, 1))
        head.expand(beam, torch.tensor([[3, 4]]), zeros(1, 2))
        new = slice(start + a, start + b)
        head.extend(grown, Features(training.tokens[None, new], training.hidden[None, new], torch.tensor([b - a])))
    fresh, root = head.prefill(cut(training, start, count - 1)), training.tokens[stop - 1].view(1, 1)
    (a, first), (b, second) = (head.expand(head.roots(context), root, zeros(1, 1)) for context in (grown, fresh))
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    for name in ("own", "cross"):
        n = int(getattr(fresh, name).lengths)
        assert int(getattr(grown, name).lengths) == n
        torch.testing.assert_close(
            getattr(grown, name).store[..., :n, :], getattr(fresh, name).store[..., :n, :], atol=1e-5, rtol=1e-5
        )


@both
def test_every_path_of_a_tree_equals_the_chain_alone_in_a_ragged_batch(family):
    target = tiny_vision(family)
    head, prompts = dream_head(target), prompts_of(family)
    prompt = target.open(head.feature_spec, 3, 8).prefill(prompts).features
    roots, levels = (
        torch.tensor([[5], [6], [7]]),
        [torch.tensor([[1, 2], [3, 4], [8, 9]]), torch.tensor([[4, 5, 6], [6, 7, 8], [3, 3, 1]])],
    )
    parents = [zeros(3, 2), torch.tensor([[1, 0, 1], [0, 0, 1], [1, 1, 0]])]
    first, beam = head.expand(head.roots(head.prefill(prompt)), roots, zeros(3, 1))
    second, beam = head.expand(beam, levels[0], parents[0])
    third, _ = head.expand(beam, levels[1], parents[1])
    for b, n in enumerate(prompt.lengths.tolist()):
        mine = Features(
            prompt.tokens[b : b + 1, :n],
            prompt.hidden[b : b + 1, :n],
            torch.tensor([n]),
            visual=prompt.visual[b : b + 1, :n],
            columns=prompt.columns[b : b + 1, :n],
        )
        for leaf, parent in enumerate(parents[1][b].tolist()):
            a, alone = head.expand(head.roots(head.prefill(mine)), roots[b : b + 1], zeros(1, 1))
            c, alone = head.expand(alone, levels[0][b, parent].view(1, 1), zeros(1, 1))
            d, _ = head.expand(alone, levels[1][b, leaf].view(1, 1), zeros(1, 1))
            for tree, chain in ((first[b, 0], a), (second[b, parent], c), (third[b, leaf], d)):
                torch.testing.assert_close(tree, chain[0, 0], atol=1e-5, rtol=1e-5)


@both
@ratios
def test_trees_hung_in_a_packed_row_equal_trees_behind_the_truncated_document(family, ratio):
    target = tiny_vision(family)
    head = dream_head(target, ratio)
    training = packed(family, target, head.feature_spec)[0]
    ends = training.packing.borders[1:]
    at = torch.tensor([ends[0] - 5, ends[0] - 1, ends[1] - 6, ends[1] - 1, ends[1] + 1, ends[2] - 1])
    roots, tokens, parents = (
        training.tokens[at][:, None],
        torch.tensor([[1, 2]] * 6),
        torch.tensor([[1, 0], [0, 0], [1, 1], [0, 1], [0, 0], [1, 0]]),
    )
    first, beam = head.expand(head.root_at(training, at), roots, zeros(6, 1))
    second, beam = head.expand(beam, tokens, zeros(6, 2))
    third, _ = head.expand(beam, tokens.flip(1), parents)
    for p, (b, t) in enumerate(place(training, i) for i in at.tolist()):
        a, alone = head.expand(
            head.roots(head.prefill(cut(training, training.packing.borders[b], t))), roots[p : p + 1], zeros(1, 1)
        )
        c, alone = head.expand(alone, tokens[p : p + 1], zeros(1, 2))
        d, _ = head.expand(alone, tokens[p : p + 1].flip(1), parents[p : p + 1])
        for rooted, single in ((first, a), (second, c), (third, d)):
            torch.testing.assert_close(rooted[p], single[0], atol=1e-5, rtol=1e-5)
    gradient = torch.autograd.grad(third[..., 0].sum(), list(head.parameters()))
    assert all(g.abs().sum() > 0 for g in gradient)
    if ratio < 1:
        with pytest.raises(UserError, match="piece of an image"):
            head.root_at(training, training.visual.nonzero().flatten())


# Whole


@both
@ratios
@pytest.mark.parametrize("tree", ["chain:3", "dynamic:4x3x10"])
def test_decoding_is_plain_greedy_decoding(family, ratio, tree):
    target, prompts = tiny_vision(family), prompts_of(family)
    want = generate(target, NoDrafter(), prompts, Sampling(), 20)
    head = dream_head(target, ratio)
    traces = generate(target, HeadDrafter(head, parse_tree(tree)), prompts, Sampling(), 20)
    assert [t.tokens for t in traces] == [t.tokens for t in want]


def pack_images(target, head, documents):
    """Documents (ids, pictures, first token that the target wrote) as one packed row."""
    mask = torch.cat([torch.arange(len(ids)) >= start for ids, _, start in documents])
    packing = Packing((0, *accumulate(len(ids) for ids, *_ in documents)), mask)
    return target.features(
        torch.tensor([t for ids, *_ in documents for t in ids]),
        packing,
        head.feature_spec,
        [images for _, images, _ in documents],
    )


def test_a_text_target_is_drafted_for_too():
    target, prompts = tiny_target(), [[3, 1, 4], [1, 5, 9, 2, 6, 5, 3, 5], [8]]
    head = dream_head(target, 0.75)
    plain = generate(target, NoDrafter(), prompts, Sampling(), 20)
    assert [
        t.tokens for t in generate(target, HeadDrafter(head, parse_tree("dynamic:4x3x10")), prompts, Sampling(), 20)
    ] == [t.tokens for t in plain]
    loss, _ = head.loss(pack_images(target, head, [(p + t.tokens, {}, len(p)) for p, t in zip(prompts, plain)]), PLAIN)
    assert torch.isfinite(loss)


def test_a_directory_gives_the_same_head_and_damage_is_named(tmp_path):
    target = tiny_vision("llava")
    head = dream_head(target, 0.5, middle_granularity="sample")
    for parameter in head.parameters():  # what is stored is bf16
        parameter.data = parameter.data.to(torch.bfloat16).float()
    folder = save_drafter(head, tmp_path / "drafter", {"target": "tiny"})
    again = load_drafter(folder, target.shared, target.layers)
    features = packed("llava", target, head.feature_spec)[0]
    assert again.config == head.config and torch.equal(again.unroll(features, 1)[0][1], head.unroll(features, 1)[0][1])
    with pytest.raises(UserError, match="middle_last: found 2, expected at most the target's 1 layers"):
        load_drafter(folder, target.shared, 1)
    with pytest.raises(UserError, match="expected 0 <= first < last <= the target's 8 layers"):
        DreamConfig.for_target(target.config, middle_last=9)


@pytest.mark.parametrize(
    "name", ["dream-llava-1.5-7b", "dream-llava-1.6-7b", "dream-qwen2.5-vl-7b", "dream-smolvlm", "dream-gemma3"]
)
def test_recipes_hold_the_papers_values(name):
    recipe = read_recipe(ROOT / "recipes" / f"{name}.yaml", DrafterRecipe)
    assert recipe.kind is DreamHead and recipe.goal == replace(PLAIN, noise=0.2) and recipe.head.keep_ratio == 0.75
    assert recipe.evaluation.tree == "dynamic:6x4x32" and (recipe.goal.steps, recipe.goal.weights) == (1, [1.0])
    for override, message in (
        ("objective.steps=0", "objective.steps: found 0"),
        ("head.keep_ratio=0", "head.keep_ratio: found 0"),
        ("head.positions=none", "head.positions: found 'none'"),
    ):
        with pytest.raises(UserError, match=message):
            read_recipe(ROOT / "recipes" / f"{name}.yaml", DrafterRecipe, [override])
