"""What the name of a method stands for: one table for `eval`, `verify`, `sweep` and `generate`.

A name is the place of a trained drafter (a directory, a Hub id or `bundled:PATH`), one of `KINDS` (`suffix`, or
`howl:DRAFTER`, `reader:METHOD`, `cascade:MIDDLE+METHOD`, `select:METHOD,METHOD` with an argument behind the colon), or
one of `LIBRARY`, the loops of Hugging Face. A
new kind of drafter is one line of `KINDS`.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

from draftsmith.eval.cascade import BUFFER, CascadeDrafter
from draftsmith.eval.measurement.baselines import Generate
from draftsmith.eval.measurement.measure import Decoder, Looped
from draftsmith.eval.selecting import SelectingDrafter
from draftsmith.eval.verification.rules import RULES
from draftsmith.eval.verification.verifier import MATCH, Verifier
from draftsmith.models.drafters import Drafter, HeadDrafter, NoDrafter, drafting
from draftsmith.models.drafters.datastore import Datastore
from draftsmith.models.drafters.howl import HowlDrafter
from draftsmith.models.drafters.learners import LEARNERS, learner
from draftsmith.models.drafters.lookup import LookupDrafter
from draftsmith.models.drafters.reader import ReaderDrafter
from draftsmith.models.drafters.recycling import TEMPLATE, RecyclingDrafter
from draftsmith.models.drafters.stand import HEURISTIC, StandDrafter
from draftsmith.models.drafters.suffix import SuffixDrafter
from draftsmith.models.drafters.suffix_index import SuffixRule
from draftsmith.models.errors import UserError
from draftsmith.models.formats import fetch, load_drafter
from draftsmith.models.formats.adapter import base_of, with_adapter
from draftsmith.models.grow import DynamicTree, StaticTree, TreePolicy
from draftsmith.models.pictures import load_renderer
from draftsmith.models.prepacked import use_prepacked
from draftsmith.models.rendering import Renderer
from draftsmith.models.targets import TextTarget
from draftsmith.models.targets.copies import quantised, skipping

HOWL_TREE, HOWL_ROWS = DynamicTree(10, 7, 60), 60
# of 1, 2 and 4 the best path on prompts of training modules (tests/benchmarks/suffix_rules.py)
SUFFIX_RULE = SuffixRule(factor=4)
SAMPLED_RULE = RULES["traversal"]  # for trees that carry the distributions they were drawn from
# What heads grow where nothing is said: wide trees pay where many rows cost what a single one does
CPU_TREE, ACCELERATOR_TREE = DynamicTree(3, 4, 10), DynamicTree(10, 7, 60)
CPU_ROW, ACCELERATOR_ROW = 0.05, 0.002  # of a pass over a single row, what one more costs (smollm2 on one thread)
RULE = "normalhedge"  # by which a drafter is chosen, where nothing is said
CACHED_REQUESTS = 1_000_000  # of a suffix drafter whose memory lasts: all of them


@dataclass(frozen=True)
class Kind:
    """form: how it is written; behind a colon stands its argument, which `[...]` makes optional. make(drafters,
    argument, tree) -> drafter; tree: what a head in it grows, None = the kind's own choice. methods(argument) -> the
    methods in it that draft for the same target. grows: whether it takes a tree; shaped: whether it takes a static one,
    and has one of its own; widens: whether it takes what the method in it takes, and is compared with that one on the
    same tree; widened: whether `reader` widens its trees. retrieves: whether it reads a datastore. samples(argument):
    whether its trees carry the distributions they were drawn from. lasting: as `make`, a drafter that keeps what it
    learns as long as it lives; None where nothing is learned.
    """

    form: str
    make: Callable[["Drafters", str, TreePolicy | None], Drafter]
    methods: Callable[[str], list[str]] = lambda argument: []
    grows: bool = False
    shaped: bool = False
    widens: bool = False
    widened: bool = False
    retrieves: bool = False
    samples: Callable[[str], bool] = lambda argument: False
    lasting: Callable[["Drafters", str, TreePolicy | None], Drafter] | None = None


class Drafters:
    """Drafters of one target by their names. A trained head is loaded once, however many methods draft with it.
    assistant: the draft model of `hf-assisted`; datastore: what methods that retrieve read beside the text itself;
    tokenizer: where it lies, if not with the target.
    """

    def __init__(
        self, target: TextTarget, assistant: str, datastore: Datastore | None = None, tokenizer: str | None = None
    ):
        self.target, self.assistant, self.datastore, self.heads = target, assistant, datastore, {}
        self.tokenizer = tokenizer or target.name
        self.middles: dict[str, Drafters] = {}

    def middle(self, name: str) -> "Drafters":
        """Drafters of a middle model: `skip:K` and `int8` are copies of the target (`targets.copies`), anything else is
        the place of another model. Raises UserError for one with another tokenizer.
        """
        if name not in self.middles:
            word, _, number = name.partition(":")
            if word == "skip" and not number.isdigit():
                raise UserError(f"cascade: found {name}, expected skip:K, K a number: every K-th layer is skipped")
            if word == "skip" or name == "int8":
                model = skipping(self.target, int(number)) if word == "skip" else quantised(self.target)
                self.middles[name] = Drafters(model, self.assistant, self.datastore, self.tokenizer)
                return self.middles[name]
            model = TextTarget.load(name, self.target.dtype, self.target.device)
            own, theirs = (
                load_renderer(place, of).fingerprint for place, of in ((self.tokenizer, self.target), (name, model))
            )
            if own != theirs:
                raise UserError(
                    f"cascade: found {name} with another tokenizer ({theirs}) than {self.tokenizer} ({own}), expected "
                    f"the same"
                )
            self.middles[name] = Drafters(model, self.assistant, self.datastore)
        return self.middles[name]

    def head(self, place: str):
        """Raises UserError when no drafter for this target lies there."""
        folder = fetch(place)
        if folder not in self.heads and (base := base_of(folder)):
            self.heads[folder] = with_adapter(self.head(base), folder)
        if folder not in self.heads:
            self.heads[folder] = load_drafter(folder, self.target.shared, self.target.layers)
            use_prepacked(self.heads[folder])
        return self.heads[folder]

    def drafter(self, name: str, tree: TreePolicy | None = None, lasting: bool = False) -> Drafter:
        """tree: what heads grow; a trained drafter needs one. lasting: one that learns from all that it ever drafts for
        (trajectories of one problem), if its kind can.
        """
        kind, argument = parse(name)
        if kind is None:
            return drafting(self.head(argument), tree)
        return (lasting and kind.lasting or kind.make)(self, argument, tree)

    def decoder(self, name: str, tree: TreePolicy | None = None) -> Decoder:
        if name in LIBRARY:
            return LIBRARY[name](self)
        return Looped(self.target, self.drafter(name, tree), verifier=self.rule(name))

    def rule(self, name: str) -> Verifier:
        """The rule that the trees of a method are made for."""
        return SAMPLED_RULE if not trained(name) and samples(name) else MATCH


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


def under_reader(method: str) -> list[str]:
    """Raises UserError for methods whose trees READER does not widen."""
    if method and not trained(method) and (method in LIBRARY or not parse(method)[0].widened):
        known = ", ".join(word for word, kind in KINDS.items() if kind.widened)
        raise UserError(f"reader: found {method} behind it, expected a drafter, {known} or nothing")
    return [method] if method else []


def reader(drafters: Drafters, method: str, tree: TreePolicy | None, lasting: bool = False) -> ReaderDrafter:
    on_cpu, base = drafters.target.device.type == "cpu", None
    if under_reader(method):
        own = (CPU_TREE if on_cpu else ACCELERATOR_TREE) if trained(method) else None
        base = drafters.drafter(method, tree or own, lasting)
    row = CPU_ROW if on_cpu else ACCELERATOR_ROW
    return ReaderDrafter(base, drafters.datastore, row_cost=row, lasting=lasting)


def cascaded(argument: str) -> tuple[int, str, str]:
    """[BUFFER:]MIDDLE+METHOD -> (buffer, middle, method). Raises UserError for anything else."""
    number, colon, rest = argument.partition(":")
    sized = bool(colon) and number.isdigit()
    middle, plus, method = (rest if sized else argument).partition("+")
    buffer = int(number) if sized else BUFFER
    if not (middle and plus and method) or buffer < 1:
        raise UserError(
            f"cascade: found {argument or 'nothing'} behind it, expected [BUFFER:]MIDDLE+METHOD, such as "
            f"cascade:8:skip:3+suffix (MIDDLE: skip:K, int8 or a model's place; METHOD drafts for it)"
        )
    return buffer, middle, method


def cascade(drafters: Drafters, argument: str, tree: TreePolicy | None) -> CascadeDrafter:
    buffer, middle, method = cascaded(argument)
    below = drafters.middle(middle)
    own = (CPU_TREE if drafters.target.device.type == "cpu" else ACCELERATOR_TREE) if trained(method) else None
    drafter = below.drafter(method, own)
    return CascadeDrafter(below.target, drafter, below.rule(method), buffer, drafters.target.vocab_size)


def under_cascade(argument: str) -> list[str]:
    """The method that drafts for a copy of the target drafts for the target too; one for another model does not."""
    _, middle, method = cascaded(argument)
    return [method] if middle == "int8" or middle.startswith("skip:") else []


def selected(argument: str) -> tuple[list[str], str, bool]:
    """METHOD,METHOD,...[:RULE][:lasting] -> (methods, rule, whether one learner lasts). Raises UserError for fewer than
    two methods, and for one that occurs twice.
    """
    lasting = argument.endswith(":lasting")
    methods, colon, rule = argument.removesuffix(":lasting").rpartition(":")
    if rule not in LEARNERS and not rule.startswith("fixed="):
        methods, rule = argument.removesuffix(":lasting"), RULE
    found = [method for method in methods.split(",") if method]
    if len(set(found)) < max(2, len(found)):
        raise UserError(
            f"select: found {argument or 'nothing'} behind it, expected two or more different methods and a rule: "
            f"METHOD,METHOD[:RULE][:lasting], RULE one of {', '.join(LEARNERS)} or fixed=NUMBER"
        )
    return found, rule, lasting


def select(drafters: Drafters, argument: str, tree: TreePolicy | None, lasting: bool = False) -> SelectingDrafter:
    methods, rule, said = selected(argument)
    own = CPU_TREE if drafters.target.device.type == "cpu" else ACCELERATOR_TREE
    pool = {method: drafters.drafter(method, (tree or own) if trained(method) else None) for method in methods}
    learner(rule, len(pool))
    width, of = drafters.target.config.hidden_size, lambda count: learner(rule, count)
    return SelectingDrafter(pool, width, of, lasting=said or lasting)


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
        widened=True,
        samples=lambda mode: mode != "deterministic",
        lasting=partial(stand, lasting=True),
    ),
    "reader": Kind(
        "reader[:METHOD]",
        reader,
        under_reader,
        widens=True,
        retrieves=True,
        samples=lambda method: bool(method) and not trained(method) and samples(method),
        lasting=partial(reader, lasting=True),
    ),
    "cascade": Kind("cascade:[N:]MIDDLE+METHOD", cascade, under_cascade, samples=lambda argument: True),
    "select": Kind(
        "select:METHOD,METHOD[:RULE][:lasting]",
        select,
        lambda argument: selected(argument)[0],
        samples=lambda argument: any(not trained(method) and samples(method) for method in selected(argument)[0]),
        lasting=partial(select, lasting=True),
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
    if not argument and ":" in kind.form and "[:" not in kind.form:
        raise UserError(f"{word}: found no drafter behind it, expected {kind.form}")
    if argument and ":" not in kind.form:
        raise UserError(f"{name}: found {argument} behind {word}, expected {kind.form} alone")
    return kind, argument


def trained(name: str) -> bool:
    """Whether a name is the place of a trained drafter itself, and not that of another method."""
    return name not in LIBRARY and parse(name)[0] is None


def inner(name: str) -> str:
    """The method that decides what trees a method takes: itself, or the one that it widens."""
    kind, argument = (None, "") if name in LIBRARY else parse(name)
    return argument if kind is not None and kind.widens and argument else name


def grows(name: str) -> bool:
    """Whether a method drafts trees of a shape that one may choose."""
    name = inner(name)
    return trained(name) or shaped(name) or name not in LIBRARY and parse(name)[0].grows


def shaped(name: str) -> bool:
    """Whether a method drafts a static tree, and has one of its own."""
    name = inner(name)
    return not trained(name) and name not in LIBRARY and parse(name)[0].shaped


def takes(name: str, tree: TreePolicy) -> bool:
    """Whether a method that has a tree of its own can be given this one instead, to be compared with others on it."""
    return isinstance(tree, StaticTree) and shaped(name) or not trained(name) and trained(inner(name))


def samples(name: str) -> bool:
    """Whether the trees of a kind carry the distributions they were drawn from."""
    kind, argument = parse(name)
    return kind.samples(argument)


def retrieves(name: str) -> bool:
    return name not in LIBRARY and not trained(name) and parse(name)[0].retrieves


def check_vocabulary(datastore: Datastore, target: str, tokenizer) -> None:
    """Raises UserError for a datastore of another tokenizer."""
    own, theirs = Renderer.of(tokenizer).fingerprint, datastore.about.get("vocabulary")
    if own != theirs:
        raise UserError(
            f"datastore {datastore.folder}: found tokens of {datastore.about.get('target')} (vocabulary {theirs}), "
            f"expected those of {target} (vocabulary {own})"
        )


def places(name: str) -> list[str]:
    """Where the trained drafters in a method lie: they say what target it is for."""
    if name in LIBRARY:
        return []
    kind, argument = parse(name)
    if kind is None:
        return [base_of(name) or name]
    return [place for method in kind.methods(argument) for place in places(method)]
