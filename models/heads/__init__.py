"""Draft heads: modules (`DraftHead`) that a recipe names, each in a file of its own, all of one form.

A head's class has
    name                       as recipes and directories call it
    Shape, Objective           dataclasses: the keys of the recipe's sections `head` and `objective`. Objective.steps:
                               drafted steps that are trained; Objective.weights: the weight of each step in the loss;
                               beside its own keys it has those of `divergences.Distillation`
    Config                     its shapes; Config.for_target(text config, **Shape) raises UserError for targets it
                               cannot draft for. Of all: vocab_size, draft_vocab_size, saved_per_row,
                               max_position_embeddings (None: it has no positions), n_predict and columns (see
                               `config.LayerConfig`)
    tables                     parts of the names of matrices with one row a token (embeddings, output heads)
    (config, shared, ids)      its constructor: `Shared` of the target, the draft vocabulary (None = all)
    start_from(target)         starts from the target's weights where that helps
    regress(samples), regressors   (some heads) starts in closed form from rows of the data; its inputs
    feature_spec, ids, shared  what it asks of the target; the draft vocabulary [Vd] int64
    loss(features, objective, counts) -> (loss, sums)
    unroll(features, steps)    (rows, outputs) of each step with teacher tokens; logits(outputs) in the draft vocabulary
    prefill(features), extend(context, features), roots(context), expand(beam, tokens, parents)   decoding
    follow(context, root)      (some heads) predicts behind all rows that no root was expanded behind yet
    grow(config)               (some heads) becomes the wider head of another recipe that starts from this one
    root_at(features, at)      a beam of P roots at inner positions of one packed row, for training on trees

What only some heads can do is None in the others.
"""

from draftsmith.models.heads.dream import DreamConfig, DreamHead, DreamObjective
from draftsmith.models.heads.eagle import EagleConfig, EagleHead, EagleObjective
from draftsmith.models.heads.eagle3 import Eagle3Head
from draftsmith.models.heads.eagle3_config import Eagle3Config, Eagle3Objective
from draftsmith.models.heads.hivis import HivisConfig, HivisHead, HivisObjective
from draftsmith.models.heads.owl import OwlConfig, OwlHead, OwlObjective

HEADS = {head.name: head for head in (Eagle3Head, EagleHead, HivisHead, OwlHead, DreamHead)}

__all__ = [
    "HEADS",
    "DreamConfig",
    "DreamHead",
    "DreamObjective",
    "EagleConfig",
    "EagleHead",
    "EagleObjective",
    "Eagle3Config",
    "Eagle3Head",
    "Eagle3Objective",
    "HivisConfig",
    "HivisHead",
    "HivisObjective",
    "OwlConfig",
    "OwlHead",
    "OwlObjective",
]
