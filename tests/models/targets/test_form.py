"""What a config alone says of a target: every family that cannot run is refused by its name, before any weights are
read and by whatever asks first; families whose rope no head can copy run, with a rope of the head's own.
"""

import json
import random
import re
import shutil
from pathlib import Path

import pytest
import torch
import transformers as hf
from packaging import version

from draftsmith.eval.decode import generate
from draftsmith.eval.sampling import Sampling
from draftsmith.models.chat import load_tokenizer
from draftsmith.models.drafters import HeadDrafter, NoDrafter
from draftsmith.models.errors import UserError
from draftsmith.models.formats import load_drafter, save_drafter
from draftsmith.models.grow import parse_tree
from draftsmith.models.heads import Eagle3Objective, EagleConfig, EagleHead
from draftsmith.models.heads.layer import check_rope
from draftsmith.models.notes import notes
from draftsmith.models.targets import TextTarget, describe, form
from draftsmith.models.targets.form import completed, context_length, small_model
from draftsmith.train.estimate import FEW_IDS, few_layers
from tests.conftest import pack, tiny_head
from tests.models.targets.test_recurrent import FAMILIES as RECURRENT
from tests.models.targets.test_targets import FAMILIES, REFUSED, SHAPE, model_of, prompts_of, rounds_error

LONG = {
    "rope_type": "longrope",
    "rope_theta": 100.0,
    "short_factor": [1.0, 1.5, 2.0, 2.5],
    "long_factor": [2.0, 3.0, 4.0, 5.0],
    "factor": 2.0,
    "original_max_position_embeddings": 128,
}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 100.0, "factor": 2.0}
PARTIAL = {"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 0.5}
OWN_ROPE = {
    "glm, half of a query": lambda: hf.GlmConfig(**SHAPE, head_dim=8, rope_parameters={**PARTIAL}),
    "stablelm, a quarter": lambda: hf.StableLmConfig(
        **{**SHAPE, "hidden_size": 64}, rope_parameters={**PARTIAL, "partial_rotary_factor": 0.25}
    ),
    "phi, biases everywhere": lambda: hf.PhiConfig(**SHAPE, rope_parameters={**PARTIAL}),
    "phi3, longrope": lambda: hf.Phi3Config(**SHAPE, original_max_position_embeddings=128, rope_parameters={**LONG}),
    "llama, longrope": lambda: hf.LlamaConfig(**SHAPE, rope_parameters={**LONG}),
    "llama, dynamic": lambda: hf.LlamaConfig(**SHAPE, rope_parameters={**DYNAMIC}),
    "qwen2, dynamic": lambda: hf.Qwen2Config(**SHAPE, rope_parameters={**DYNAMIC}),
    "llama, partial yarn": lambda: hf.LlamaConfig(
        **SHAPE,
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 100.0,
            "factor": 4.0,
            "original_max_position_embeddings": 64,
            "partial_rotary_factor": 1.0,
        },
    ),
}
COPIES = {"llama, partial yarn"}
SMALL = dict(vocab_size=61, hidden_size=32)
BY_NAME = {
    "gpt_neox": lambda: hf.GPTNeoXConfig(**SMALL, num_hidden_layers=8, num_attention_heads=4, intermediate_size=48),
    "bloom": lambda: hf.BloomConfig(**SMALL, n_layer=8, n_head=4),
    "gpt2": lambda: hf.GPT2Config(vocab_size=61, n_embd=32, n_layer=8, n_head=4),
    "opt": lambda: hf.OPTConfig(
        **SMALL, num_hidden_layers=8, num_attention_heads=4, ffn_dim=48, word_embed_proj_dim=32
    ),
    "falcon": lambda: hf.FalconConfig(**SMALL, num_hidden_layers=8, num_attention_heads=4),
    "mpt": lambda: hf.MptConfig(vocab_size=61, d_model=32, n_layers=8, n_heads=4),
    "gptj": lambda: hf.GPTJConfig(vocab_size=61, n_embd=32, n_layer=8, n_head=4, rotary_dim=4),
    "bert": lambda: hf.BertConfig(**SMALL, num_hidden_layers=8, num_attention_heads=4),
    "t5": lambda: hf.T5Config(vocab_size=61, d_model=32, num_layers=8, num_heads=4),
    "rwkv": lambda: hf.RwkvConfig(**SMALL, num_hidden_layers=8),
    "recurrent_gemma": lambda: hf.RecurrentGemmaConfig(**SMALL, num_hidden_layers=8),
    "minimax": lambda: hf.MiniMaxConfig(**SHAPE, head_dim=8),
    "gemma3n_text": REFUSED["found hidden states"],
}


def stored(config, folder):
    config.save_pretrained(folder)
    (folder / "model.safetensors").write_bytes(b"no weights are read")
    return folder


