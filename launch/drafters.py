"""What the name of a method stands for: one table for `eval`, `verify`, `sweep` and `generate`.

A name is the place of a trained drafter (a directory, a Hub id or `bundled:PATH`), one of `KINDS` (`suffix`, or
`howl:DRAFTER` with an argument behind the colon), or one of `LIBRARY`, the loops of Hugging Face. A new kind of drafter
is one line of `KINDS`.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

from draftsmith.eval.measurement.baselines import Generate
from draftsmith.eval.measurement.measure import Decoder, Looped
from draftsmith.eval.verification.rules import RULES
from draftsmith.eval.verification.verifier import MATCH, Verifier
from draftsmith.models.drafters import Drafter, HeadDrafter, NoDrafter
from draftsmith.models.drafters.howl import HowlDrafter
from draftsmith.models.drafters.lookup import LookupDrafter
from draftsmith.models.drafters.recycling import TEMPLATE, RecyclingDrafter
from draftsmith.models.drafters.stand import HEURISTIC, StandDrafter
from draftsmith.models.drafters.suffix import SuffixDrafter, SuffixRule
from draftsmith.models.errors import UserError
from draftsmith.models.formats import fetch, load_drafter
from draftsmith.models.grow import DynamicTree, StaticTree, TreePolicy
from draftsmith.models.targets import TextTarget

HOWL_TREE, HOWL_ROWS = DynamicTree(10, 7, 60), 60
# of 1, 2 and 4 the best path on prompts of training modules (tests/benchmarks/suffix_rules.py)
SUFFIX_RULE = SuffixRule(factor=4)
SAMPLED_RULE = RULES["traversal"]  # for trees that carry the distributions they were drawn from
CACHED_REQUESTS = 1_000_000  # of a suffix drafter whose memory lasts: all of them


@dataclass(frozen=True)
class Kind:
    """form: how it is written; behind a colon stands its argument, which `[...]` makes optional. make(drafters,
    argument, tree) -> drafter; tree: what a head in it grows, None = the kind's own choice. methods(argument) -> the
    methods in it that draft for the same target. grows: whether it takes a tree; shaped: whether it takes a static one,
    and has one of its own. samples(argument): whether its trees carry the distributions they were drawn from. lasting:
    as `make`, a drafter that keeps what it learns as long as it lives; None where nothing is learned.
    """

    form: str
    make: Callable[["Drafters", str, TreePolicy | None], Drafter]
    methods: Callable[[str], list[str]] = lambda argument: []
    grows: bool = False
    shaped: bool = False
    samples: Callable[[str], bool] = lambda argument: False
    lasting: Callable[["Drafters", str, TreePolicy | None], Drafter] | None = None


class Drafters:
    """Drafters of one target by their names. A trained head is loaded once, however many methods draft with it.
    assistant: the draft model of `hf-assisted`.
    """

    def __init__(self, target: TextTarget, assistant: str):
        self.target, self.assistant, self.heads = target, assistant, {}

    def head(self, place: str):
        """Raises UserError when no drafter for this target lies there."""
        folder = fetch(place)
        if folder not in self.heads:
            self.heads[folder] = load_drafter(folder, self.target.shared, self.target.layers)
        return self.heads[folder]

    def drafter(self, name: str, tree: TreePolicy | None = None, lasting: bool = False) -> Drafter:
        """tree: what heads grow; a trained drafter needs one. lasting: one that learns from all that it ever drafts for
        (trajectories of one problem), if its kind can.
        """
        kind, argument = parse(name)
        if kind is None:
            return HeadDrafter(self.head(argument), tree)
        return (lasting and kind.lasting or kind.make)(self, argument, tree)

    def decoder(self, name: str, tree: TreePolicy | None = None) -> Decoder:
        if name in LIBRARY:
            return LIBRARY[name](self)
        return Looped(self.target, self.drafter(name, tree), verifier=self.rule(name))

    def rule(self, name: str) -> Verifier:
        """The rule that the trees of a method are made for."""
        kind, argument = parse(name)
        return SAMPLED_RULE if kind is not None and kind.samples(argument) else MATCH


def howl(drafters: Drafters, place: str, tree: TreePolicy | None) -> HowlDrafter:
    head = drafters.head(place)
    if tree is None:
        tree = HOWL_TREE if head.feature_spec.probe is None else replace(HOWL_TREE, size=HOWL_ROWS // 2)
    return HowlDrafter(HeadDrafter(head, tree), SuffixDrafter(HOWL_ROWS, SUFFIX_RULE))


def static(tree: TreePolicy | None, own: StaticTree) -> StaticTree:
    """The tree that a kind with a static shape of its own drafts. Raises UserError for other trees."""
    if tree is not None and not isinstance(tree, StaticTree):
        raise UserError(f"tree: found {tree}, expected a static one: chain:DEPTH, binary:DEPTH, eagle or FILE.json")
    return tree or own


def stand(drafters: Drafters, mode: str, tree: TreePolicy | None, lasting: bool = False) -> StandDrafter:
    return StandDrafter(static(tree, HEURISTIC), mode or "gumbel", lasting)


def recycling(drafters: Drafters, argument: str, tree: TreePolicy | None, lasting: bool = False) -> RecyclingDrafter:
    return RecyclingDrafter(drafters.target.vocab_size, static(tree, TEMPLATE), lasting)


KINDS = {
    "plain": Kind("plain", lambda drafters, argument, tree: NoDrafter()),
    "lookup": Kind("lookup", lambda drafters, argument, tree: LookupDrafter()),
    "suffix": Kind(
        "suffix",
        lambda drafters, argument, tree: SuffixDrafter(HOWL_ROWS, SUFFIX_RULE),
        lasting=lambda drafters, argument, tree: SuffixDrafter(HOWL_ROWS, SUFFIX_RULE, CACHED_REQUESTS),
    ),
    "howl": Kind("howl:DRAFTER", howl, lambda argument: [argument], grows=True),
    "stand": Kind(
        "stand[:MODE]",
        stand,
        shaped=True,
        samples=lambda mode: mode != "deterministic",
        lasting=partial(stand, lasting=True),
    ),
    "recycling": Kind("recycling", recycling, shaped=True, lasting=partial(recycling, lasting=True)),
}


def hf_lookup(drafters: Drafters) -> Generate:
    """With the numbers of our own lookup."""
    own = LookupDrafter()
    return Generate(drafters.target, prompt_lookup_num_tokens=own.depth, max_matching_ngram_size=max(own.grams))


LIBRARY: dict[str, Callable[[Drafters], Decoder]] = {
    "hf-generate": lambda drafters: Generate(drafters.target),
    "hf-lookup": hf_lookup,
    "hf-assisted": lambda drafters: Generate(
        drafters.target, assistant=TextTarget.load(drafters.assistant, drafters.target.dtype)
    ),
}


def parse(name: str) -> tuple[Kind | None, str]:
    """A kind and its argument ("" for none); None and the place of a trained drafter. Raises UserError for a kind
    without the argument that it needs, or with one that it does not take.
    """
    word, _, argument = name.partition(":")
    kind = KINDS.get(word)
    if kind is None:
        return None, name
    if not argument and ":" in kind.form and "[" not in kind.form:
        raise UserError(f"{word}: found no drafter behind it, expected {kind.form}")
    if argument and ":" not in kind.form:
        raise UserError(f"{name}: found {argument} behind {word}, expected {kind.form} alone")
    return kind, argument


def trained(name: str) -> bool:
    """Whether a name is the place of a trained drafter itself, and not that of another method."""
    return name not in LIBRARY and parse(name)[0] is None


def grows(name: str) -> bool:
    """Whether a method drafts trees of a shape that one may choose."""
    return trained(name) or shaped(name) or name not in LIBRARY and parse(name)[0].grows


def shaped(name: str) -> bool:
    """Whether a method drafts a static tree, and has one of its own."""
    return not trained(name) and name not in LIBRARY and parse(name)[0].shaped


def places(name: str) -> list[str]:
    """Where the trained drafters in a method lie: they say what target it is for."""
    if name in LIBRARY:
        return []
    kind, argument = parse(name)
    return [name] if kind is None else [place for method in kind.methods(argument) for place in places(method)]
