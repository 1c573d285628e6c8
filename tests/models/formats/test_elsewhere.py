"""Drafters from elsewhere: the tensors decide what a head is, harmless contradictions are mended and told, and what
cannot be decided is refused with the reason.
"""

import json
import random

import pytest
import torch
from safetensors.torch import load_file, save_file

from draftsmith.launch.export import export_drafter, import_drafter
from draftsmith.models.errors import UserError
from draftsmith.models.formats import layout_of, load_drafter, open_head, read_files, save_drafter
from draftsmith.models.formats.taps import NAME, tap_indices
from draftsmith.models.heads import EagleConfig, EagleHead
from tests.conftest import tiny_head
from tests.models.formats.test_formats import change_config, change_tensors


@pytest.fixture
def saved(tmp_path, target):
    """An EAGLE-3 head with 40 of 61 ids, and an EAGLE-1 head without bias."""
    save_drafter(tiny_head(target, 40), tmp_path / "eagle3", {"target": "none"}, torch.float32)
    torch.manual_seed(2)
    head = EagleHead(EagleConfig.for_target(target.config, bias=False), target.shared)
    save_drafter(head, tmp_path / "eagle", {"target": "none"}, torch.float32)
    return tmp_path


def opened(folder, target, **options):
    """(the head, what was told) of a directory."""
    told = []
    head = open_head(read_files(folder), target.shared, target.layers, tell=told.append, **options)
    assert all(line.startswith(f"{folder}: ") and "\n" not in line for line in told)
    return head, [line.removeprefix(f"{folder}: ") for line in told]


def same(a, b) -> None:
    for (name, x), (_, y) in zip(a.state_dict().items(), b.state_dict().items(), strict=True):
        assert torch.equal(x, y), name
    assert torch.equal(a.ids, b.ids) and a.config == b.config


def convert(name, dtype):
    return change_tensors(lambda t: t.update({name: t[name].to(dtype)}))


def both(*changes):
    return lambda folder: [change(folder) for change in changes]


FORTY = "num_hidden_layers: found 40, but the tensors are those of one layer"
HARMLESS = {  # of an EAGLE-3 head: the change, and what is told
    "the target's name": (
        change_config(architectures=["Qwen3ForCausalLM"]),
        ["architectures: found ['Qwen3ForCausalLM'], but the tensors are those of an EAGLE-3 head"],
    ),
    "another engine's name": (
        change_config(architectures=["Eagle3Qwen3ForCausalLM"]),
        ["architectures: found ['Eagle3Qwen3ForCausalLM'], but the tensors are those of an EAGLE-3 head"],
    ),
    "the name of an EAGLE-1 head": (
        change_config(architectures=["LlamaForCausalLMEagle"]),
        ["architectures: found ['LlamaForCausalLMEagle'], but the tensors are those of an EAGLE-3 head"],
    ),
    "no name": (
        change_config(architectures=None),
        ["architectures: found None, but the tensors are those of an EAGLE-3 head"],
    ),
    "a name that is no list": (
        change_config(architectures="LlamaForCausalLMEagle3"),
        ["architectures: found LlamaForCausalLMEagle3, but the tensors are those of an EAGLE-3 head"],
    ),
    "the target's layers": (change_config(num_hidden_layers=40), [FORTY]),
    "the target's name and layers": (change_config(architectures=["LlamaForCausalLM"], num_hidden_layers=40), [FORTY]),
    "a tie": (
        change_config(tie_word_embeddings=True),
        ["tie_word_embeddings: found true, but the head has an lm_head.weight of its own"],
    ),
    "no t2d": (change_tensors(lambda t: t.pop("t2d")), ["t2d: missing, made from d2t"]),
    "t2d of bytes": (convert("t2d", torch.uint8), ["t2d: found torch.uint8 of zeros and ones, read as torch.bool"]),
    "t2d of long": (convert("t2d", torch.int64), ["t2d: found torch.int64 of zeros and ones, read as torch.bool"]),
    "d2t of 32 bits": (convert("d2t", torch.int32), ["d2t: found torch.int32, read as torch.int64"]),
    "d2t of 16 bits alone": (
        both(convert("d2t", torch.int16), change_tensors(lambda t: t.pop("t2d"))),
        ["d2t: found torch.int16, read as torch.int64", "t2d: missing, made from d2t"],
    ),
    "no draft_vocab_size": (
        change_config(draft_vocab_size=None),
        ["draft_vocab_size: found None, but lm_head.weight has 40 rows"],
    ),
    "another draft_vocab_size": (
        change_config(draft_vocab_size=61),
        ["draft_vocab_size: found 61, but lm_head.weight has 40 rows"],
    ),
    "nothing of it": (
        both(
            change_config(architectures=["LlamaForCausalLM"], draft_vocab_size=None, num_hidden_layers=40),
            change_tensors(lambda t: t.pop("t2d")),
        ),
        [FORTY, "draft_vocab_size: found None, but lm_head.weight has 40 rows", "t2d: missing, made from d2t"],
    ),
}


