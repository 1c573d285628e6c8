"""Targets with recurrent layers, of every family that runs: a tree's logits, taps and, once a path is committed, states
equal those of sequential decoding (STree, arXiv 2505.14969; the gated delta rule by its own closed form).

Tiny random models in fp32. What they are compared with is the model's own forward over whole texts, and a session that
has processed nothing but the text that was kept.
"""

import pytest
import torch
import transformers as hf
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from draftsmith.models.features import FeatureSpec
from draftsmith.models.targets import TextTarget
from draftsmith.models.targets import session as sessions
from draftsmith.models.targets.recurrent import rows, ssd
from draftsmith.models.tree import DraftTree
from tests.conftest import tiny_head
from tests.models.targets.test_targets import model_of, prompts_of

SHAPE = dict(vocab_size=61, hidden_size=32, pad_token_id=0, bos_token_id=1, eos_token_id=2, initializer_range=0.15)
ATTENTION = dict(num_attention_heads=4, num_key_value_heads=2, intermediate_size=48, max_position_embeddings=256)
DELTA = dict(
    linear_num_key_heads=2,
    linear_num_value_heads=4,
    linear_key_head_dim=8,
    linear_value_head_dim=8,
    initializer_range=0.08,  # less, since with random decays these layers make more of rounding
)
STATES = dict(mamba_n_heads=8, mamba_d_head=8, mamba_n_groups=2, mamba_d_state=8, mamba_chunk_size=16)
EXPERTS = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24, shared_expert_intermediate_size=24)
TYPES = ["linear_attention", "linear_attention", "linear_attention", "full_attention"] * 2
MAMBA2 = dict(num_heads=8, head_dim=8, n_groups=2, state_size=8, chunk_size=16)
FAMILIES = {
    "mamba2": lambda: hf.Mamba2Config(**SHAPE, **MAMBA2, num_hidden_layers=7),
    "qwen3_next": lambda: hf.Qwen3NextConfig(**SHAPE | DELTA, **ATTENTION, **EXPERTS, num_hidden_layers=8, head_dim=8),
    "qwen3_5_text": lambda: hf.Qwen3_5TextConfig(**SHAPE | DELTA, **ATTENTION, num_hidden_layers=8, head_dim=8),
    "bamba": lambda: hf.BambaConfig(**SHAPE, **ATTENTION, **STATES, num_hidden_layers=7, attn_layer_indices=[2, 5]),
    "granitemoehybrid": lambda: hf.GraniteMoeHybridConfig(
        **SHAPE,
        **ATTENTION,
        **STATES,
        num_hidden_layers=8,
        layer_types=TYPES,
        num_local_experts=4,
        shared_intermediate_size=24,
        logits_scaling=4.0,
        embedding_multiplier=2.0,
        residual_multiplier=0.5,
    ),
    "falcon_h1": lambda: hf.FalconH1Config(
        **SHAPE,
        **ATTENTION,
        **STATES,
        num_hidden_layers=7,
        mamba_d_ssm=64,
        lm_head_multiplier=0.5,
        mamba_rms_norm=True,
        ssm_in_multiplier=0.7,
    ),
    "nemotron_h": lambda: hf.NemotronHConfig(
        **SHAPE,
        **ATTENTION,
        layers_block_type=["linear_attention", "moe", "full_attention", "mlp"] * 2,
        head_dim=8,
        mamba_num_heads=8,
        mamba_head_dim=8,
        n_groups=2,
        ssm_state_size=8,
        chunk_size=16,
        n_routed_experts=4,
        moe_intermediate_size=24,
        moe_shared_expert_intermediate_size=24,
    ),
    "zamba2": lambda: hf.Zamba2Config(
        **SHAPE,
        **{**ATTENTION, "num_key_value_heads": 4},
        num_hidden_layers=7,
        n_mamba_heads=8,
        mamba_ngroups=2,
        mamba_d_state=8,
        chunk_size=16,
        adapter_rank=4,
        use_mem_rope=True,
        layers_block_type=["linear_attention", "linear_attention", "hybrid"] * 2 + ["linear_attention"],
    ),
    "olmo_hybrid": lambda: hf.OlmoHybridConfig(**SHAPE | DELTA, **ATTENTION, num_hidden_layers=8, layer_types=TYPES),
    "jamba": lambda: hf.JambaConfig(
        **SHAPE,
        **ATTENTION,
        num_hidden_layers=7,
        attn_layer_period=4,
        attn_layer_offset=2,
        mamba_d_state=4,
        num_experts=4,
        mamba_dt_rank=4,
    ),
    "mamba": lambda: hf.MambaConfig(**SHAPE, num_hidden_layers=7, state_size=4),
    "lfm2": lambda: hf.Lfm2Config(**SHAPE, **ATTENTION, num_hidden_layers=7, full_attn_idxs=[2, 5]),
}
BEHIND = ("mamba", "mamba2")  # whose `hidden_states` begin behind the first layer
TAPS = (0, 2, 3, 5, "last")
BRANCHING = [-1, 0, 0, 1, 1, 3]
every_family = pytest.mark.parametrize("family", FAMILIES)
drawn = settings(
    max_examples=4,
    deadline=None,
    derandomize=True,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)


