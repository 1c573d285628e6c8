"""Targets of every common family: tree verification and decoding equal the model's own plain forward.

Tiny random models in fp32, states of order one, so that rounding stays near 1e-5. Where a family has sliding layers the
window is 8 rows, shorter than the longer prompts.
"""

import pytest
import torch
import transformers as hf
from transformers import AutoModelForCausalLM

from draftsmith.eval.decode import generate
from draftsmith.eval.sampling import Sampling
from draftsmith.models.drafters import HeadDrafter, NoDrafter
from draftsmith.models.errors import UserError
from draftsmith.models.features import FeatureSpec, Packing
from draftsmith.models.grow import parse_tree
from draftsmith.models.heads import Eagle3Config
from draftsmith.models.targets import TextTarget
from draftsmith.models.targets import session as sessions
from draftsmith.models.tree import DraftTree
from tests.conftest import tiny_head

SHAPE = dict(
    vocab_size=61,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=8,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=256,
    initializer_range=0.15,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1000.0,
    "factor": 8.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "original_max_position_embeddings": 32,
}
TWO = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
    "full_attention": {"rope_type": "linear", "rope_theta": 1000.0, "factor": 8.0},
}
FAMILIES = {
    "llama": lambda: hf.LlamaConfig(**SHAPE, rope_parameters=LLAMA3),
    "qwen2": lambda: hf.Qwen2Config(**SHAPE, rope_parameters=YARN),
    "qwen2 sliding": lambda: hf.Qwen2Config(**SHAPE, use_sliding_window=True, sliding_window=8, max_window_layers=4),
    "qwen3": lambda: hf.Qwen3Config(**SHAPE, head_dim=16),
    "qwen3 sliding": lambda: hf.Qwen3Config(
        **SHAPE, head_dim=16, use_sliding_window=True, sliding_window=8, max_window_layers=0
    ),
    "mistral": lambda: hf.MistralConfig(**SHAPE, sliding_window=8),
    "gemma2": lambda: hf.Gemma2Config(
        **SHAPE,
        head_dim=16,
        sliding_window=8,
        query_pre_attn_scalar=24,
        attn_logit_softcapping=5.0,
        final_logit_softcapping=8.0,
    ),
    "gemma3": lambda: hf.Gemma3TextConfig(
        **SHAPE, head_dim=16, sliding_window=8, query_pre_attn_scalar=24, rope_parameters=TWO
    ),
    "starcoder2": lambda: hf.Starcoder2Config(**SHAPE, sliding_window=8),
    "gpt_oss": lambda: hf.GptOssConfig(
        **SHAPE,
        head_dim=16,
        sliding_window=8,
        num_local_experts=4,
        num_experts_per_tok=2,
        rope_parameters={**YARN, "truncate": False},
    ),
    "qwen3_moe": lambda: hf.Qwen3MoeConfig(
        **SHAPE, head_dim=16, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24
    ),
    "qwen3_moe sliding": lambda: hf.Qwen3MoeConfig(
        **SHAPE,
        head_dim=16,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=24,
        use_sliding_window=True,
        sliding_window=8,
    ),
}
SLIDING = [
    "qwen2 sliding",
    "qwen3 sliding",
    "mistral",
    "gemma2",
    "gemma3",
    "starcoder2",
    "gpt_oss",
    "qwen3_moe sliding",
]
TAPS = (0, 2, 4, 5, "last")
every_family = pytest.mark.parametrize("family", FAMILIES)


def model_of(config):
    """Seeded; norms, biases and sinks are moved off their ones and zeros, so that what ignores them shows."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += torch.empty_like(parameter).uniform_(-0.3, 0.3)
    return model


def target_of(family: str) -> TextTarget:
    return TextTarget(model_of(FAMILIES[family]()), family)


def plain(target, tokens: list[int]):
    """The model's own forward over one row: logits [S, V] and the tapped hidden states [S, taps * h]."""
    with torch.no_grad():
        out = target.model(torch.tensor([tokens]), use_cache=False, output_hidden_states=True)
    return out.logits[0], torch.cat([out.hidden_states[-1 if k == "last" else k][0] for k in TAPS], -1)


