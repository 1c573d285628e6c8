"""The models that the repository ships: they load like any other, their sizes are as promised, and decoding with the
drafter changes nothing.
"""

import json
from pathlib import Path

import pytest

from draftsmith.eval.measurement.baselines import Generate
from draftsmith.eval.measurement.measure import Looped, decode_batches, interleaved, tau
from draftsmith.eval.measurement.prompts import read_prompts
from draftsmith.eval.sampling import Sampling
from draftsmith.launch.methods import bundled
from draftsmith.models.chat import load_tokenizer, stop_ids
from draftsmith.models.drafters import HeadDrafter, NoDrafter
from draftsmith.models.drafters.lookup import LookupDrafter
from draftsmith.models.formats import layout_of, load_drafter, open_head, read_files
from draftsmith.models.formats.eagle3 import FLAGS
from draftsmith.models.grow import parse_tree
from draftsmith.models.rendering import Renderer
from draftsmith.models.targets import TextTarget, locate


@pytest.fixture(scope="module")
def code():
    target, tokenizer = TextTarget.load("bundled:targets/code"), load_tokenizer("bundled:targets/code")
    head = load_drafter(locate("bundled:drafters/eagle3-code"), target.shared, target.layers)
    prompts = [p.tokens for p in read_prompts(bundled("bundled:prompts/code.jsonl"), tokenizer)]
    return target, tokenizer, head, prompts


def test_sizes_and_prompts(code):
    target, tokenizer, _, prompts = code
    assert Path(locate("bundled:targets/code"), "model.safetensors").stat().st_size <= 12e6
    assert Path(locate("bundled:drafters/eagle3-code"), "model.safetensors").stat().st_size <= 6e6
    assert target.layers >= 20 and target.config.head_dim == 32 and target.vocab_size == len(tokenizer) == 4096
    assert len(prompts) >= 64 and max(map(len, prompts)) < 200
    manifest = json.loads(Path(locate("bundled:targets/code"), "corpus.json").read_text())
    assert manifest["python"]["licence"] == "PSF-2.0" and all("GPL" not in p["licence"] for p in manifest.values())


@pytest.mark.parametrize(
    "place", sorted(Path(locate("bundled:drafters")).glob("*/config.json")), ids=lambda p: p.parent.name
)
def test_configs_are_written_byte_for_byte_as_they_are_shipped(place):
    """But for the flags of EAGLE-3.1, which older ones do not have."""
    stored = read_files(place.parent)
    config, _ = layout_of(stored).write(open_head(stored, stored.shared()), stored.dtype, None)
    config = {name: value for name, value in config.items() if name in stored.config or name not in FLAGS}
    assert json.dumps(config, indent=2) + "\n" == place.read_text()


def test_template_marks_the_answer_and_its_end(code):
    _, tokenizer, _, _ = code
    talk = [{"role": "user", "content": "def f():"}, {"role": "assistant", "content": "    pass"}]
    ((ids, mask),) = Renderer(tokenizer).encode(talk, None, {2}).rows
    assert tokenizer.decode([t for t, m in zip(ids, mask) if m]) == "    pass<|end|>"
    assert tokenizer.decode(tokenizer("é ∑ 漢\t\n")["input_ids"]) == "é ∑ 漢\t\n"


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(1.0, seed=1)], ids=["T=0", "T=1"])
@pytest.mark.parametrize("tree", ["chain:4", "dynamic:6x4x16"])
def test_shipped_drafter_is_lossless_and_useful(code, sampling, tree):
    target, tokenizer, head, prompts = code
    stops = stop_ids(target, tokenizer)
    plain = decode_batches(target, NoDrafter(), prompts[:8], sampling, 48, stops, 4)
    drafted = decode_batches(target, HeadDrafter(head, parse_tree(tree)), prompts[:8], sampling, 48, stops, 3)
    assert [t.tokens for t in drafted] == [t.tokens for t in plain]
    assert tau(drafted) > (1.8 if sampling.temperature == 0 else 1.2)


@pytest.mark.parametrize("name", ["eagle-code", "hass-code"])
def test_shipped_eagle_heads_are_small_lossless_and_useful(code, name):
    target, tokenizer, _, prompts = code
    place, stops = Path(locate(f"bundled:drafters/{name}")), stop_ids(target, tokenizer)
    assert (place / "model.safetensors").stat().st_size <= 2e6
    drafter = HeadDrafter(load_drafter(place, target.shared, target.layers), parse_tree("dynamic:6x4x16"))
    plain = decode_batches(target, NoDrafter(), prompts[:8], Sampling(), 48, stops, 4)
    drafted = decode_batches(target, drafter, prompts[:8], Sampling(), 48, stops, 3)
    assert [t.tokens for t in drafted] == [t.tokens for t in plain] and tau(drafted) > 1.8, tau(drafted)


def test_code_mini_is_a_small_assistant_of_code_that_changes_no_text(code):
    target, tokenizer, _, prompts = code
    place = Path(locate("bundled:targets/code-mini"))
    assert (place / "model.safetensors").stat().st_size <= 1.5e6
    assert json.loads((place / "tokenizer.json").read_text()) == json.loads(
        (Path(locate("bundled:targets/code")) / "tokenizer.json").read_text()
    )
    mini, stops = TextTarget.load("bundled:targets/code-mini"), stop_ids(target, tokenizer)
    assert mini.layers == 2 and mini.vocab_size == target.vocab_size
    decoders = {
        "plain": Looped(target, NoDrafter()),
        "lookup": Looped(target, LookupDrafter()),
        "assisted": Generate(target, assistant=mini),
    }
    runs = interleaved(decoders, prompts[:4], Sampling(), 48, stops)
    assert (
        [t.tokens for t in runs["assisted"].traces]
        == [t.tokens for t in runs["plain"].traces]
        == [t.tokens for t in runs["lookup"].traces]
    )
    assert tau(runs["assisted"].traces) > 1.3, tau(runs["assisted"].traces)
