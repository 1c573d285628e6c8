"""The OWL head in the directory that ArcticInference loads (`sum_lstm`), which is also the one that its drafters are
kept in.

One tensor a gate, as ArcticTraining writes them; the engine joins them in the order forget, input, output, cell. Copies
of tied tensors, which ArcticTraining writes, are read if they are equal and never written (safetensors forbids
sharing). The engine asks for `base_model_archs`, which ArcticTraining leaves out; an export has it, a kept drafter
names its target in draftsmith.json. What only draftsmith decodes with, `[SPEC]`, is one more tensor and a block `owl`
in config.json: the engine passes over both and drafts chains from the target's own states.
"""

import re
from pathlib import Path

import torch

from draftsmith.models.errors import UserError
from draftsmith.models.features import Shared
from draftsmith.models.formats.layout import Layout, Serving, Stored, Tensors, check_tensors, figures
from draftsmith.models.formats.mended import check_spelling
from draftsmith.models.heads import OwlConfig, OwlHead
from draftsmith.models.heads.owl import SPEC_UNIT

GATES = ("forget", "input", "output", "cell")  # as they stand in the head's matrices
NAMES = {
    "token_embedding.weight": "forget_emb.0.weight",
    "cell_norm.weight": "cell_ln.0.weight",
    "cell_norm.bias": "cell_ln.0.bias",
    "state_norm.weight": "state_ln.0.weight",
    "state_norm.bias": "state_ln.0.bias",
    "output_head.weight": "head.0.weight",
}
SPEC = "spec_embedding"  # [d0], as the target takes it among its embeddings
HEAD = re.compile(r"head\.\d+\.weight")
EXPECTED = {"scale_input": True, "tie_weights": True, "tie_lstm_embs": True}


def recognises(config: dict) -> bool:
    return config.get("model_type") == "mlp_speculator" and config.get("method") == "sum_lstm"


def expected_shapes(config: OwlConfig) -> dict[str, tuple[int, ...]]:
    """Every stored key with its shape."""
    width, vocab = config.inner_dim, config.vocab_size
    shapes = {name: (width,) for name in NAMES.values()} | {
        "forget_emb.0.weight": (vocab, width),
        "head.0.weight": (vocab, width),
    }
    for gate in GATES:
        shapes |= {f"{gate}_proj.0.weight": (width, config.input_hidden_dim), f"{gate}_proj.1.weight": (width, width)}
    return shapes | ({SPEC: (config.input_hidden_dim,)} if config.spec_mode == "replace" else {})


def from_config(stored: dict, place: str) -> OwlConfig:
    """config.json -> config. Raises UserError naming what this head computes otherwise."""
    for name, expected in EXPECTED.items():
        if stored.get(name) is not expected:
            raise UserError(
                f"{place}: {name}: found {stored.get(name)}, expected true (this head computes something else)"
            )
    try:
        widths = [one_width(stored[name], name, place) for name in ("inner_dim", "proj_dim", "emb_dim")]
        if len(set(widths)) > 1:
            raise UserError(
                f"{place}: inner_dim, proj_dim, emb_dim: found {', '.join(map(str, widths))}, expected one width"
            )
        own = stored.get("owl", {"spec_mode": "off"})
        mode = own["spec_mode"] if isinstance(own, dict) else own
        if mode not in ("off", "replace"):
            raise UserError(f"{place}: owl.spec_mode: found {mode!r}, expected off or replace")
        shape = figures(stored, ("input_hidden_dim", "vocab_size", "n_predict"), place)
        return OwlConfig(shape["input_hidden_dim"], widths[0], shape["vocab_size"], shape["n_predict"], mode)
    except KeyError as error:
        raise UserError(f"{place}: {error.args[0]}: missing") from None


def one_width(value, name: str, place: str) -> int:
    """ArcticTraining writes widths as text, with dots between those of several layers; other writers use numbers or
    lists of one.
    """
    if not width_of(value).isdecimal():
        raise UserError(f"{place}: {name}: found {value!r}, expected one width")
    return int(width_of(value))


def read(stored: dict, tensors: Tensors, shared: Shared, taps_below: int | None, folder: Path) -> OwlHead:
    """`Layout.read`: checked against the target before anything is built."""
    place, (vocab, hidden) = f"{folder}/config.json", shared.embedding.shape
    config = from_config(stored, place)
    for name, found, wanted in (
        ("vocab_size", config.vocab_size, vocab),
        ("input_hidden_dim", config.input_hidden_dim, hidden),
    ):
        if found != wanted:
            raise UserError(f"{place}: {name}: found {found}, expected the target's {wanted}")
    place = f"{folder}/model.safetensors"
    tensors = untied(tensors, config.n_predict, place)
    check_tensors(tensors, expected_shapes(config), place)
    weights = {own: tensors[name] for own, name in NAMES.items()}
    weights |= {
        f"{own}.weight": torch.cat([tensors[f"{gate}_proj.{i}.weight"] for gate in GATES])
        for i, own in enumerate(("first_gates", "gates"))
    }
    if config.spec_mode == "replace":
        weights["spec"] = tensors[SPEC] / SPEC_UNIT
    head = OwlHead(config, shared)
    head.load_state_dict({name: value.to(shared.embedding) for name, value in weights.items()}, assign=True)
    return head.eval()


