"""Vision-language targets of every supported family: decoding, and what training features say of images, equal the
model's own plain forward.

Tiny random models in fp32 (tests/tiny_vision.py). Prefill chunks are six rows, so that they fall inside images; the
window of Gemma 3 is eight.
"""

from itertools import accumulate

import pytest
import torch
import transformers as hf

from draftsmith.eval.decode import generate
from draftsmith.eval.sampling import Sampling
from draftsmith.models.drafters import HeadDrafter, NoDrafter
from draftsmith.models.errors import UserError
from draftsmith.models.features import FeatureSpec, Middle, Packing
from draftsmith.models.grow import parse_tree
from draftsmith.models.targets import ImagePrompt, TextTarget, session
from draftsmith.models.tree import DraftTree
from draftsmith.train.data import Rows
from draftsmith.train.features import Cached
from tests.conftest import tiny_head, tiny_target
from tests.tiny_vision import CONFIGS, END, IMAGE, START, document, pictures, plain, tiny_vision

TAPS = (0, 2, 5, "last")
every_family = pytest.mark.parametrize("family", CONFIGS)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(session, "PREFILL_ROWS", 6)


def prompts_of(family) -> list[ImagePrompt | list[int]]:
    """Ragged, with one, two and no images; the first begins with one."""
    return [
        ImagePrompt(*document(family, [0, 7], 1)),
        ImagePrompt(*document(family, [3, 5, 4], 2, wide=True)),
        document(family, [9], 3)[0],
    ]


def own(target, ids, images):
    """The model's own forward: logits [S, V] and the tapped states [S, taps * h]."""
    out = plain(target.model, list(ids), images, output_hidden_states=True)
    return out.logits[0], torch.cat([out.hidden_states[-1 if k == "last" else k][0] for k in TAPS], -1)


def images_of(prompt) -> dict:
    return getattr(prompt, "images", {})


def tree_of(batch: int, seed: int) -> DraftTree:
    """Seven nodes, two branches that part twice."""
    draw = torch.Generator().manual_seed(seed)
    parents = torch.tensor([[-1, 0, 0, 1, 1, 2, 3]]).expand(batch, -1)
    return DraftTree.of(torch.randint(3, 50, (batch, 7), generator=draw), parents)


def path_to(tree: DraftTree, node: int) -> list[int]:
    path = []
    while node >= 0:
        path.insert(0, node)
        node = int(tree.parents[0, node])
    return path


@every_family
def test_trees_are_verified_as_plain_forwards_over_their_paths(family):
    """Three rounds over a ragged batch, one request leaving after the first; prompts' features and places too."""
    target, prompts = tiny_vision(family), prompts_of(family)
    decoding = target.open(FeatureSpec(TAPS), len(prompts), 8)
    prefill = decoding.prefill(prompts)
    for row, prompt in enumerate(prompts):
        logits, hidden = own(target, prompt, images_of(prompt))
        torch.testing.assert_close(prefill.logits[row], logits[-1], atol=3e-5, rtol=0)
        torch.testing.assert_close(prefill.features.hidden[row, : len(prompt)], hidden, atol=3e-5, rtol=0)
        assert prefill.features.positions[row, : len(prompt)].tolist() == list(range(len(prompt)))
        assert prefill.features.visual[row].tolist() == [
            i < len(prompt) and prompt[i] == IMAGE for i in range(len(prefill.features.visual[row]))
        ]
    texts = list(prompts)
    for seed in range(3):
        tree = tree_of(len(texts), seed)
        verified = decoding.verify(tree)
        for row, text_ in enumerate(texts):
            for leaf in (4, 5, 6):
                path = path_to(tree, leaf)
                logits, hidden = own(target, list(text_) + tree.tokens[row, path].tolist(), images_of(text_))
                torch.testing.assert_close(verified.logits[row, path], logits[-len(path) :], atol=3e-5, rtol=0)
                torch.testing.assert_close(verified.hidden[row, path], hidden[-len(path) :], atol=3e-5, rtol=0)
        path = torch.tensor([[0, 1, 3, 6], [0, 2, 5, 5], [0, 0, 0, 0]])[: len(texts)]
        counts = torch.tensor([4, 3, 1])[: len(texts)]
        committed = verified.features(tree, path, counts)
        assert committed.positions[:, 0].tolist() == [len(t) for t in texts] and not committed.visual.any()
        decoding.commit(path, counts)
        texts = [t + tree.tokens[row, path[row, :n]].tolist() for row, (t, n) in enumerate(zip(texts, counts.tolist()))]
        if seed == 0:
            decoding.select(torch.tensor([1, 0]))
            texts = [texts[1], texts[0]]


