"""The shapes of the reference targets: what is trained is verified as trees by the sessions of `models/targets`; depth
grows without a change of what is computed.
"""

import pytest
import torch
import yaml
from pydantic import ValidationError

from draftsmith.eval.decode import generate
from draftsmith.eval.sampling import Sampling
from draftsmith.models.drafters import NoDrafter
from draftsmith.models.drafters.lookup import LookupDrafter
from draftsmith.models.targets import TextTarget
from draftsmith.train.optimizers import MuonAdamW
from draftsmith.train.recipe import read_recipe
from draftsmith.train.reference.architecture import Architecture, grow, random_model
from draftsmith.train.reference.pretrain import Stage, TargetRecipe, language_loss, pretrain
from draftsmith.train.reference.pretraining_run import Optimizer, make_optimizer
from tests.conftest import ROOT

ATTENTION = dict(
    intermediate_size=48,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=64,
    rope_theta=10000.0,
)
STATES = dict(heads=4, head_dim=16, groups=2, size=8)
SHAPES = {
    "llama": dict(ATTENTION),
    "hybrid": ATTENTION | {"states": STATES},
    "mamba2": {"states": STATES},
}


def shape(family: str) -> Architecture:
    return Architecture(family=family, vocab_size=61, hidden_size=32, **SHAPES[family])


@pytest.mark.parametrize("family", SHAPES)
def test_every_family_learns_and_grows_without_a_change(family):
    torch.manual_seed(0)
    model, rows = random_model(shape(family).config(4)), torch.randint(3, 61, (2, 17))
    optimizer: MuonAdamW = make_optimizer(model, Optimizer(muon_lr=0.02, adam_lr=0.01, warmup=1, decay=1.0, clip=1.0))
    losses = []
    for _ in range(6):
        loss = language_loss(model, rows)
        loss.backward()
        assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.5
    grown, tokens = grow(model, 8), rows[:1, :9]
    torch.testing.assert_close(grown(tokens).logits, model(tokens).logits, atol=1e-5, rtol=0)
    if family == "hybrid":
        assert grown.config.layer_types == ["linear_attention"] * 6 + ["full_attention"] * 2
    TextTarget(grown, family)
    with pytest.raises(ValueError, match="not a multiple"):
        grow(model, 6)


@pytest.mark.parametrize("family, missing", [("llama", "rope_theta"), ("hybrid", "states"), ("mamba2", "states")])
def test_a_shape_without_what_its_family_needs_is_refused(family, missing):
    with pytest.raises(ValidationError, match=f"{missing}: found none, expected a value for {family}"):
        Architecture(family=family, vocab_size=61, hidden_size=32, **(SHAPES[family] | {missing: None}))
    with pytest.raises(ValidationError, match="states: found .*, expected none for llama"):
        Architecture(family="llama", vocab_size=61, hidden_size=32, **ATTENTION, states=STATES)


@pytest.mark.parametrize("name, layers, most", [("code-hybrid", 8, 12e6), ("code-mamba2", 12, 12e6)])
def test_the_recipes_of_recurrent_targets_are_those_of_code(name, layers, most):
    recipe = read_recipe(ROOT / "recipes" / "targets" / f"{name}.yaml", TargetRecipe, [])
    code = yaml.safe_load((ROOT / "recipes" / "targets" / "code.yaml").read_text())
    assert recipe.corpus.model_dump() == code["corpus"] and recipe.tokenizer == "bundled:targets/code"
    with torch.device("meta"):
        model = random_model(recipe.model.config(recipe.stages[-1].layers))
    assert model.config.num_hidden_layers == layers >= 7
    size = 2 * sum(p.numel() for p in model.parameters())
    assert size < most, size


@pytest.mark.parametrize("name", ["code-hybrid", "code-mamba2"])
def test_a_tiny_run_ends_in_a_target_that_is_loaded_and_decoded(name, tmp_path):
    recipe = read_recipe(ROOT / "recipes" / "targets" / f"{name}.yaml", TargetRecipe, [f"output={tmp_path}/made"])
    corpus = recipe.corpus.model_copy(update={"packages": ["pluggy"], "held_out": 0.4})
    family = recipe.model.family
    model = Architecture(family=family, vocab_size=400, hidden_size=32, **SHAPES[family])
    stages = [Stage(layers=layers, length=32, batch=2, tokens=192) for layers in (4, 8)]
    changes = {"corpus": corpus, "model": model, "stages": stages, "tokenizer": None}
    place = pretrain(recipe.model_copy(update=changes), log=lambda line: None)
    target = TextTarget.load(place)
    assert target.layers == 8 and target.stateful and not target.by_level
    (trace,) = generate(target, LookupDrafter(4), [[1, 3, 50, 60, 50]], Sampling(), 6)
    assert trace.tokens == generate(target, NoDrafter(), [[1, 3, 50, 60, 50]], Sampling(), 6)[0].tokens
