"""What a target (`TextTarget`) must be for drafting on it; whatever cannot is refused before any work, by name."""

import torch
import transformers
from packaging import version

from draftsmith.models.errors import UserError
from draftsmith.models.features import FeatureSpec
from draftsmith.models.targets import grouped
from draftsmith.models.targets.form import logit_scales
from draftsmith.models.targets.recurrent import Layout, layout_of
from draftsmith.models.targets.weights import one_line
from draftsmith.models.tree import DraftTree

STATEFUL = {"linear_attention", "hybrid", "conv", "mlp", "moe"}  # kinds of layer beside those of attention alone
RECURRENT = version.parse("5.23")  # of transformers: before it caches held states in other ways
FAILURES = (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError)  # of models of another form


def check_attention(target) -> None:
    """Attention must be causal and take the masks that trees bring; only the two plain implementations do. Raises
    UserError.
    """
    implementation = target.model.config._attn_implementation
    if getattr(target.config, "attn_logit_softcapping", None) is not None:
        target.model.set_attn_implementation(
            "eager"
        )  # some versions of transformers take sdpa, which leaves the capping out
    elif implementation not in ("sdpa", "eager", grouped.NAME):
        raise UserError(f"target {target.name}: found attention {implementation!r}, expected sdpa or eager")
    if getattr(target.config, "use_bidirectional_attention", None) is True:
        raise UserError(f"target {target.name}: found bidirectional attention, expected causal attention")


def kinds_of(target) -> tuple[str, ...]:
    """The kinds of layer, each of which takes a mask of its own; without `layer_types` a window is that of every layer.
    Raises UserError for a kind that is not known.
    """
    kinds = set(
        getattr(target.config, "layer_types", None)
        or ["full_attention" if target.window is None else "sliding_attention"]
    )
    known = {"full_attention"} if target.window is None else {"full_attention", "sliding_attention"}
    if target.mixers:
        if "hybrid" in kinds:
            kinds.add("full_attention")
        kinds -= STATEFUL
    if not kinds <= known:
        raise UserError(
            f"target {target.name}: {target.config.model_type} is not supported: found layers of "
            f"{', '.join(sorted(kinds - known))}, expected {' or '.join(sorted(known))}"
        )
    return tuple(sorted(kinds))


def spread_ids(target) -> torch.Tensor:
    """[1, 5], ids spread over the vocabulary: padding tokens may have empty embeddings, which would hide a
    difference.
    """
    ids = torch.linspace(0, target.vocab_size - 1, 5, device=target.device).long()[None]
    return ids if target.vision is None else ids.masked_fill(ids == target.vision.token, 0)


@torch.no_grad()
def scale_of(target) -> float:
    """What logits are multiplied by: `project` must be the model's own way from final states to logits, a scale of its
    config included. Raises UserError for models that change them otherwise.
    """
    try:
        own = target.model(input_ids=spread_ids(target), use_cache=False)
        ours = target.project(target.body(input_ids=spread_ids(target), use_cache=False).last_hidden_state)
    except (AssertionError, *FAILURES) as error:  # the first: what packages of quantised weights say
        raise UserError(f"target {target.name}: {target.config.model_type} cannot be run ({one_line(error)})") from None
    near = lambda scale: torch.allclose(own.logits.float(), scale * ours.float(), rtol=1e-3, atol=1e-3)  # noqa: E731
    scales = [scale for scale in (1.0, *logit_scales(target.config)) if near(scale)]
    if not scales:
        raise UserError(
            f"target {target.name}: {target.config.model_type} computes logits in a way that is not supported"
        )
    return scales[0]


def cache_layout(target) -> Layout:
    """As `layout_of`. Raises UserError for a cache of another form."""
    if version.parse(transformers.__version__) < RECURRENT:
        raise UserError(
            f"target {target.name}: {target.config.model_type} has layers with a state: found transformers "
            f"{transformers.__version__}, expected {RECURRENT} or newer"
        )
    try:
        return layout_of(target)
    except FAILURES as error:
        raise UserError(
            f"target {target.name}: {target.config.model_type} is not supported: found a cache of another form "
            f"({one_line(error)})"
        ) from None


@torch.no_grad()
def check_session(target) -> None:
    """A session must run and agree, up to rounding, with the model's own forward: caches, masks or states of
    another form are refused. Raises UserError.
    """
    tokens = spread_ids(target)
    own = target.model(input_ids=tokens, use_cache=False).logits[:, -1].float()
    try:
        session = target.open(FeatureSpec((0,)), 1, 5)
        session.prefill(tokens[:, :3].tolist())
        verified = session.verify(DraftTree.of(tokens[:, 3:], torch.tensor([[-1, 0]], device=target.device)))
        worst, found = (verified.logits[:, -1].float() - own).abs().max(), None
        if not worst <= 0.1 * (own.max() - own.min()):
            found = f"logits that differ by {worst:.2g} after five tokens"
        if verified.hidden.shape != (1, 2, target.config.hidden_size):
            found = f"hidden states {list(verified.hidden.shape)}"
    except FAILURES as error:
        found = one_line(error)
    if found:
        raise UserError(
            f"target {target.name}: {target.config.model_type} is not supported: found {found}; "
            "expected one state a token, keys and values in a cache, and 4-D masks"
        )


def check_spec(target, spec: FeatureSpec) -> None:
    """Raises UserError for a spec with what this target does not give."""
    if spec.probe is not None and not target.takes_embeddings:
        raise UserError(
            f"target {target.name}: {target.config.model_type} takes no probe: found other states for embeddings "
            f"than for their ids"
        )
    if target.mixers and (spec.columns or spec.middle):
        raise UserError(
            f"target {target.name}: {target.config.model_type} has no attention statistics: found layers with a state, "
            f"expected attention in every layer"
        )


def check_whole(target) -> None:
    """Rows behind a packed row come in forwards whose number differs between processes (see `shard`)."""
    if target.sharded is not None:
        raise UserError(
            f"target {target.name}: found weights partitioned over processes, expected a whole target to train on "
            f"probes or trees"
        )


def check_behind(target) -> None:
    """Raises UserError for layers that take no rows behind a packed one."""
    slow = next((mixer for mixer in target.mixers.values() if mixer.scan and mixer.scan.behind is None), None)
    if slow is not None:
        raise UserError(
            f"target {target.name}: {target.config.model_type} takes neither probes nor trees in training: found "
            f"layers of {slow.name}, expected attention, Mamba-2 or gated delta rule layers"
        )