@pytest.mark.parametrize("kind", HARMLESS)
def test_a_harmless_contradiction_is_mended_and_told(kind, saved, target):
    head = load_drafter(saved / "eagle3", target.shared, target.layers)
    change, expected = HARMLESS[kind]
    change(saved / "eagle3")
    again, told = opened(saved / "eagle3", target)
    same(head, again)
    assert told == expected


@pytest.mark.parametrize("layer_names", ["layers.0.", "model.layers.0.", "model.midlayer."])
@pytest.mark.parametrize("names", [["LlamaForCausalLM"], ["Qwen2ForCausalLM"], None])
def test_the_tensors_tell_eagle_3_from_eagle_1(names, layer_names, saved, target):
    three, one = (load_drafter(saved / name, target.shared, target.layers) for name in ("eagle3", "eagle"))
    for name, prefix in (("eagle3", "midlayer."), ("eagle", "layers.0.")):
        change_config(architectures=names, **({"draft_vocab_size": None} if name == "eagle3" else {}))(saved / name)
        file = saved / name / "model.safetensors"
        wanted = layer_names.replace("midlayer.", "layers.0.") if name == "eagle" else layer_names
        save_file({key.replace(prefix, wanted): value for key, value in load_file(file).items()}, file)
    same(three, opened(saved / "eagle3", target)[0])
    same(one, opened(saved / "eagle", target)[0])


EAGLE = {
    "the target's layers": (change_config(architectures=["LlamaForCausalLM"], num_hidden_layers=40), [FORTY]),
    "the target's name": (
        change_config(architectures=["Qwen2ForCausalLM"]),
        ["architectures: found ['Qwen2ForCausalLM'], but the tensors are those of an EAGLE-1 or EAGLE-2 head"],
    ),
    "no name": (
        change_config(architectures=None),
        ["architectures: found None, but the tensors are those of an EAGLE-1 or EAGLE-2 head"],
    ),
    "the name of an EAGLE-3 head": (
        change_config(architectures=["LlamaForCausalLMEagle3"], num_hidden_layers=40),
        [
            "architectures: found ['LlamaForCausalLMEagle3'], but the tensors are those of an EAGLE-1 or EAGLE-2 head",
            FORTY,
        ],
    ),
    "a name of vLLM's": (change_config(architectures=["LlamaForCausalLM"]), []),
}


@pytest.mark.parametrize("kind", EAGLE)
def test_a_harmless_contradiction_of_an_eagle_1_head_is_mended_and_told(kind, saved, target):
    head = load_drafter(saved / "eagle", target.shared)
    change, expected = EAGLE[kind]
    change(saved / "eagle")
    again, told = opened(saved / "eagle", target)
    same(head, again)
    assert told == expected


def test_a_speculators_directory_with_a_tie_in_its_layer_is_mended(saved, target, tmp_path):
    target.model.save_pretrained(tmp_path / "target")
    out = export_drafter(saved / "eagle3", tmp_path / "spec", "speculators", str(tmp_path / "target"))
    head, told = opened(out, target)
    assert told == []
    config = json.loads((out / "config.json").read_text())
    config["transformer_layer_config"] |= {"tie_word_embeddings": True, "num_hidden_layers": 40}
    (out / "config.json").write_text(json.dumps(config))
    convert("d2t", torch.int32)(out)
    again, told = opened(out, target)
    same(head, again)
    assert [line.split(":")[0] for line in told] == ["num_hidden_layers", "tie_word_embeddings", "d2t"]
    change_config(speculators_model_type="dflash")(out)
    with pytest.raises(UserError, match="found a speculators drafter of kind dflash"):
        layout_of(read_files(out))


def absolute(tensors):
    tensors["d2t"] = tensors["t2d"].nonzero().flatten()