@pytest.fixture(scope="module")
def target_of():
    made = {}

    def of(family: str) -> TextTarget:
        if family not in made:
            made[family] = TextTarget(model_of(FAMILIES[family]()), family)
        return made[family]

    return of


@torch.no_grad()
def plain(target, texts: list[list[int]]):
    """The model's own forward over right-padded texts: logits [B, S, V] and taps [B, S, taps * h]."""
    width = max(map(len, texts))
    tokens = torch.tensor([text + [0] * (width - len(text)) for text in texts])
    out = target.model(tokens, use_cache=False, output_hidden_states=True)
    states = out.hidden_states
    if target.name in BEHIND:
        states = (target.embed(tokens), *states[:-2], states[-1])
    return out.logits, torch.cat([states[-1 if k == "last" else k] for k in TAPS], -1)


def tree_error(target, session, tree, texts) -> float:
    """Largest difference between the verified real nodes and one plain forward over all root-to-leaf paths."""
    verified, paths, kept = session.verify(tree), [], []
    for b, text in enumerate(texts):
        for i in range(tree.size):
            if tree.real[b, i] and not (tree.parents[b] == i).any():
                path = tree.ancestors[b, i].nonzero().flatten()
                paths.append(text + tree.tokens[b, path].tolist())
                kept.append((b, path, len(text)))
    logits, hidden = plain(target, paths)
    worst = 0.0
    for n, (b, path, start) in enumerate(kept):
        for got, want in ((verified.logits, logits), (verified.hidden, hidden)):
            worst = max(worst, (got[b, path] - want[n, start : start + len(path)]).abs().max().item())
    return worst


def states_error(session, texts) -> float:
    """Largest difference of the session's states from those of one that has only read the texts. Convolutions keep
    inputs, whose rows before the first are zero.
    """
    fresh = session.target.open(session.spec, len(texts), 64)
    fresh.prefill(texts)
    pairs = zip(session.cache.states, fresh.cache.states)
    return max((a - b).abs().max().item() for own, other in pairs for a, b in zip(own, other) if a is not None)


@st.composite
def rounds(draw):
    """A few rounds of ragged trees for two requests: parents [2, N] and the node whose path is committed, for each."""
    found = []
    for _ in range(draw(st.integers(1, 3))):
        size = draw(st.integers(1, 9))
        trees, ends = [], []
        for _ in range(2):
            real = draw(st.integers(1, size))
            trees.append([-1] + [draw(st.integers(0, i - 1)) for i in range(1, real)] + [-1] * (size - real))
            ends.append(draw(st.integers(0, real - 1)))
        found.append((trees, ends))
    return found


def decode_error(target, plan, seed: int = 1) -> tuple[float, float]:
    """Of all rounds: (logits and taps, states)."""
    texts, g, worst = prompts_of(3, 8), torch.Generator().manual_seed(seed), [0.0, 0.0]
    session = target.open(FeatureSpec(TAPS), 2, 64)
    session.prefill(texts)
    for parents, ends in plan:
        tree = DraftTree.of(torch.randint(3, 61, (2, len(parents[0])), generator=g), torch.tensor(parents))
        worst[0] = max(worst[0], tree_error(target, session, tree, texts))
        paths = [tree.ancestors[b, end].nonzero().flatten().tolist() for b, end in enumerate(ends)]
        counts = torch.tensor([len(path) for path in paths])
        width = int(counts.max())
        session.commit(torch.tensor([path + [0] * (width - len(path)) for path in paths]), counts)
        texts = [text + tree.tokens[b, path].tolist() for b, (text, path) in enumerate(zip(texts, paths))]
    return worst[0], states_error(session, texts)


