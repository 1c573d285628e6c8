"""Directories of HiViS, DREAM and OWL heads from elsewhere: mended, told, or refused, as those of EAGLE are."""

import pytest
import torch

from draftsmith.models.errors import UserError
from draftsmith.models.formats import load_drafter, save_drafter
from tests.models.formats.test_elsewhere import FORTY, both, heads_of_changed_configs, opened, same
from tests.models.formats.test_formats import change_config, change_tensors
from tests.models.heads.test_dream import dream_head
from tests.models.heads.test_hivis import hivis_head
from tests.models.heads.test_owl import tiny_owl

HEADS = {"hivis": hivis_head, "dream": dream_head, "owl": tiny_owl}


@pytest.fixture
def saved(tmp_path, target):
    for name, make in HEADS.items():
        save_drafter(make(target), tmp_path / name, {"target": "none"}, torch.float32)
    return tmp_path


def prefixed(prefix):
    return change_tensors(lambda t: [t.update({f"{prefix}{name}": t.pop(name)}) for name in list(t)])


def copies(tensors):
    tensors |= {f"{gate}_emb.0.weight": tensors["forget_emb.0.weight"].clone() for gate in ("input", "cell", "output")}
    tensors |= {f"head.{i}.weight": tensors["head.0.weight"].clone() for i in (1, 2, 3)}


def named(found, kind):
    return [f"architectures: found {found}, but the tensors are those of {kind}"]


HIVIS, DREAM = "a HiViS head", "a DREAM head"
HARMLESS = {
    "hivis, the target's name": ("hivis", change_config(architectures=["LlamaForCausalLM"]), ["LlamaForCausalLM"]),
    "hivis, no name": ("hivis", change_config(architectures=None), None),
    "dream, the target's name": ("dream", change_config(architectures=["LlavaLlama"]), ["LlavaLlama"]),
    "dream, no name": ("dream", change_config(architectures=None), None),
}


@pytest.mark.parametrize(("kind", "change", "found"), HARMLESS.values(), ids=HARMLESS)
def test_the_tensors_tell_what_a_head_is(kind, change, found, saved, target):
    head = load_drafter(saved / kind, target.shared)
    both(change, prefixed("model."))(saved / kind)
    again, told = opened(saved / kind, target)
    same(head, again)
    assert told == named(found, {"hivis": HIVIS, "dream": DREAM}[kind])


def test_a_hivis_head_with_the_targets_layers_and_the_older_name_of_its_vectors(saved, target):
    head = load_drafter(saved / "hivis", target.shared)
    rename = change_tensors(lambda t: t.update(adaptive_embedding=t.pop("residual")))
    both(change_config(num_hidden_layers=40), rename)(saved / "hivis")
    again, told = opened(saved / "hivis", target)
    same(head, again)
    assert told == [FORTY]
    change_tensors(lambda t: t.update(residual=torch.zeros(3, 32)))(saved / "hivis")
    with pytest.raises(UserError, match="residual: found under two spellings"):
        opened(saved / "hivis", target)


def contradicted(key, found, says):
    return [f"{key}: found {found!r}, but the tensors are those of {says}"]


OWL = {
    "no kind": (change_config(model_type="llama"), contradicted("model_type", "llama", "a speculator")),
    "another method": (change_config(method="sum_rnn"), contradicted("method", "sum_rnn", "an LSTM")),
    "another width": (change_config(inner_dim="24.12"), contradicted("inner_dim", "24.12", "width 24")),
    "a narrow embedding": (change_config(emb_dim=12), contradicted("emb_dim", 12, "width 24")),
    "no width": (change_config(proj_dim=None), contradicted("proj_dim", None, "width 24")),
    "no ties": (
        change_config(tie_weights=False, tie_lstm_embs=None),
        contradicted("tie_weights", False, "output heads that are tied")
        + contradicted("tie_lstm_embs", None, "embeddings that are tied"),
    ),
    "other steps": (
        both(change_config(n_predict=7), change_tensors(copies)),
        contradicted("n_predict", 7, "4 steps"),
    ),
    "steps of the copies alone": (
        both(change_config(n_predict=None), change_tensors(copies)),
        contradicted("n_predict", None, "4 steps"),
    ),
    "a prefix": (both(prefixed("speculator."), prefixed("model.")), []),
}


@pytest.mark.parametrize(("change", "expected"), OWL.values(), ids=OWL)
def test_an_owl_head_is_what_its_tensors_are(change, expected, saved, target):
    head = load_drafter(saved / "owl", target.shared)
    change(saved / "owl")
    again, told = opened(saved / "owl", target)
    same(head, again)
    assert told == expected


@pytest.mark.parametrize("name", HEADS)
def test_configs_with_any_value_anywhere_are_read_or_refused_in_one_line(name, saved, target):
    """As those of EAGLE heads; what is read computes with the widths of its tensors."""
    read = 0
    for head, _ in heads_of_changed_configs(saved / name, target, 300, 0.0):
        read += 1
        assert all(value.dtype == torch.float32 for value in head.state_dict().values())
    assert 10 < read < 290
