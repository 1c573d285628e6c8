"""The two conventions for the numbers of taps, told apart.

`eagle_aux_hidden_state_layer_ids` counts the states that enter layers for vLLM and for speculators (Hugging Face's
`hidden_states`, ours too), and the outputs of layers for SGLang, one less for the same tensors. vLLM reads it at the
top level of config.json and in `eagle_config`, SGLang in `eagle_config` alone, so that the place does not always tell.
"""

from draftsmith.models.errors import UserError

NAME = "eagle_aux_hidden_state_layer_ids"
CONVENTIONS = {"entering": 0, "leaving": 1}  # what is added to a number for its index into `hidden_states`
WORDS = {"entering": "states that enter layers (vLLM's numbers)", "leaving": "outputs of layers (SGLang's numbers)"}


def tap_indices(
    stored: dict, place: str, layers: int | None, convention: str | None = None
) -> tuple[tuple[int, ...], str | None]:
    """(indices into `hidden_states`, a line where the numbers alone say less than what was decided). stored:
    config.json; layers: of the target, None where it is not known; convention: one of CONVENTIONS where the user names
    it. Raises UserError for numbers that may be either.
    """
    nested = stored.get("eagle_config")
    top, below = (numbers(group.get(NAME), place) for group in (stored, nested if isinstance(nested, dict) else {}))
    if top is None and below is None:
        if layers is None:
            raise UserError(f"{place}: {NAME}: missing")
        return usual(layers, "entering"), None
    if top is not None and below is not None and top == shifted(below, "leaving"):
        return top, None  # both are said, as we write them
    found = below if top is None else top
    if convention is not None:
        return shifted(found, convention), told(found, convention)
    if top is not None and below is not None and top != below:
        raise UserError(
            f"{place}: {NAME}: found {list(top)}, and {list(below)} in eagle_config, expected the same or one less; "
            f"draftsmith import --taps entering or --taps leaving decides what the first are"
        )
    able = [name for name in CONVENTIONS if possible(shifted(found, name), layers)]
    like = [name for name in able if is_usual(found, layers, name)]
    if below is None and like != ["leaving"]:  # where vLLM alone looks
        return found, told(found, "entering")
    chosen = like if len(like) == 1 else able
    if below is not None and len(chosen) == 1:
        return shifted(found, chosen[0]), told(found, chosen[0])
    if not chosen:
        return found, None  # refused with the range that was expected
    raise UserError(
        f"{place}: {NAME}: found {list(found)}, which may be {WORDS['entering']} or {WORDS['leaving']}; draftsmith "
        f"import --taps entering or --taps leaving decides"
    )


def numbers(found, place: str) -> tuple[int, ...] | None:
    if found is None or found == []:
        return None
    if not isinstance(found, list) or not all(type(k) is int for k in found):
        raise UserError(f"{place}: {NAME}: found {found!r}, expected a list of integers")
    return tuple(found)


def shifted(found: tuple[int, ...], convention: str) -> tuple[int, ...]:
    return tuple(k + CONVENTIONS[convention] for k in found)


def possible(taps: tuple[int, ...], layers: int | None) -> bool:
    """Whether these are ascending indices between the first and the last state of so many layers."""
    return bool(taps) and list(taps) == sorted({k for k in taps if 0 < k < (layers or max(taps) + 1)})


def usual(layers: int, convention: str) -> tuple[int, ...]:
    """The engines' default, in a convention."""
    return tuple(k - CONVENTIONS[convention] for k in (2, layers // 2, layers - 3))


def is_usual(found: tuple[int, ...], layers: int | None, convention: str) -> bool:
    """Of a target of unknown depth: whether they are the default of any."""
    return len(found) == 3 and found == usual(layers or found[-1] + 3 + CONVENTIONS[convention], convention)


def told(found: tuple[int, ...], convention: str) -> str:
    other = next(name for name in CONVENTIONS if name != convention)
    return (
        f"{NAME}: {list(found)} are taken for {WORDS[convention]}, and not for {WORDS[other]} (draftsmith import "
        f"--taps says otherwise)"
    )
