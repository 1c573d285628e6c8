"""Adapters as peft saves them: the same predictions as the merged drafter, all other tensors held once."""

import copy
import json

import pytest
import torch

from draftsmith.launch.drafters import Drafters, places, selected
from draftsmith.models.drafters import HeadDrafter
from draftsmith.models.errors import UserError
from draftsmith.models.formats import save_drafter
from draftsmith.models.formats.adapter import base_of, with_adapter
from draftsmith.models.heads.adapted import merged
from draftsmith.train.lora import Adapter
from draftsmith.train.recipe import Lora
from tests.conftest import tiny_head, tiny_target

MODULES = ["q_proj", "lm_head"]


@pytest.fixture(scope="module")
def adapted(tmp_path_factory):
    """(target, base drafter's directory, its head, directory of an adapter, what peft makes of both)."""
    target, place = tiny_target(), tmp_path_factory.mktemp("adapter")
    head = tiny_head(target)
    save_drafter(head, place / "base", {"target": "tiny"}, torch.float32)
    wrapped = copy.deepcopy(head)
    adapter = Adapter(wrapped, Lora(rank=4, alpha=8, modules=MODULES), str(place / "base"), 0)
    for name, parameter in wrapped.named_parameters():
        if ".lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    adapter.save(place / "adapter", adapter.state())
    return target, place / "base", head, place / "adapter", merged(wrapped)


def shared_bytes(heads):
    """Bytes of all tensors of some heads, those that they share counted once."""
    tensors = {x.data_ptr(): x for head in heads for x in (*head.parameters(), *head.buffers())}
    return sum(x.numel() * x.element_size() for x in tensors.values())


def test_an_adapted_head_is_the_merged_one(adapted):
    target, base, head, place, want = adapted
    before = {name: value.clone() for name, value in head.state_dict().items()}
    found = with_adapter(head, place)
    state = found.state_dict()
    assert all(torch.allclose(state[name], want[name], atol=1e-6) for name in want)
    changed = [name for name in before if not torch.equal(state[name], before[name])]
    assert sorted(changed) == ["lm_head.weight", "midlayer.self_attn.q_proj.weight"]
    assert all(torch.equal(value, before[name]) for name, value in head.state_dict().items())
    alone = shared_bytes([head])
    extra = sum(before[name].numel() * 4 for name in changed)
    assert shared_bytes([head, found]) == alone + extra


def test_methods_take_an_adapters_directory(adapted):
    """The base is loaded once; the adapter says which it is."""
    target, base, head, place, _ = adapted
    assert base_of(place) == str(base) and base_of(base) is None
    assert places(f"select:{place},{base}") == [str(base), str(base)]
    drafters = Drafters(target, "")
    pool = drafters.drafter(f"select:{place},{base},suffix:hedge")
    first, second = (pool.drafters[i] for i in (0, 1))
    assert isinstance(first, HeadDrafter) and isinstance(second, HeadDrafter)
    assert first.head.fc.weight.data_ptr() == second.head.fc.weight.data_ptr()
    assert first.head.lm_head.weight.data_ptr() != second.head.lm_head.weight.data_ptr()
    assert selected("a,b") == (["a", "b"], "normalhedge", False)
    assert selected("a,b,x:y:ucb1:lasting") == (["a", "b", "x:y"], "ucb1", True)
    for wrong in ("", "suffix", "suffix,suffix", "suffix:hedge"):
        with pytest.raises(UserError, match="select: found"):
            selected(wrong)


def test_what_does_not_fit_is_refused_by_name(adapted, tmp_path):
    target, base, head, place, _ = adapted
    with pytest.raises(UserError, match="found a change of .* x 32, expected .* x 48"):
        with_adapter(tiny_head(tiny_target(hidden_size=48, num_attention_heads=6)), place)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 4}))
    with pytest.raises(UserError, match="adapter_config.json: found no base_model_name_or_path"):
        base_of(tmp_path)