@every_family
@drawn
@given(plan=rounds())
def test_trees_of_any_shape_equal_sequential_decoding(family, target_of, plan):
    outputs, states = decode_error(target_of(family), plan)
    assert outputs < 1e-4 and states < 1e-5, (outputs, states)


FIXED = [
    ([BRANCHING, [-1, 0, 1, 0, 2, -1]], [5, 2]),
    ([[-1, 0, 0], [-1, 0, 1]], [0, 2]),
    ([BRANCHING, BRANCHING], [4, 5]),
]


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "lfm2"])
def test_siblings_that_see_each_other_are_wrong(family, target_of, monkeypatch):
    """The same comparison with a scan and a convolution over all rows before: what a kernel for texts would do."""
    real = rows.Branches
    monkeypatch.setattr(
        "draftsmith.models.targets.recurrent.session.Branches", lambda own: real(torch.ones_like(own).tril())
    )
    outputs, states = decode_error(target_of(family), FIXED)
    assert outputs > 1e-2 and states > 1e-3, (outputs, states)


@every_family
def test_prompts_in_pieces_of_any_length_leave_the_states_of_whole_ones(family, target_of, monkeypatch):
    """From one token on, shorter than a convolution and longer than a piece."""
    target, texts = target_of(family), prompts_of(1, 2, 5, 13)
    whole = target.open(FeatureSpec(TAPS), 4, 16)
    want = whole.prefill(texts)
    monkeypatch.setattr(sessions, "PREFILL_ROWS", 4)
    session = target.open(FeatureSpec(TAPS), 4, 16)
    got = session.prefill(texts)
    logits, hidden = plain(target, texts)
    for b, text in enumerate(texts):
        for found in (got, want):
            torch.testing.assert_close(found.logits[b], logits[b, len(text) - 1], atol=1e-4, rtol=0)
            torch.testing.assert_close(found.features.hidden[b, : len(text)], hidden[b, : len(text)], atol=1e-4, rtol=0)
    assert states_error(session, texts) < 1e-5


def tree_of(parents, batch: int, seed: int = 2) -> DraftTree:
    g = torch.Generator().manual_seed(seed)
    return DraftTree.of(torch.randint(3, 61, (batch, len(parents)), generator=g), torch.tensor([parents] * batch))


@every_family
def test_verifying_writes_no_state_and_a_rejected_tree_leaves_that_of_its_root(family, target_of):
    target, texts = target_of(family), prompts_of(4, 7)
    session = target.open(FeatureSpec(TAPS), 2, 24)
    session.prefill(texts)
    before = [[None if part is None else part.clone() for part in layer] for layer in session.cache.states]
    tree = tree_of(BRANCHING, 2)
    first, second = session.verify(tree), session.verify(tree)
    assert torch.equal(first.logits, second.logits)
    for own, kept in zip(session.cache.states, before):
        assert all(a is b is None or torch.equal(a, b) for a, b in zip(own, kept))
    session.commit(torch.zeros(2, 1, dtype=torch.int64), torch.ones(2, dtype=torch.int64))
    texts = [text + [int(tree.tokens[b, 0])] for b, text in enumerate(texts)]
    assert states_error(session, texts) < 1e-5
    for number in range(2):  # rounds without drafts
        root = torch.tensor([5 + number, 9])
        session.verify(DraftTree.root_only(root))
        session.commit(torch.zeros(2, 1, dtype=torch.int64), torch.ones(2, dtype=torch.int64))
        texts = [text + [token] for text, token in zip(texts, root.tolist())]
    assert states_error(session, texts) < 1e-5


@every_family
def test_requests_come_and_go_and_a_prefill_serves_several_methods(family, target_of):
    target, texts = target_of(family), prompts_of(3, 6, 4)
    session = target.open(FeatureSpec(TAPS), 3, 24)
    session.prefill(texts)
    path, counts = torch.tensor([[0, 1, 3], [0, 2, 0], [0, 1, 0]]), torch.tensor([3, 2, 1])
    tree = tree_of(BRANCHING, 3)

    def decode(rows):
        session.verify(DraftTree.of(tree.tokens[rows], tree.parents[rows]))
        session.commit(path[rows], counts[rows])
        return [texts[b] + tree.tokens[b, path[b, : counts[b]]].tolist() for b in rows]

    first = decode([0, 1, 2])
    assert states_error(session, first) < 1e-5
    session.rewind(torch.tensor([3, 6, 4]))
    assert states_error(session, texts) < 1e-5
    assert decode([0, 1, 2]) == first and states_error(session, first) < 1e-5
    session.rewind(torch.tensor([3, len(first[1]), 4]))  # some go back, others stay
    assert states_error(session, [texts[0], first[1], texts[2]]) < 1e-5
    session.select(torch.tensor([2, 1]))
    assert states_error(session, [texts[2], first[1]]) < 1e-5
    more = prompts_of(5, 2, seed=9)
    session.admit(more)
    texts = [texts[2], first[1], *more]
    assert session.lengths.tolist() == [4, len(first[1]), 5, 2] and states_error(session, texts) < 1e-5
    assert tree_error(target, session, tree_of(BRANCHING, 4, seed=4), texts) < 1e-4
    session.rewind(torch.tensor([4, 6, 5, 2]))
    with pytest.raises(ValueError, match="states of other rows are gone"):
        session.rewind(torch.tensor([4, 5, 5, 2]))
    session.select(torch.empty(0, dtype=torch.int64))
    session.admit(more)
    assert states_error(session, more) < 1e-5


