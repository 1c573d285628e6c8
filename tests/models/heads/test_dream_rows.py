"""Which rows of a prompt feed a DREAM head, in decoding and in training alike."""

import pytest
import torch

from draftsmith.models.features import Packing
from draftsmith.models.heads.dream_rows import kept_rows
from draftsmith.models.targets import ImagePrompt
from draftsmith.train.pictures import answers_apart
from tests.models.heads.test_dream import both, dream_head, pack_images
from tests.models.targets.test_vision import packed, prompts_of
from tests.tiny_vision import IMAGE, document, tiny_vision


def test_the_visual_rows_with_most_attention_stay_and_all_text_does():
    visual, columns = torch.tensor([0, 1, 1, 0, 1, 1, 0, 0]).bool(), torch.tensor([9, 0.1, 0.4, 9, 0.4, 0.2, 0, 0])
    real = torch.arange(8) < 7
    for ratio, want in (
        (1.0, [0, 1, 2, 3, 4, 5, 6]),
        (0.75, [0, 2, 3, 4, 5, 6]),
        (0.5, [0, 2, 3, 4, 6]),
        (0.3, [0, 2, 3, 6]),
        (0.01, [0, 2, 3, 6]),
    ):
        assert kept_rows(real, visual, columns, ratio).nonzero().flatten().tolist() == want
    assert kept_rows(real, visual, None, 1.0) is real and kept_rows(real, torch.zeros(8).bool(), None, 0.5) is real


@both
def test_only_the_pieces_of_images_are_dropped_in_prompts_and_training_alike(family):
    target, prompts = tiny_vision(family), prompts_of(family)
    head = dream_head(target, 0.5)
    training, _, packing = packed(family, target, head.feature_spec)
    prompt = target.open(head.feature_spec, 3, 8).prefill(prompts).features
    context = head.prefill(prompt)
    pieces = [list(p).count(IMAGE) for p in prompts]
    assert context.skipped.tolist() == [n - n // 2 for n in pieces] and context.cross.lengths.tolist() == [
        len(p) - 1 for p in prompts
    ]
    for b, kept in enumerate(rows.kept for rows in head.documents(training)):
        n = len(prompts[b])
        mine = kept_rows(torch.ones(n).bool(), prompt.visual[b, :n], prompt.columns[b, :n], 0.5)
        assert torch.equal(kept[:n], mine) and kept[n:].all()
        assert all(prompts[b][i] == IMAGE for i in range(n) if not mine[i])


@pytest.mark.parametrize("family", ["llava", "gemma3"])  # whose pixels have one row a picture
def test_each_answer_is_trained_on_the_visual_rows_that_its_prompt_drafts_with(family):
    """Two turns with an image each. In one row, columns would end before the first answer, and of the second image the
    first pieces would be kept.
    """
    target, first = tiny_vision(family), len(document(family, [3, 8], 6)[0])
    head, (ids, images) = dream_head(target, 0.75), document(family, [3, 8, 11], 6)
    mask = [int(first - 6 <= i < first - 2 or i >= len(ids) - 6) for i in range(len(ids))]
    ends = [i + 1 for i in range(len(ids)) if ids[i] == IMAGE][3::4]
    rows = answers_apart(ids, mask, [0, 1], ends)
    documents = [
        (row, {name: value[: len(seen)] for name, value in images.items()}, supervised.index(1))
        for row, supervised, seen in rows
    ]
    assert [(len(row), start) for row, _, start in documents] == [(first - 2, first - 6), (len(ids), len(ids) - 6)]
    training = head.documents(pack_images(target, head, documents))
    for (row, seen, start), kept in zip(documents, (rows.kept for rows in training), strict=True):
        prompt = target.open(head.feature_spec, 1, 8).prefill([ImagePrompt(row[:start], seen)]).features
        want = kept_rows(torch.ones(start).bool(), prompt.visual[0], prompt.columns[0], 0.75)
        assert torch.equal(kept[:start], want) and kept[start:].all()
        assert head.prefill(prompt).skipped == start - want.sum() == row.count(IMAGE) // 4
    packing = Packing((0, len(ids)), torch.tensor(mask).bool())
    one = head.documents(target.features(torch.tensor(ids), packing, head.feature_spec, [images]))[0].kept
    assert not torch.equal(one[:start], want)
