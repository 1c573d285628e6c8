"""The colours of pictures and terminals: Okabe and Ito's, told apart by colour-blind readers too, then some more."""

PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999", "#8B5A2B", "#5D3A9B")
PASSES = PALETTE[:6]


def colour_of_pass(number: int) -> str:
    """Of the text that one pass of the target emitted: neighbours differ. The prompt's own pass is number 0."""
    return PASSES[number % len(PASSES)]