@pytest.mark.parametrize("family", ["mamba2", "qwen3_next", "mamba"])
def test_the_order_of_siblings_changes_nothing(family, target_of):
    target, text = target_of(family), prompts_of(6)
    session = target.open(FeatureSpec(TAPS), 1, 24)
    session.prefill(text)
    tree = tree_of([-1, 0, 0, 1, 2], 1)
    turned = DraftTree.of(tree.tokens[:, [0, 2, 1, 3, 4]], torch.tensor([[-1, 0, 0, 2, 1]]))
    first, second = session.verify(tree).logits, session.verify(turned).logits
    torch.testing.assert_close(first[:, [0, 2, 1, 3, 4]], second, atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_head_starts_from_the_final_norm_whatever_it_is_called(family, target_of):
    target = target_of(family)
    head = tiny_head(target)
    head.start_from(target)
    less = 1 if family in ("qwen3_next", "qwen3_5_text") else 0
    torch.testing.assert_close(head.norm.weight, target.final_norm.weight + less, atol=1e-5, rtol=1e-5)


def test_steps_of_any_size_overflow_nowhere():
    """Between siblings decays may be e^1000; only pairs on a path are computed."""
    g = torch.Generator().manual_seed(0)
    own = DraftTree.of(torch.zeros(1, 6, dtype=torch.int64), torch.tensor([BRANCHING])).ancestors
    dt, A = 300 * torch.rand(1, 6, 4, generator=g), -5 * torch.rand(4, generator=g)
    x, B, C = (torch.randn(1, 6, *shape, generator=g) for shape in ((4, 8), (2, 16), (2, 16)))
    state = torch.randn(1, 4, 8, 16, generator=g)
    found = ssd.scan(state, own, x, dt, A, B, C)
    assert torch.isfinite(found).all()
    for i in range(6):
        want = state[0].double()
        for j in own[0, i].nonzero().flatten().tolist():
            into = B[0, j].repeat_interleave(2, 0).double()
            want = (dt[0, j].double() * A.double()).exp()[:, None, None] * want
            want = want + (dt[0, j, :, None].double() * x[0, j].double())[..., None] * into[:, None]
        read = (want * C[0, i].repeat_interleave(2, 0).double()[:, None]).sum(-1)
        torch.testing.assert_close(found[0, i].double(), read, atol=1e-2, rtol=1e-5)


@pytest.mark.parametrize("family", ["mamba2", "qwen3_5_text"])
def test_in_half_precision_trees_differ_from_the_models_own_forward_by_rounding(family):
    """bf16 has 8 bits: a step near the largest logit is a 256th of it. The model's own steps of one token differ from
    its own forward over the text by as much.
    """
    target = TextTarget(model_of(FAMILIES[family]()).to(torch.bfloat16), family)
    texts = prompts_of(9, 9)
    session = target.open(FeatureSpec(()), 2, 32)
    prefill, (logits, _) = session.prefill(texts), plain(target, texts)
    torch.testing.assert_close(prefill.logits, logits[:, -1], atol=0, rtol=0.02, check_dtype=False)
    tree = tree_of([-1, 0, 0, 1, 1, 3, 5, 2], 2)
    found = session.verify(tree).logits
    for b, text in enumerate(texts):
        for node in (4, 6, 7):
            path = tree.ancestors[b, node].nonzero().flatten()
            want = plain(target, [text + tree.tokens[b, path].tolist()])[0][0, -1]
            assert (found[b, node] - want).abs().max() < 0.03 * want.abs().max()
    assert all(state.dtype == torch.float32 for _, state in session.cache.states if state is not None)
