"""The drafter directory: exact keys, shapes and dtypes, bit-identical reload, and one clear line for everything
else.
"""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from draftsmith.models.errors import UserError
from draftsmith.models.formats import fetch, from_pretrained, layout_for, load_drafter, save_drafter, store
from draftsmith.models.formats.layout import Serving
from tests.conftest import pack, tiny_head, tiny_target


@pytest.fixture
def saved(tmp_path, target, head):
    return save_drafter(head, tmp_path / "drafter", {"target": "tiny"})


@pytest.mark.parametrize("draft_vocab", [40, None])
def test_reload_gives_identical_logits(tmp_path, target, draft_vocab):
    head = tiny_head(target, draft_vocab)
    for parameter in head.parameters():  # what is stored is bf16
        parameter.data = parameter.data.to(torch.bfloat16).float()
    folder = save_drafter(head, tmp_path / "drafter", {"target": "tiny"})
    same_logits(target, head, load_drafter(folder, target.shared, target.layers))
    assert ("d2t" in load_file(folder / "model.safetensors")) == (draft_vocab is not None)


def test_directory_is_what_the_engines_read(saved, head, target):
    assert sorted(p.name for p in saved.iterdir()) == ["config.json", "draftsmith.json", "model.safetensors"]
    config, tensors = json.loads((saved / "config.json").read_text()), load_file(saved / "model.safetensors")
    n = target.layers
    assert (
        config["architectures"] == ["LlamaForCausalLMEagle3"]
        and config["model_type"] == "llama"
        and config["num_hidden_layers"] == 1
    )
    assert config["vocab_size"] == 61 and config["draft_vocab_size"] == 40 and config["tie_word_embeddings"] is False
    assert config["eagle_aux_hidden_state_layer_ids"] == [2, n // 2, n - 3]
    assert config["eagle_config"]["eagle_aux_hidden_state_layer_ids"] == [1, n // 2 - 1, n - 4]
    assert config["max_position_embeddings"] == target.context_length and config["rope_theta"] == 10000.0
    assert {k for k in tensors if not k.startswith("midlayer.")} == {
        "fc.weight",
        "norm.weight",
        "lm_head.weight",
        "d2t",
        "t2d",
    }
    assert (
        tensors["d2t"].dtype == torch.int64
        and tensors["t2d"].dtype == torch.bool
        and tensors["fc.weight"].dtype == torch.bfloat16
    )
    assert torch.equal(tensors["d2t"] + torch.arange(40), head.ids) and torch.equal(
        tensors["t2d"].nonzero().flatten(), head.ids
    )
    assert tensors["midlayer.self_attn.q_proj.weight"].shape == (32, 64)


def same_logits(target, head, again) -> None:
    features = pack(target, head, [[3, 1, 4, 1, 5, 9, 2, 6], [5, 3, 5, 8, 9, 7, 9]], [0, 2])
    for (rows, a), (same, b) in zip(head.unroll(features, 3), again.unroll(features, 3), strict=True):
        assert torch.equal(rows, same) and torch.equal(head.logits(a), again.logits(b))
    assert torch.equal(head.ids, again.ids)


SHAPES = [
    {"fc_norm": True, "norm_output": True},
    {"sliding_window": 4},
    {"fc_norm": True, "norm_output": True, "sliding_window": 3},
    {"candidate_rank": 6, "num_candidates": 5},
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("to", ["eagle3", "speculators"])
def test_what_is_not_plain_eagle3_is_stored_with_the_flags_that_engines_read(tmp_path, target, shape, to):
    """fc_norm, norm_output; a window as the type of the layer; the low-rank head's description; reload is exact."""
    head = tiny_head(target, None if "candidate_rank" in shape else 40, **shape)
    head.load_state_dict({name: value.to(torch.bfloat16).float() for name, value in head.state_dict().items()})
    if to == "speculators":
        if "candidate_rank" in shape:
            return
        serving = Serving("tiny", "LlamaForCausalLM", 3)
        folder = store(head, tmp_path / "drafter", layout_for(head, to), {}, torch.bfloat16, serving)
    else:
        folder = save_drafter(head, tmp_path / "drafter", {"target": "tiny"})
    same_logits(target, head, load_drafter(folder, target.shared, target.layers))
    config, tensors = json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")
    layer = config.get("transformer_layer_config", config)
    assert [config[name] for name in ("fc_norm", "norm_output")] == [shape.get("fc_norm", False)] * 2
    assert ("fc_norm.2.weight" in tensors) == shape.get("fc_norm", False)
    assert layer.get("sliding_window") == shape.get("sliding_window")
    assert layer.get("layer_types") == (["sliding_attention"] if "sliding_window" in shape else None)
    if "candidate_rank" in shape:
        assert config["efficient_lm_head_config"] == {"type": "low_rank", "rank": 6, "num_candidates": 5}
        assert tensors["efficient_lm_head.weight"].shape == (61, 6) and tensors["lm_head.weight"].shape == (61, 32)
        assert tensors["efficient_lm_head_down_proj.weight"].shape == (6, 32)


@pytest.mark.parametrize(
    ("shape", "engine", "message"),
    [
        ({"fc_norm": True}, "sglang", "fc_norm: found true, expected none"),
        ({"sliding_window": 4}, "sglang", "sliding_window: found 4, expected none"),
        ({"candidate_rank": 6, "num_candidates": 5}, "vllm", "candidate_rank: found 6, expected none"),
    ],
)
def test_an_engine_that_would_compute_something_else_is_refused(target, shape, engine, message):
    with pytest.raises(UserError, match=message):
        layout_for(tiny_head(target, **shape), engine)
    layout_for(tiny_head(target, 40), engine)


def change_tensors(change):
    def apply(folder):
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")

    return apply


def change_config(**changes):
    def apply(folder):
        config = json.loads((folder / "config.json").read_text())
        for key, value in changes.items():
            config.pop(key) if value is None else config.update({key: value})
        (folder / "config.json").write_text(json.dumps(config))

    return apply


def spell(rename):
    def change(tensors):
        for name in list(tensors):
            tensors[rename(name)] = tensors.pop(name)

    return change_tensors(change)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (change_tensors(lambda t: t.update(extra=torch.zeros(2))), "extra: unknown key"),
        (change_tensors(lambda t: t.update({"fc.bias": torch.zeros(32)})), "fc.bias: unknown key"),
        (change_tensors(lambda t: t.update({"fc_norm.0.weight": torch.zeros(32)})), "fc_norm.0.weight: unknown key"),
        (
            change_tensors(lambda t: [t.pop("fc.weight"), t.update(x=torch.zeros(1))]),
            "found 2 differences from the 15 expected keys: fc.weight: missing; x: unknown key",
        ),
        (
            change_tensors(lambda t: t.update({"norm.weight": torch.zeros(3)})),
            r"norm.weight: found \(3,\), expected \(32,\)",
        ),
        (
            change_tensors(lambda t: t.update({"norm.weight": torch.zeros(32, dtype=torch.int32)})),
            "norm.weight: found torch.int32, expected a floating",
        ),
        (change_tensors(lambda t: t.update(d2t=t["d2t"] + torch.arange(40))), "model.safetensors: d2t"),
        (change_tensors(lambda t: t.update(t2d=~t["t2d"])), "model.safetensors: t2d"),
        (change_tensors(lambda t: t.update(t2d=t["t2d"].long() * 2)), "t2d: found torch.int64, expected torch.bool"),
        (
            change_tensors(lambda t: t.update({"embed_tokens.weight": torch.zeros(61, 32)})),
            "embed_tokens.weight: 61 of 61 rows differ from the target's",
        ),
        (change_config(intermediate_size=None), "intermediate_size: missing"),
        (change_config(vocab_size=99), "vocab_size: found 99, expected the target's 61"),
        (change_config(hidden_size=64), "hidden_size: found 64, expected the target's 32"),
        (
            change_config(eagle_aux_hidden_state_layer_ids=[2, 3, 9], eagle_config=None),
            r"found \[2, 3, 9\], expected ascending numbers from 1 to 6",
        ),
        (change_config(eagle_aux_hidden_state_layer_ids=[3, 3, 4], eagle_config=None), "expected ascending"),
        (change_config(fc_norm=True), "fc_norm.0.weight: missing"),
        (change_config(norm_output="yes"), "norm_output: found 'yes', expected true or false"),
        (change_config(layer_types=["sliding_attention"]), "sliding_window: missing"),
        (change_config(efficient_lm_head_config={"type": "dense"}), "expected an object of type 'low_rank'"),
        (
            change_config(efficient_lm_head_config={"type": "low_rank", "rank": 4, "num_candidates": 8}),
            "draft_vocab_size: found 40, expected null",
        ),
        (change_config(norm_before_residual=True), "norm_before_residual: found True, expected false"),
        (change_config(target_hidden_size=64), "target_hidden_size: found 64, expected hidden_size 32"),
        (change_config(num_aux_hidden_states=4), "num_aux_hidden_states: found 4, expected 3"),
        (change_config(rope_theta=5.0), "rope_theta: found 5.0, expected rope_parameters' 10000.0"),
        (change_config(rope_parameters={"rope_theta": 10000.0, "mrope_section": [1, 1, 2]}), "mrope_section"),
        (lambda f: (f / "config.json").write_text("{"), "not valid JSON"),
        (lambda f: (f / "config.json").write_text("[]"), "found list, expected a JSON object"),
        (lambda f: (f / "draftsmith.json").write_text("{"), "draftsmith.json: not valid JSON"),
        (lambda f: (f / "model.safetensors").write_bytes(b"xx"), "cannot be read"),
        (lambda f: (f / "model.safetensors").unlink(), "model.safetensors is missing"),
        (
            lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"),
            "found pytorch_model.bin .a pickle., expected model.safetensors",
        ),
    ],
)
def test_damaged_directories_are_refused(saved, target, damage, message):
    damage(saved)
    with pytest.raises(UserError, match=message) as caught:
        load_drafter(saved, target.shared, target.layers)
    assert "\n" not in str(caught.value)


def test_every_missing_tensor_is_refused(saved, target):
    """Neither engine does that: the parameter stays uninitialised and the drafter is merely bad (formats.md 3.7 E)."""
    whole = load_file(saved / "model.safetensors")
    assert len(whole) == 15
    for name in whole:
        save_file({k: v for k, v in whole.items() if k != name}, saved / "model.safetensors")
        if name == "t2d":
            continue  # d2t says the same
        with pytest.raises(UserError, match=f"{name}: missing"):
            load_drafter(saved, target.shared, target.layers)


@pytest.mark.parametrize(
    "variant",
    [
        spell(
            lambda name: name.replace("midlayer.", "layers.0.")
        ),  # as ModelOpt and speculators write it, vLLM reads both
        spell(lambda name: f"model.{name}"),
        change_tensors(
            lambda t: t.update(
                {"midlayer.self_attn.rotary_emb.inv_freq": torch.zeros(4), "verifier_norm.weight": torch.zeros(32)}
            )
        ),
        change_config(architectures=["Eagle3LlamaForCausalLM"]),
        change_config(architectures=["LlamaForCausalLM"]),
        change_config(head_dim=None, eagle_config=None),
        change_config(rope_parameters=None),
        change_config(rope_parameters=None, rope_scaling={"type": "default"}),
        change_config(eagle_aux_hidden_state_layer_ids=None),  # only the outputs of layers are left
        change_config(eagle_aux_hidden_state_layer_ids=None, eagle_config=None),  # the engines' default
    ],
    ids=range(10),
)
def test_other_spellings_of_the_same_head_are_read(saved, head, target, variant):
    variant(saved)
    for parameter in head.parameters():
        parameter.data = parameter.data.to(torch.bfloat16).float()
    same_logits(target, head, load_drafter(saved, target.shared, target.layers))


def test_a_stored_embedding_is_accepted_where_it_is_the_targets(saved, head, target):
    change_tensors(lambda t: t.update({"embed_tokens.weight": target.embedding.detach().to(torch.bfloat16)}))(saved)
    load_drafter(saved, target.shared, target.layers)


def test_equal_vocabularies_need_no_mapping_and_an_identical_one_is_dropped(tmp_path, target):
    folder = save_drafter(tiny_head(target), tmp_path / "drafter", {})
    change_tensors(lambda t: t.update(d2t=torch.zeros(61, dtype=torch.int64), t2d=torch.ones(61, dtype=torch.bool)))(
        folder
    )
    assert torch.equal(load_drafter(folder, target.shared).ids, torch.arange(61))
    change_tensors(lambda t: t.update(d2t=torch.arange(61)))(folder)  # ids in place of offsets: id 2i
    with pytest.raises(UserError, match="d2t"):
        load_drafter(folder, target.shared)


def test_places_that_hold_no_drafter(tmp_path, target):
    for place, message in (
        (tmp_path / "none", "no such directory; expected a drafter directory, a Hub id"),
        ("bundled:drafters/none", "no such bundled"),
        (tmp_path, "config.json is missing"),
    ):
        with pytest.raises(UserError, match=message):
            load_drafter(place, target.shared)


def test_the_named_target_is_opened_when_none_is_given():
    head = from_pretrained("bundled:drafters/eagle3-code")
    assert head.embedding.shape == (4096, 128) and not head.training
    assert fetch("bundled:drafters/eagle3-code").name == "eagle3-code"


def test_failed_save_leaves_the_old_drafter(saved, target):
    before = (saved / "model.safetensors").read_bytes()
    broken = tiny_head(target, 40)
    broken.norm.weight = torch.nn.Parameter(torch.ones(3))
    with pytest.raises(UserError):
        save_drafter(broken, saved, {})
    assert (saved / "model.safetensors").read_bytes() == before and len(list(saved.parent.iterdir())) == 1


def test_saving_again_replaces(saved, target):
    other = tiny_head(tiny_target(), 40, seed=9)
    save_drafter(other, saved, {})
    assert torch.equal(load_drafter(saved, target.shared).fc.weight, other.fc.weight.to(torch.bfloat16).float())
