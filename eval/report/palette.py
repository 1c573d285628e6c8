"""The colours of pictures and terminals: Okabe and Ito's, told apart by colour-blind readers too, then some more."""

PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999", "#8B5A2B", "#5D3A9B")
PASSES, STRENGTH = PALETTE[:5], 0.32


def colour_of_pass(number: int) -> str:
    """What lies behind the text that one pass of the target emitted: light, so that black text is read on it, and
    another one than its neighbours'. The prompt's own pass is number 0.
    """
    paint = PASSES[number % len(PASSES)]
    channels = (int(paint[place : place + 2], 16) for place in (1, 3, 5))
    return "#" + "".join(f"{round(255 + STRENGTH * (channel - 255)):02X}" for channel in channels)