def prompts_of(*lengths, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 61, (n,), generator=g).tolist() for n in lengths]


def tree_error(target, session, tree, texts) -> float:
    """Largest difference between the verified real nodes and plain forwards over their paths."""
    verified, worst = session.verify(tree), 0.0
    for b in range(len(texts)):
        for i in range(tree.size):
            path = tree.ancestors[b, i].nonzero().flatten()
            if not tree.real[b, i] or (tree.parents[b] == i).any():
                continue  # padding, or covered by a longer path
            logits, hidden = plain(target, texts[b] + tree.tokens[b, path].tolist())
            for got, want in ((verified.logits, logits), (verified.hidden, hidden)):
                worst = max(worst, (got[b, path] - want[-len(path) :]).abs().max().item())
    return worst


def rounds_error(target) -> float:
    """Prompts of 5, 19 and 11 tokens in chunks of 6, three rounds of trees with commits and a change of rows between
    them.
    """
    texts = prompts_of(5, 19, 11)
    session = target.open(FeatureSpec(TAPS), 3, 24)  # the store has to grow as well
    prefill, worst = session.prefill(texts), 0.0
    for b, tokens in enumerate(texts):
        logits, hidden = plain(target, tokens)
        worst = max(
            worst,
            (prefill.logits[b] - logits[-1]).abs().max().item(),
            (prefill.features.hidden[b, : len(tokens)] - hidden).abs().max().item(),
        )
    parents = torch.tensor([[-1, 0, 0, 1, 1, 3, 5], [-1, 0, 1, 0, 2, 4, -1], [-1, 0, 1, 2, 3, -1, -1]])
    g = torch.Generator().manual_seed(1)
    paths = (
        ([[0, 1, 3, 5], [0, 3, 0, 0], [0, 1, 2, 3]], [4, 2, 4]),
        ([[0, 2, 0], [0, 1, 2]], [2, 3]),
        ([[0], [0]], [1, 1]),
    )
    for number, (path, counts) in enumerate(paths):
        tree = DraftTree.of(torch.randint(3, 61, (len(texts), 7), generator=g), parents[: len(texts)])
        worst = max(worst, tree_error(target, session, tree, texts))
        session.commit(torch.tensor(path), torch.tensor(counts))
        texts = [t + tree.tokens[b, path[b][: counts[b]]].tolist() for b, t in enumerate(texts)]
        if number == 0:
            session.select(torch.tensor([2, 1]))
            texts = [texts[2], texts[1]]
    return max(worst, tree_error(target, session, DraftTree.root_only(torch.tensor([7, 8])), texts))


@every_family
def test_trees_are_verified_as_plain_forwards_over_their_paths(family, monkeypatch):
    monkeypatch.setattr(sessions, "PREFILL_ROWS", 6)
    assert rounds_error(target_of(family)) < 2e-5


@pytest.mark.parametrize("family", SLIDING)
def test_windows_matter_here(family, monkeypatch):
    """The same comparison, off by one row of the window, would fail."""
    monkeypatch.setattr(sessions, "PREFILL_ROWS", 6)
    target = target_of(family)
    target.window += 1
    assert rounds_error(target) > 0.1


def generates_as_transformers(target, prompts, count):
    """Greedy texts of `count` tokens, plain and drafted, are those of the library's own `generate`."""
    want = [
        target.model.generate(
            torch.tensor([p]),
            max_new_tokens=count,
            do_sample=False,
            eos_token_id=7,
            pad_token_id=0,
            attention_mask=torch.ones(1, len(p), dtype=torch.long),
        )[0, len(p) :].tolist()
        for p in prompts
    ]
    for drafter in (NoDrafter(), HeadDrafter(tiny_head(target, 40), parse_tree("dynamic:4x3x10"))):
        assert [t.tokens for t in generate(target, drafter, prompts, Sampling(), count, {7})] == want


@every_family
def test_greedy_decoding_equals_generate_of_transformers(family):
    generates_as_transformers(target_of(family), prompts_of(5, 19), 20)