UNDECIDED = {
    "offsets in bf16": (convert("d2t", torch.bfloat16), "d2t: found torch.bfloat16, .*above 256 are rounded in it"),
    "offsets in fp16": (convert("d2t", torch.float16), "d2t: found torch.float16, .*above 2048 are rounded"),
    "offsets in fp32": (convert("d2t", torch.float32), "d2t: found torch.float32, expected torch.int64"),
    "ids": (change_tensors(absolute), "d2t: found the target's ids themselves, expected offsets"),
    "ids of 32 bits": (
        both(change_tensors(absolute), convert("d2t", torch.int32)),
        "d2t: found the target's ids themselves, expected offsets",
    ),
    "ids in another order": (
        change_tensors(lambda t: (absolute(t), t.update(d2t=t["d2t"].flip(0)))),
        "d2t: found the target's ids themselves, expected offsets",
    ),
    "ids alone": (change_tensors(lambda t: (absolute(t), t.pop("t2d"))), "no t2d to tell"),
    "offsets of other ids": (
        change_tensors(lambda t: t.update(d2t=torch.arange(40) // 2)),
        "t2d: its ids differ from those of d2t",
    ),
    "offsets of no order alone": (
        change_tensors(lambda t: (t.update(d2t=t["d2t"].flip(0)), t.pop("t2d"))),
        "d2t: found numbers that are no offsets of ascending ids below 61, and no t2d",
    ),
    "no d2t": (change_tensors(lambda t: t.pop("d2t")), "d2t: missing"),
    "two layers": (
        both(
            change_config(num_hidden_layers=2),
            change_tensors(lambda t: t.update({"layers.1.mlp.up_proj.weight": torch.ones(48, 32)})),
        ),
        "num_hidden_layers: found 2, expected 1",
    ),
    "a tie without a head": (
        both(change_config(tie_word_embeddings=True), change_tensors(lambda t: t.pop("lm_head.weight"))),
        "tie_word_embeddings: found True, expected false",
    ),
    "norms of queries": (
        change_tensors(lambda t: t.update({"midlayer.self_attn.q_norm.weight": torch.ones(8)})),
        "midlayer.self_attn.q_norm.weight: unknown key",
    ),
    "two spellings": (
        change_tensors(lambda t: t.update({"layers.0.mlp.up_proj.weight": torch.ones(48, 32)})),
        "midlayer.mlp.up_proj.weight: found under two spellings",
    ),
    "two prefixes": (
        change_tensors(lambda t: t.update({"model.norm.weight": torch.ones(32)})),
        "norm.weight: found under two spellings",
    ),
    "a residual behind the norm": (change_config(norm_before_residual=True), "norm_before_residual: found True"),
}


@pytest.mark.parametrize("kind", UNDECIDED)
def test_what_cannot_be_decided_is_refused_with_the_reason(kind, saved, target):
    change, message = UNDECIDED[kind]
    change(saved / "eagle3")
    with pytest.raises(UserError, match=message) as caught:
        opened(saved / "eagle3", target)
    assert str(saved / "eagle3") in str(caught.value) and "\n" not in str(caught.value)


def test_ids_alone_that_would_pass_for_offsets_are_refused(tmp_path, target):
    """20 ids below 42: read as offsets they would be other ids below 61, in ascending order."""
    folder = save_drafter(tiny_head(target, 20), tmp_path / "drafter", {}, torch.float32)
    change_tensors(lambda t: (t.update(d2t=torch.arange(20) * 2), t.pop("t2d")))(folder)
    with pytest.raises(UserError, match="may be offsets or the target's ids themselves, and no t2d to tell"):
        opened(folder, target)


USUAL = {  # top level, eagle_config, layers -> indices into hidden_states, or what the refusal says; whether it is told
    "as we write them": ([2, 12, 21], [1, 11, 20], 24, (2, 12, 21), False),
    "as we write others": ([3, 5, 9], [2, 4, 8], 24, (3, 5, 9), False),
    "none": (None, None, 24, (2, 12, 21), False),
    "vLLM's alone": ([2, 12, 21], None, 24, (2, 12, 21), True),
    "vLLM's in eagle_config": (None, [2, 12, 21], 24, (2, 12, 21), True),
    "vLLM's in both": ([2, 12, 21], [2, 12, 21], 24, (2, 12, 21), True),
    "SGLang's in eagle_config": (None, [1, 11, 20], 24, (2, 12, 21), True),
    "SGLang's in both": ([1, 11, 20], [1, 11, 20], 24, (2, 12, 21), True),
    "SGLang's at vLLM's place": ([1, 11, 20], None, 24, "may be", True),
    "others at vLLM's place": ([4, 8, 9], None, 24, (4, 8, 9), True),
    "others in eagle_config": (None, [4, 8, 9], 24, "may be", True),
    "others in both": ([4, 8, 9], [4, 8, 9], 24, "may be", True),
    "two that contradict": ([2, 12, 21], [3, 13, 22], 24, "expected the same or one less", True),
    "the usual ones of another depth": (None, [2, 16, 29], 36, "may be", True),
    "the first output": (None, [0, 8, 9], 24, (1, 9, 10), True),
    "the last state": (None, [4, 8, 23], 24, (4, 8, 23), True),
    "of an unknown depth": (None, [2, 12, 21], None, (2, 12, 21), True),
    "SGLang's of an unknown depth": (None, [1, 11, 20], None, (2, 12, 21), True),
    "others of an unknown depth": (None, [4, 8, 9], None, "may be", True),
}


@pytest.mark.parametrize("kind", USUAL)
def test_the_two_conventions_for_tap_numbers_are_told_apart(kind):
    top, below, layers, expected, told = USUAL[kind]
    stored = {NAME: top, "eagle_config": {NAME: below}}
    if isinstance(expected, str):
        with pytest.raises(UserError, match=expected) as caught:
            tap_indices(stored, "here", layers)
        assert "--taps entering or --taps leaving decides" in str(caught.value)
    else:
        found, line = tap_indices(stored, "here", layers)
        assert found == expected and (line is not None) == told, line
    numbers = top or below
    if numbers and not (top and below and top != below and kind.startswith("as we")):
        assert tap_indices(stored, "here", layers, "entering")[0] == tuple(numbers)
        assert tap_indices(stored, "here", layers, "leaving")[0] == tuple(k + 1 for k in numbers)


def test_one_option_of_import_decides(saved, target, tmp_path):
    """And what it writes says both, so that nobody asks again."""
    target.model.save_pretrained(tmp_path / "target")
    change_config(**{NAME: None, "eagle_config": {NAME: [1, 2, 5]}})(saved / "eagle3")
    told = []
    with pytest.raises(UserError, match="--taps entering or --taps leaving decides"):
        import_drafter(str(saved / "eagle3"), tmp_path / "out", str(tmp_path / "target"))
    with pytest.raises(UserError, match="--taps: found both, expected entering or leaving"):
        import_drafter(str(saved / "eagle3"), tmp_path / "out", str(tmp_path / "target"), taps="both")
    assert not (tmp_path / "out").exists()
    for name, taps in (("entering", (1, 2, 5)), ("leaving", (2, 3, 6))):
        out = import_drafter(
            str(saved / "eagle3"), tmp_path / name, str(tmp_path / "target"), report=told.append, taps=name
        )
        head, again = opened(out, target)
        assert head.config.taps == taps and again == []
    assert "[1, 2, 5] are taken for outputs of layers (SGLang's numbers)" in "\n".join(told)


VALUES = [None, 0, -1, 3, 2.5, "8", "", True, [], [1], {}, {"a": 1}, 10**9, float("nan")]


def heads_of_changed_configs(folder, target, rounds: int, inside: float):
    """Heads of a directory with one or two entries of its config changed, every kind of value anywhere, each with its
    config; inside: how often an entry within a section is. What is not read is refused in one line.
    """
    config, rng, whole = json.loads((folder / "config.json").read_text()), random.Random(0), read_files(folder)
    for _ in range(rounds):
        changed = dict(config)
        for key in rng.sample(sorted(config), rng.choice([1, 2])):
            changed[key] = rng.choice(VALUES)
            if isinstance(config[key], dict) and rng.random() < inside:
                changed[key] = config[key] | {rng.choice(sorted(config[key])): rng.choice(VALUES)}
        stored = type(whole)(whole.folder, changed, whole.tensors, whole.about)
        try:
            yield open_head(stored, target.shared, target.layers, tell=lambda line: None), changed
        except UserError as error:
            assert "\n" not in str(error)


@pytest.mark.parametrize("name", ["eagle3", "eagle"])
def test_configs_with_any_value_anywhere_are_read_or_refused_in_one_line(name, saved, target):
    """One or two entries of a good config, of every kind of value; what is read has the widths of the tensors."""
    read = 0
    for head, changed in heads_of_changed_configs(saved / name, target, 400, 0.7):
        read += 1
        assert head.config.hidden_size == 32 and head.config.vocab_size == 61, changed
        assert head.config.num_attention_heads * head.config.head_dim == 32, changed
    assert 20 < read < 380


@pytest.mark.parametrize("content", [[1, 2], {"fc.weight": [1.0]}, {"state_dict": {"fc.weight": torch.ones(2)}}, 3])
def test_a_pickle_that_holds_no_tensors_by_name_is_refused(content, saved):
    (saved / "eagle3" / "model.safetensors").unlink()
    torch.save(content, saved / "eagle3" / "pytorch_model.bin")
    with pytest.raises(UserError, match="expected a tensor|cannot be read"):
        read_files(saved / "eagle3", pickle=True)