@every_family
def test_greedy_decoding_equals_generate_of_transformers(family):
    """Plain, and through trees of a random EAGLE-3 head that sees visual tokens."""
    target, prompts = tiny_vision(family), prompts_of(family)
    kinds = {"qwen2_5_vl": "mm_token_type_ids", "gemma3": "token_type_ids"}.get(family)
    want = []
    for p in prompts:
        ids = torch.tensor([list(p)])
        options = {kinds: (ids == IMAGE).long()} if kinds else {}
        want.append(
            target.model.generate(
                ids,
                **images_of(p),
                **options,
                max_new_tokens=20,
                do_sample=False,
                eos_token_id=7,
                pad_token_id=0,
                attention_mask=torch.ones_like(ids),
            )[0, len(p) :].tolist()
        )
    for drafter in (NoDrafter(), HeadDrafter(tiny_head(target, 40), parse_tree("dynamic:4x3x10"))):
        assert [t.tokens for t in generate(target, drafter, prompts, Sampling(), 20, {7})] == want


def packed(family, target, spec, seeds=(1, 2, 3)):
    """Training features of three documents with one, two and no images, and the documents; the target wrote all but the
    prompts.
    """
    documents = [(list(p), images_of(p)) for p in prompts_of(family)]
    starts = [len(ids) for ids, _ in documents]
    answers = [torch.randint(3, 50, (6,), generator=torch.Generator().manual_seed(s)).tolist() for s in seeds]
    documents = [(ids + answer, images) for (ids, images), answer in zip(documents, answers)]
    mask = torch.cat([torch.arange(len(ids)) >= start for (ids, _), start in zip(documents, starts)])
    packing = Packing((0, *accumulate(len(ids) for ids, _ in documents)), mask)
    tokens = torch.tensor([token for ids, _ in documents for token in ids])
    return target.features(tokens, packing, spec, [images for _, images in documents]), documents, packing


@every_family
def test_tap_0_is_what_the_decoder_takes_in(family):
    """Text: the shared embedding times its scale; pieces of images: something else, which follows the pixels."""
    target, ids = tiny_vision(family), document(family, [3, 5])[0]
    first, other = [
        target.open(FeatureSpec((0,)), 1, 8).prefill([ImagePrompt(ids, pictures(family, 1, seed))]).features
        for seed in (1, 2)
    ]
    words = target.embedding[torch.tensor(ids)] * target.shared.scale
    same = (first.hidden[0] - words).abs().amax(-1) < 1e-5
    assert same.tolist() == [token != IMAGE for token in ids]
    moved = (first.hidden[0] - other.hidden[0]).abs().amax(-1) > 1e-3
    still = [token == IMAGE and not m for token, m in zip(ids, moved.tolist())]
    assert not moved[torch.tensor(ids) != IMAGE].any() and sum(still) == (
        2 if family == "llava_next" else 0
    )  # its marks of line ends are learnt


@every_family
def test_pixels_change_the_features_of_text_behind_them(family):
    target, (ids, images) = tiny_vision(family), document(family, [3, 5])
    other = images | {"pixel_values": images["pixel_values"].flip(-1)}
    spec = FeatureSpec(("last",), rows="text")
    first, second = [
        target.open(spec, 1, 8).prefill([ImagePrompt(ids, seen)]).features.hidden[0] for seen in (images, other)
    ]
    changed = (first - second).abs().amax(-1)
    assert (changed[:3] == 0).all() and (changed[-5:] > 1e-3).all()