def untied(tensors: Tensors, steps: int, place: str) -> Tensors:
    """Without the copies of tied tensors. Raises UserError for one that is no copy."""
    copies = {f"{gate}_emb.0.weight": "forget_emb.0.weight" for gate in GATES[1:]}
    copies |= {
        name: "head.0.weight" for name in tensors if HEAD.fullmatch(name) and 0 < int(name.split(".")[1]) < steps
    }
    for name in copies.keys() & tensors.keys():
        if copies[name] in tensors and not torch.equal(tensors[name], tensors[copies[name]]):
            raise UserError(f"{place}: {name}: differs from {copies[name]}, expected the same values (tied)")
    return {name: value for name, value in tensors.items() if name not in copies}


def write(head: OwlHead, dtype: torch.dtype, serving: Serving | None = None) -> tuple[dict, Tensors]:
    """`Layout.write`: what the engine says of the target stands there where serving is given."""
    config = head.config
    weights = {name: value.detach().to("cpu", dtype).contiguous() for name, value in head.state_dict().items()}
    tensors = {name: weights[own] for own, name in NAMES.items()}
    for i, own in enumerate(("first_gates", "gates")):
        tensors |= {
            f"{gate}_proj.{i}.weight": part.clone() for gate, part in zip(GATES, weights[f"{own}.weight"].chunk(4))
        }
    if config.spec_mode == "replace":
        tensors[SPEC] = weights["spec"] * SPEC_UNIT  # a power of two: nothing is rounded
    steps, width = config.n_predict, str(config.inner_dim)
    described = (
        {}
        if serving is None
        else {"base_model_name_or_path": serving.verifier, "base_model_archs": [serving.architecture]}
    )
    return {
        "architectures": ["ArcticLSTMSpeculatorPreTrainedModel"],
        "model_type": "mlp_speculator",
        "method": "sum_lstm",
        **described,
        "input_hidden_dim": config.input_hidden_dim,
        "inner_dim": width,
        "proj_dim": width,
        "emb_dim": width,
        "vocab_size": config.vocab_size,
        "n_predict": steps,
        "n_candidates": steps,
        "top_k_tokens_per_head": [1] * steps,
        **EXPECTED,
        **({"owl": {"spec_mode": config.spec_mode}} if config.spec_mode != "off" else {}),
        "torch_dtype": str(dtype).removeprefix("torch."),
    }, tensors


def holds(tensors: Tensors) -> bool:
    return {f"{gate}_proj.0.weight" for gate in GATES} <= own_names(tensors).keys()


def own_names(tensors: Tensors) -> Tensors:
    return {name.removeprefix("model.").removeprefix("speculator."): value for name, value in tensors.items()}


def mend(stored: Stored, layers: int | None, taps: str | None) -> tuple[dict, Tensors, list[str]]:
    """`Layout.mend`: kind, width and ties from the tensors, and the steps from the number of output heads."""
    config, tensors, place = dict(stored.config), own_names(stored.tensors), f"{stored.folder}/model.safetensors"
    check_spelling(stored.tensors, place, lambda name: name.removeprefix("model.").removeprefix("speculator."))
    lines = []

    def mend_key(name: str, value, says: str, same=lambda found, value: found == value):
        if not same(config.get(name), value):
            lines.append(f"{name}: found {config.get(name)!r}, but the tensors are those of {says}")
            config[name] = value

    mend_key("model_type", "mlp_speculator", "a speculator")
    mend_key("method", "sum_lstm", "an LSTM")
    inner = tensors.get("cell_proj.1.weight")
    if inner is not None and inner.ndim == 2 and inner.size(0) == inner.size(1):
        for name in ("inner_dim", "proj_dim", "emb_dim"):
            mend_key(name, str(len(inner)), f"width {len(inner)}", lambda found, value: width_of(found) == value)
    for name, copies in (("tie_weights", "output heads that are tied"), ("tie_lstm_embs", "embeddings that are tied")):
        mend_key(name, True, copies)  # copies that differ are refused
    heads = {int(name.split(".")[1]) for name in tensors if HEAD.fullmatch(name)}
    if len(heads) > 1 and heads == set(range(len(heads))):
        mend_key("n_predict", len(heads), f"{len(heads)} steps")
    return config, tensors, lines


def width_of(value) -> str:
    """As text, of a number, a text or a list of one."""
    return str(value[0] if isinstance(value, list) and len(value) == 1 else value)


LAYOUT = Layout(
    OwlHead,
    {
        "arctic": "ARCTIC_INFERENCE_ENABLED=1 vllm serve $target --speculative-config "
        """'{"method": "arctic", "model": "$drafter", "num_speculative_tokens": $n_predict, """
        """"enable_suffix_decoding": true}'""",
    },
    recognises,
    read,
    write,
    described=True,
    holds=holds,
    mend=mend,
)
