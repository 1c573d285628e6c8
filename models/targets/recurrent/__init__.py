"""Targets with recurrent layers: trees are verified on states that nothing but `commit` writes (STree, arXiv
2505.14969).

A layer's own forward stays what it is: projections, gates, norms, multipliers and their rounding are the model's. Only
the two functions through which rows see each other are exchanged (`mixers`): the causal convolution, whose window goes
along a row's ancestors, and the scan, whose decay goes along the path (`ssd` for Mamba-2, `delta` for the gated delta
rule, `levels` one level after the other for what decays by channel).
"""

from draftsmith.models.targets.recurrent.cache import RecurrentCache
from draftsmith.models.targets.recurrent.layout import Layout, layout_of
from draftsmith.models.targets.recurrent.mixers import Mixer, mixers_of
from draftsmith.models.targets.recurrent.packed import PackedCache
from draftsmith.models.targets.recurrent.session import RecurrentSession

__all__ = ["Layout", "Mixer", "PackedCache", "RecurrentCache", "RecurrentSession", "layout_of", "mixers_of"]