@every_family
def test_text_rows_are_the_rows_of_all_less_the_visual_ones_in_decoding_and_training(family):
    """Places stay those in the whole sequence; markers go too where they are named; what the target wrote stays,
    whatever its id.
    """
    target, prompts = tiny_vision(family), prompts_of(family)
    drop = (START, END)
    everything = target.open(FeatureSpec(TAPS), 3, 8).prefill(prompts).features
    kept = target.open(FeatureSpec(TAPS, rows="text", drop_ids=drop), 3, 8).prefill(prompts).features
    for row, prompt in enumerate(prompts):
        places, count = [i for i, token in enumerate(prompt) if token not in (IMAGE, *drop)], int(kept.lengths[row])
        assert kept.positions[row, :count].tolist() == places
        assert kept.tokens[row, :count].tolist() == [prompt[i] for i in places]
        assert torch.equal(kept.hidden[row, :count], everything.hidden[row, places])
    assert not kept.visual.any()

    features, documents, packing = packed(family, target, FeatureSpec(TAPS, rows="text", drop_ids=(START, END, 30)))
    whole, _, _ = packed(family, target, FeatureSpec(TAPS))
    rows = torch.tensor(
        [i for i, token in enumerate(whole.tokens.tolist()) if packing.mask[i] or token not in (IMAGE, START, END, 30)]
    )
    assert torch.equal(features.tokens, whole.tokens[rows]) and torch.equal(features.hidden, whole.hidden[rows])
    assert torch.equal(features.positions, packing.positions[rows]) and torch.equal(
        features.packing.mask, packing.mask[rows]
    )
    assert torch.equal(features.teacher.final, whole.teacher.final)  # answers are never hidden
    assert features.packing.positions.tolist() == [
        i for n in torch.tensor(features.packing.borders).diff().tolist() for i in range(n)
    ]
    prompt = packed(family, target, FeatureSpec(TAPS, rows="text", drop_ids=drop))[0]
    assert torch.equal(
        prompt.positions[prompt.packing.borders[1] :][: int(kept.lengths[1])], kept.positions[1, : int(kept.lengths[1])]
    )


@every_family
def test_columns_and_the_middle_are_the_same_in_training_and_decoding_and_as_eager_attention_has_them(family):
    target = tiny_vision(family)
    spec = FeatureSpec((), columns=True, middle=Middle("token", (1, 4), "output"))
    features, documents, packing = packed(family, target, spec)
    prompts = prompts_of(family)
    prefilled = target.open(spec, 3, 8).prefill(prompts).features
    target.model.set_attn_implementation("eager")
    for row, ((ids, images), start, stop) in enumerate(zip(documents, packing.borders, packing.borders[1:])):
        count = len(prompts[row])
        out = plain(target.model, ids, images, output_attentions=True, output_hidden_states=True)
        want = out.attentions[-1][0, :, :count].mean((0, 1))
        torch.testing.assert_close(features.columns[start:stop], want, atol=1e-6, rtol=0)
        torch.testing.assert_close(prefilled.columns[row, :count], want[:count], atol=1e-6, rtol=0)
        assert (prefilled.columns[row, count:] == 0).all() and (features.columns[start + count : stop] == 0).all()
        entropy = torch.stack([-torch.xlogy(w, w).sum(-1).mean(1)[0] for w in out.attentions[1:4]], -1)
        torch.testing.assert_close(features.entropies[start:stop], entropy, atol=1e-5, rtol=0)
        best = 2 + features.entropies[start:stop].argmin(-1)
        states = torch.stack([out.hidden_states[k][0] for k in range(5)])
        torch.testing.assert_close(features.middle[start:stop], states[best, torch.arange(len(ids))], atol=3e-5, rtol=0)


@every_family
@pytest.mark.parametrize("rows", ["all", "text"])
def test_trees_behind_a_packed_row_with_images_are_scored_as_plain_forwards(family, rows):
    """Anchors count among the rows that feed the drafter; the prefix keeps the images all the same."""
    target = tiny_vision(family)
    features, documents, packing = packed(family, target, FeatureSpec((), trees=True, rows=rows, drop_ids=(START, END)))
    at, tree = features.packing.rows[[0, 5, -1]] + 1, tree_of(3, 4)
    tree = DraftTree.of(torch.cat([features.tokens[at, None], tree.tokens[:, 1:]], 1), tree.parents)
    scores, best = features.score(tree, at)
    numbers = (at[:, None] >= torch.tensor(features.packing.borders[1:])).sum(1).tolist()
    for row, (number, place) in enumerate(zip(numbers, features.positions[at].tolist())):
        ids, images = documents[number]
        for leaf in (4, 5, 6):
            path = path_to(tree, leaf)
            logits = own(target, ids[:place] + tree.tokens[row, path].tolist(), images)[0][place:]
            want = torch.log_softmax(logits, -1)[:-1].gather(1, tree.tokens[row, path[1:], None])[:, 0]
            torch.testing.assert_close(scores[row, path[1:]], want, atol=5e-5, rtol=0)
            assert best[row, path[:-1]].tolist() == logits[:-1].argmax(-1).tolist()


