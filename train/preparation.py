"""What a recipe's rows are made with, in one place for training, dry runs and `draftsmith inspect`."""

from dataclasses import dataclass
from pathlib import Path

from draftsmith.models.chat import stop_ids
from draftsmith.models.errors import UserError
from draftsmith.models.notes import notes
from draftsmith.models.pictures import load_renderer
from draftsmith.models.rendering import Renderer
from draftsmith.models.targets import Description
from draftsmith.train.data import Rows, await_rows, prepare, since
from draftsmith.train.pictures import Pictures, cut_for, load_pictures
from draftsmith.train.recipe import DrafterRecipe


@dataclass(frozen=True)
class Prepared:
    """Rows below a run's folder; the template that made them; what reads their pictures (None: there are none); the ids
    that end answers.
    """

    rows: Rows
    renderer: Renderer
    pictures: Pictures | None
    stops: set[int]


def head_config(recipe: DrafterRecipe, described: Description):
    """The config of the recipe's head for its target. Raises UserError for a head that cannot draft for it, and for
    rows that are longer than its context.
    """
    if recipe.data.max_length > described.context_length:
        raise UserError(
            f"data.max_length: found {recipe.data.max_length}, expected at most the target's {described.context_length}"
        )
    return recipe.kind.Config.for_target(described.config, **recipe.head.shape)


def prepared(
    recipe: DrafterRecipe, described: Description, folder: Path, report=print, waits: bool = False
) -> Prepared:
    """The rows of a recipe. waits: another process of this machine prepares them. Raises UserError."""
    spec = recipe.data
    config = head_config(recipe, described)
    renderer = since(load_renderer(recipe.target, described, spec.chat_template_kwargs), folder)
    for line in notes(described, renderer.reader, recipe.target, config):
        report(line)
    stops = stop_ids(described, renderer.tokenizer)
    pictures = load_pictures(renderer, described, spec.max_image_pixels, cut_for(config))
    arguments = renderer, stops, described.vocab_size, folder
    if waits:
        rows = await_rows(spec.files, spec.max_length, *arguments, pictures)
    else:
        rows = prepare(spec.files, spec.max_length, spec.max_bad_rows, *arguments, report, pictures, spec.processes)
    return Prepared(rows, renderer, pictures, stops)