@pytest.mark.parametrize("family", BY_NAME)
def test_a_family_that_cannot_run_is_refused_by_its_name_before_weights_are_read(family, tmp_path):
    folder = stored(BY_NAME[family](), tmp_path)
    for look in (describe, TextTarget.load):
        with pytest.raises(UserError) as caught:
            look(folder)
        line = str(caught.value)
        assert line.startswith(f"target {folder}: ") and family in line and "\n" not in line, line


@pytest.mark.parametrize("message", REFUSED)
def test_what_the_checks_of_a_loaded_model_refuse_is_refused_by_its_config(message, tmp_path):
    folder = stored(REFUSED[message](), tmp_path)
    expected = "gemma3n_text is not supported" if message == "found hidden states" else message
    with pytest.raises(UserError, match=expected):
        describe(folder)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_small_model_can_be_made_of_every_family_that_runs(family):
    """With every kind of layer, heads of the same width, and no draw from the process's own random numbers."""
    config = FAMILIES[family]()
    torch.manual_seed(5)
    before = torch.get_rng_state()
    model = small_model(config)
    TextTarget.check(config, family)
    assert torch.equal(torch.get_rng_state(), before)
    kinds = set(getattr(config, "layer_types", None) or ())
    assert set(getattr(model.config, "layer_types", None) or ()) == kinds
    assert (
        model.get_decoder().layers[0].self_attn.head_dim == model_of(config).get_decoder().layers[0].self_attn.head_dim
    )


@pytest.mark.parametrize("family", RECURRENT)
def test_a_small_model_can_be_made_of_every_family_with_states(family):
    """Of the layers' own kinds, with groups of states where the target has them; what heads are made by is there even
    where the target has no attention.
    """
    config = RECURRENT[family]()
    model, found = small_model(config), completed(config)
    TextTarget.check(config, family)
    assert set(model.config.layer_types) == set(config.layer_types)
    assert [getattr(model.config, name, 2) for name in ("n_groups", "mamba_n_groups", "mamba_ngroups")] == [2, 2, 2]
    head = EagleConfig.for_target(found)
    assert head.num_attention_heads * head.head_dim == head.hidden_size or hasattr(config, "num_attention_heads")
    assert head.rope_parameters["rope_type"] == "default" and head.intermediate_size > 0


EVERY = FAMILIES | RECURRENT | OWN_ROPE


@pytest.mark.parametrize("family", EVERY)
def test_a_dry_run_times_the_first_layers_of_every_family_that_runs(family):
    """Whatever the config says of each layer, and whatever its special ids are."""
    config = completed(EVERY[family]().get_text_config())
    config.vocab_size += FEW_IDS
    config.pad_token_id = config.vocab_size - 1
    for layers in (1, 3):
        decoder = few_layers(config, layers, torch.device("cpu"), torch.float32)
        with torch.no_grad():
            found = decoder(input_ids=torch.zeros(1, 20, dtype=torch.int64), use_cache=False).last_hidden_state
        assert len(decoder.layers) == layers and found.shape == (1, 20, config.hidden_size)


SCALED = {
    "cohere": lambda: hf.CohereConfig(**SHAPE, logit_scale=0.0625),
    "cohere2": lambda: hf.Cohere2Config(**SHAPE, logit_scale=0.25, head_dim=8, sliding_window=8),
    "granite": lambda: hf.GraniteConfig(**SHAPE, logits_scaling=8.0, embedding_multiplier=3.0),
}


@pytest.mark.parametrize("family", SCALED)
def test_logits_are_scaled_as_the_config_says(family):
    """Behind the output head, in the probabilities that sampling and training go by; embeddings on the way in."""
    target = TextTarget(model_of(SCALED[family]()), family)
    assert target.scale == {"cohere": 0.0625, "cohere2": 0.25, "granite": 0.125}[family]
    assert target.shared.scale == {"granite": 3.0}.get(family, 1.0)
    assert rounds_error(target) < 2e-5


def test_a_config_of_values_that_have_no_meaning_is_one_line(tmp_path):
    folder = stored(FAMILIES["llama"](), tmp_path)
    text = (folder / "config.json").read_text()
    for old, new in (('"eos_token_id": 2', '"eos_token_id": "2"'), ('"hidden_size": 32', '"hidden_size": "wide"')):
        assert old in text
        (folder / "config.json").write_text(text.replace(old, new))
        with pytest.raises(UserError, match="cannot be loaded") as caught:
            describe(folder)
        assert "\n" not in str(caught.value)


def listed(part: str) -> list[str]:
    """The families that the README of the folder names there, as far as this version of transformers has them."""
    text = (Path(form.__file__).parent / "README.md").read_text("utf-8").split(f"**{part}**")[1].split("\n**")[0]
    rows = [line.split("|")[1] for line in text.splitlines() if line.startswith("| `")] or [text]
    names = [name for row in rows for name in re.findall(r"`([a-z0-9_]+)`", row.split(" with ")[0])]
    return [name for name in names if name in hf.CONFIG_MAPPING]