def test_images_see_all_of_themselves_in_gemma_3_though_chunks_would_cut_them():
    """Chunks grow to the end of an image; the last piece of an image changes what the first one is."""
    target, (ids, images) = tiny_vision("gemma3"), document("gemma3", [3, 5])
    reading = target.read(torch.tensor([ids]), torch.tensor([len(ids)]), [images])
    assert [(c.start, c.stop) for c in reading.chunks(6)] == [(0, 8), (8, 14)]
    assert reading.blocks[0].tolist() == [1 if token == IMAGE else -1 for token in ids]


def test_rope_positions_of_qwen_fall_behind_the_places():
    """A wide image of 2 x 4 pieces takes 4 positions, not 8; text has one position on all axes."""
    target, (ids, images) = tiny_vision("qwen2_5_vl"), document("qwen2_5_vl", [3, 5], wide=True)
    reading = target.read(torch.tensor([ids]), torch.tensor([len(ids)]), [images])
    assert reading.shift.tolist() == [-4]
    assert reading.rope[:, 0, 4:12].tolist() == [[4] * 8, [4] * 4 + [5] * 4, [4, 5, 6, 7] * 2]
    assert reading.rope[:, 0, -5:].tolist() == [[len(ids) - 9 + i for i in range(5)]] * 3


@every_family
def test_another_number_of_visual_tokens_than_images_make_is_refused(family):
    target, (ids, images) = tiny_vision(family), document(family, [3, 5])
    decoding = target.open(FeatureSpec(()), 2, 8)
    count, short = ids.count(IMAGE), ids[: ids.index(IMAGE)] + ids[ids.index(IMAGE) + 1 :]
    with pytest.raises(
        UserError,
        match=rf"^prompt 1: found {count - 1} visual tokens \(id 50\), expected {count}, as many as its images make$",
    ):
        decoding.prefill([[3, 4], ImagePrompt(short, images)])
    with pytest.raises(UserError, match=rf"^prompt 0: found {count} visual tokens \(id 50\), expected 0"):
        decoding.prefill([ids, [3, 4]])
    with pytest.raises(UserError, match=rf"^prompt 0: found 0 visual tokens \(id 50\), expected {count}"):
        decoding.prefill([ImagePrompt([3, 4], images), [3, 4]])


def test_what_cannot_be_read_is_refused():
    target, (ids, images) = tiny_vision("llava"), document("llava", [3, 5])
    with pytest.raises(UserError, match="prompt 0: found an image or a marker of one at its end, expected text"):
        target.open(FeatureSpec((), rows="text"), 1, 8).prefill([ImagePrompt(ids[:-5], images)])
    with pytest.raises(
        UserError, match="found an image, or a marker of one, among or right before the tokens that the target wrote"
    ):
        target.features(
            torch.tensor(ids), Packing((0, len(ids)), torch.ones(len(ids), dtype=torch.bool)), FeatureSpec(()), [images]
        )
    with pytest.raises(UserError, match=r"prompt 0: found pixel_values_videos, expected pixel_values \(llava\)"):
        target.open(FeatureSpec(()), 1, 8).prefill([ImagePrompt(ids, images | {"pixel_values_videos": torch.zeros(1)})])
    with pytest.raises(UserError, match=r"target tiny: found a prompt with images, expected text \(llama sees none\)"):
        tiny_target().open(FeatureSpec(()), 1, 8).prefill([ImagePrompt(ids, images)])


def test_features_that_the_cache_does_not_hold_are_computed_anew(tmp_path):
    for spec in (
        FeatureSpec((), rows="text"),
        FeatureSpec((), columns=True),
        FeatureSpec((), middle=Middle("token", (1, 3), "output")),
    ):
        with pytest.raises(UserError, match="data.features: found cached, expected online"):
            Cached(tiny_target(), Rows(tmp_path), spec, tmp_path / "features", 0)
    assert not list(tmp_path.iterdir())


def test_other_vision_language_models_are_refused():
    shape = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2)
    model = hf.PaliGemmaForConditionalGeneration(
        hf.PaliGemmaConfig(
            text_config=dict(shape, model_type="gemma", vocab_size=61, num_key_value_heads=1, head_dim=8),
            vision_config=dict(shape, model_type="siglip_vision_model", image_size=8, patch_size=4),
            projection_dim=16,
        )
    )
    with pytest.raises(
        UserError,
        match="target tiny: found vision-language model paligemma, expected one of gemma3, idefics3, llava, "
        "llava_next, qwen2_5_vl",
    ):
        TextTarget(model, "tiny")