@every_family
def test_a_head_copies_the_rope_and_head_dim_of_its_target(family):
    target = target_of(family)
    head, positions = tiny_head(target), torch.arange(200)
    rotary = (torch.zeros(1), positions[None], *(["full_attention"] if family == "gemma3" else []))
    half = head.config.head_dim // 2
    for got, want in zip(head.angles(positions), target.body.rotary_emb(*rotary)):
        torch.testing.assert_close(got[:, 0, half:], want[0, :, :half], atol=0, rtol=0)
    assert head.config.head_dim == target.body.layers[0].self_attn.head_dim
    assert head.config.rope_parameters["rope_type"] == {
        "llama": "llama3",
        "qwen2": "yarn",
        "gemma3": "linear",
        "gpt_oss": "yarn",
    }.get(family, "default")


@pytest.mark.parametrize("family", ["gemma2", "gemma3"])
def test_heads_share_the_stored_embedding_and_taps_are_scaled(family):
    target = target_of(family)
    assert torch.equal(target.embedding, target.model.get_input_embeddings().weight)
    hidden = target.features(
        torch.tensor([5]), Packing((0, 1), torch.ones(1, dtype=torch.bool)), FeatureSpec((0,))
    ).hidden
    torch.testing.assert_close(hidden[0], target.embedding[5] * 32**0.5)


@pytest.mark.parametrize("family, less", [("llama", 0), ("gemma2", 1), ("gemma3", 1), ("starcoder2", 0)])
def test_a_head_starts_from_the_factors_of_the_final_norm(family, less):
    """Gemma stores them less one; StarCoder2 has a layer norm with a bias, which the head's norm cannot hold."""
    target = target_of(family)
    head = tiny_head(target)
    head.start_from(target)
    torch.testing.assert_close(head.norm.weight, target.body.norm.weight + less, atol=1e-5, rtol=1e-5)


def test_attention_capping_is_kept():
    """Gemma 2's soft-capping exists in eager attention only; which attention a version of transformers chooses must not
    matter.
    """
    target = target_of("gemma2")
    assert target.model.config._attn_implementation == "eager"
    logits = plain(target, [3, 1, 4, 1, 5])[0]
    for layer in target.body.layers:
        layer.self_attn.attn_logit_softcapping = None
    assert (plain(target, [3, 1, 4, 1, 5])[0] - logits).abs().max() > 1e-3


REFUSED = {
    "chunked_attention, expected full_attention": lambda: hf.Llama4TextConfig(
        **SHAPE, head_dim=8, num_local_experts=2, intermediate_size_mlp=48
    ),
    "found bidirectional attention, expected causal": lambda: hf.Gemma3TextConfig(
        **SHAPE, head_dim=8, use_bidirectional_attention=True
    ),
    "found hidden states": lambda: hf.Gemma3nTextConfig(
        **SHAPE,
        head_dim=8,
        sliding_window=8,
        num_kv_shared_layers=2,
        hidden_size_per_layer_input=4,
        vocab_size_per_layer_input=61,
        laurel_rank=4,
        altup_num_inputs=2,
        activation_sparsity_pattern=[0.0] * 8,
    ),
    "found MiniMaxLightningAttention, a layer with a state": lambda: hf.MiniMaxConfig(**SHAPE, head_dim=8),
    "deepseek_v3 is not supported": lambda: hf.DeepseekV3Config(
        **{**SHAPE, "num_key_value_heads": 4},
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        moe_intermediate_size=24,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=8,
    ),
}


@pytest.mark.parametrize("message", REFUSED)
def test_targets_that_cannot_be_verified_as_trees_are_refused(message):
    model = model_of(REFUSED[message]())
    with pytest.raises(UserError, match=message) as caught:
        TextTarget(model, "tiny")
    assert "\n" not in str(caught.value)


def test_attention_without_masks_of_ones_own_is_refused():
    model = model_of(FAMILIES["llama"]())
    model.set_attn_implementation("flex_attention")
    with pytest.raises(UserError, match="found attention 'flex_attention', expected sdpa or eager"):
        TextTarget(model, "tiny")


def test_a_head_needs_a_rope_of_full_attention():
    config = FAMILIES["gemma3"]()
    del config.rope_parameters["full_attention"]
    with pytest.raises(UserError, match="expected one rope or one of full_attention"):
        Eagle3Config.for_target(config)
