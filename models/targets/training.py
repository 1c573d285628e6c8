"""Training features of one packed row: what `FeatureSpec` asks for, by one forward of the target.

The target reads the documents as right-padded rows, each from position 0, so that every architecture sees what it sees
in decoding.
"""

from contextlib import nullcontext

import torch

from draftsmith.models.errors import UserError
from draftsmith.models.features import FeatureSpec, Packing, Teacher, TrainingFeatures
from draftsmith.models.targets.attention import Watch
from draftsmith.models.targets.packed import PackedPrefix
from draftsmith.models.targets.reading import kept_rows

ALIKE = 0.8  # share of the longest document's length that the others read with it have at least


def by_length(target, spec: FeatureSpec, padded: torch.Tensor, sizes: torch.Tensor):
    """What `target.whole` gives for right-padded texts padded [D, S] of sizes [D], those of like lengths at a time:
    padding to the longest of all may cost more than the texts themselves.
    """
    order, groups = sizes.argsort(descending=True).tolist(), []
    for number in order:
        if not groups or sizes[number] < ALIKE * sizes[groups[-1][0]]:
            groups.append([])
        groups[-1].append(number)
    found = None
    for group in groups:
        tokens = padded[group, : int(sizes[group[0]])]
        parts = target.whole(spec, target.read(tokens, sizes[group].to(padded.device), [{}] * len(group)))
        if found is None:
            found = tuple(part.new_zeros(*padded.shape, part.size(-1)) for part in parts)
        for whole, part in zip(found, parts):
            whole[group, : part.size(1)] = part
    return found


def training_features(
    target, tokens: torch.Tensor, packing: Packing, spec: FeatureSpec, images: list[dict]
) -> TrainingFeatures:
    """See `TextTarget.features`. Token t of the packed row is place places[t] of document numbers[t]; fed [T] bool are
    the tokens that feed the drafter, kept [T'] their packed indices.
    """
    device, sizes = tokens.device, torch.tensor(packing.borders).diff()
    numbers, places = torch.arange(len(sizes)).repeat_interleave(sizes).to(device), packing.positions.to(device)
    padded = tokens.new_zeros(len(sizes), int(sizes.max()))
    padded[numbers, places] = tokens
    reading = target.read(padded, sizes.to(device), images)
    visual, written = reading.visual[numbers, places], packing.mask.to(device)
    fed = kept_rows(spec, tokens, visual, written)
    if bool((visual & written).any()) or not bool(fed[packing.rows.to(device)].all()):
        raise UserError(
            "found an image, or a marker of one, among or right before the tokens that the target wrote, expected "
            "text there"
        )
    prompts, every = packing.prompts.to(device)[:, None], torch.arange(padded.size(1), device=device)
    watch = Watch(target.body, every < prompts if spec.columns else None, spec.middle, every < reading.lengths[:, None])
    cache = target.keep() if spec.probe is not None or spec.trees else None
    if spec.columns or spec.middle or cache is not None or any(images) or target.sharded is not None:
        with watch if spec.columns or spec.middle else nullcontext():
            final, hidden = target.whole(spec, reading, cache)
    else:
        final, hidden = by_length(target, spec, padded, sizes)
    kept = fed.nonzero().flatten()
    probe = score = None
    if cache is not None:
        prefix = PackedPrefix(
            target, cache.packed(numbers, places), packing, final[numbers, places], reading.ahead[numbers, places], kept
        )
        probe, score = prefix.probe if spec.probe is not None else None, prefix.score if spec.trees else None
    packing, row = packing.select(fed.cpu()), (numbers[kept], places[kept])
    supervised = packing.rows.to(device) + 1
    teacher = Teacher(final[row[0][supervised], row[1][supervised]], target.project)
    return TrainingFeatures(
        tokens[kept],
        hidden[row],
        packing,
        teacher,
        probe=probe,
        score=score,
        positions=row[1],
        visual=visual[kept],
        columns=(watch.sums / prompts)[row] if spec.columns else None,
        middle=watch.state[row] if spec.middle else None,
        entropies=watch.entropies[row] if spec.middle else None,
    )