@pytest.mark.skipif(version.parse(hf.__version__) < version.parse("5.24"), reason="the lists are of transformers 5.24")
@pytest.mark.parametrize("part", ["Run", "Read", "Refused"])
def test_the_lists_of_families_are_what_the_checks_say(part):
    wrong = []
    for name in listed(part):
        config = hf.CONFIG_MAPPING[name]()
        try:
            TextTarget.check(config, name)
            found = "Run"
        except UserError as error:
            found = "Refused" if name in str(error) else f"{error}"
        if (found == "Run") != (part != "Refused") or found not in ("Run", "Refused"):
            wrong.append(f"{name}: {found}")
    assert not wrong and len(listed(part)) > 10, wrong


VALUES = [None, 0, -1, 2.5, "8", "", True, [], [[2]], {}, {"a": 1}, 10**9, float("nan")]
FILES = ("config.json", "generation_config.json", "tokenizer_config.json")


def test_targets_with_any_value_anywhere_are_described_or_refused_in_one_line(folder, tmp_path):
    target, rng = Path(shutil.copytree(folder / "target", tmp_path / "target")), random.Random(1)
    whole, described = {file: json.loads((target / file).read_text()) for file in FILES}, 0
    for _ in range(40):
        file = rng.choice(FILES)
        changed = dict(whole[file])
        for key in rng.sample([*changed, "layer_types", "rope_scaling", "auto_map", "suppress_tokens"], 2):
            changed[key] = rng.choice(VALUES)
        (target / file).write_text(json.dumps(changed))
        try:
            found, reader = describe(target), load_tokenizer(target)
            assert all("\n" not in line for line in notes(found, reader, "target"))
            described += 1
        except UserError as error:
            assert "\n" not in str(error)
        (target / file).write_text(json.dumps(whole[file]))
    assert 5 < described < 35


@pytest.mark.parametrize("family", OWN_ROPE)
def test_trees_are_verified_as_plain_forwards_whatever_the_rope(family):
    config = OWN_ROPE[family]()
    TextTarget.check(config, family)
    assert rounds_error(TextTarget(model_of(config), family)) < 2e-5


@pytest.mark.parametrize("family", OWN_ROPE)
def test_a_head_has_a_rope_of_its_own_where_it_cannot_copy(family, tmp_path):
    """Plain, with the target's base, as it is written to the drafter's config; it trains and changes no text."""
    target, prompts = TextTarget(model_of(OWN_ROPE[family]()), family), prompts_of(5, 19)
    head = tiny_head(target, 40)
    if family not in COPIES:
        assert head.config.rope_parameters == {"rope_type": "default", "rope_theta": 100.0}
        positions, half = torch.arange(90), head.config.head_dim // 2
        angle = positions[:, None] * 100.0 ** (-torch.arange(half) / half)
        cos, sin = head.angles(positions)
        torch.testing.assert_close(cos[:, 0, :half], angle.cos(), atol=1e-5, rtol=0)
        torch.testing.assert_close(sin[:, 0, half:], angle.sin(), atol=1e-5, rtol=0)
    again = load_drafter(save_drafter(head, tmp_path / "drafter", {}, torch.float32), target.shared, target.layers)
    assert again.config == head.config
    plain = [t.tokens for t in generate(target, NoDrafter(), prompts, Sampling(), 20)]
    drafted = generate(target, HeadDrafter(again, parse_tree("dynamic:4x3x10")), prompts, Sampling(), 20)
    assert [t.tokens for t in drafted] == plain
    loss, _ = head.loss(pack(target, head, prompts, [2, 3]), Eagle3Objective(steps=2, decay=0.8))
    loss.backward()
    assert torch.isfinite(loss) and all(p.grad.abs().sum() > 0 for p in head.parameters())
    assert EagleHead(EagleConfig.for_target(target.config), target.shared).config.rope_parameters["rope_theta"] == 100.0


@pytest.mark.parametrize("rope", [LONG, DYNAMIC, PARTIAL, {"rope_type": "proportional", "rope_theta": 1.0}])
def test_a_drafter_from_elsewhere_with_such_a_rope_is_refused(rope):
    with pytest.raises(UserError, match="rope_type: found|partial_rotary_factor: found"):
        check_rope(rope)


def test_a_longrope_is_used_up_to_its_original_length():
    """Behind it the frequencies of all rows change, those of kept keys and of short texts beside long ones not: there
    a text would depend on trees and batches.
    """
    config = OWN_ROPE["phi3, longrope"]()
    assert context_length(config) == 128 and context_length(OWN_ROPE["llama, dynamic"]()) == 256
    target = TextTarget(model_of(config), "longrope")
    assert target.context_length == 128
    prompt = prompts_of(124)[0]
    with torch.no_grad():
        inside = target.model(torch.tensor([prompt])).logits[0, -1]
        short, long = (target.model(torch.tensor([prompt + [5] * n])).logits[0, 123] for n in (4, 5))
    torch.testing.assert_close(short, inside, atol=1e-4, rtol=0)
    assert (long - inside).abs().max() > 0.01
    with pytest.raises(UserError, match="context 128"):
        generate(target, NoDrafter(), [prompt], Sampling(), 10)
