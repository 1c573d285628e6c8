"""Names of methods: one table says what each stands for, what it needs and what it refuses."""

import pytest

from draftsmith.launch import drafters
from draftsmith.launch.drafters import KINDS, Drafters, Kind, grows, parse, places, retrieves, shaped, takes, trained
from draftsmith.launch.methods import labels
from draftsmith.models.drafters import HeadDrafter, NoDrafter
from draftsmith.models.drafters.howl import HowlDrafter
from draftsmith.models.errors import UserError
from draftsmith.models.formats import save_drafter
from draftsmith.models.grow import chain, parse_tree
from tests.conftest import tiny_head


def test_a_name_is_a_kind_a_loop_of_the_library_or_a_place():
    for name, kind, argument in (
        ("suffix", "suffix", ""),
        ("howl:bundled:drafters/x", "howl", "bundled:drafters/x"),
        ("bundled:drafters/x", None, "bundled:drafters/x"),
        ("./suffix", None, "./suffix"),
    ):
        assert parse(name) == (kind and KINDS[kind], argument)
    assert [name for name in ("plain", "howl:d", "hf-lookup", "runs/d") if trained(name)] == ["runs/d"]
    assert [name for name in ("plain", "howl:d", "hf-lookup", "runs/d") if grows(name)] == ["howl:d", "runs/d"]
    assert [places(name) for name in ("lookup", "hf-lookup", "d", "howl:d")] == [[], [], ["d"], ["d"]]


def test_a_kind_that_widens_others_takes_what_they_take():
    names = (
        "reader",
        "reader:runs/d",
        "reader:stand",
        "reader:stand:deterministic",
        "howl:d",
        "stand",
        "hf-lookup",
        "d",
    )
    assert [name for name in names if grows(name)] == [*names[1:6], "d"]
    assert [name for name in names if shaped(name)] == ["reader:stand", "reader:stand:deterministic", "stand"]
    assert [name for name in names if takes(name, chain(2))] == [*names[1:4], "stand"]
    assert [name for name in names if takes(name, parse_tree("dynamic:3x4x10"))] == ["reader:runs/d"]
    assert [places(name) for name in names[:4]] == [[], ["runs/d"], [], []]
    assert [retrieves(name) for name in names] == [True] * 4 + [False] * 4


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("howl", "howl: found no drafter behind it, expected howl:DRAFTER"),
        ("howl:", "howl: found no drafter behind it, expected howl:DRAFTER"),
        ("suffix:3", "suffix:3: found 3 behind suffix, expected suffix alone"),
        ("reader:suffix", "reader: found suffix behind it, expected a drafter, stand or nothing"),
        ("reader:reader", "reader: found reader behind it, expected a drafter, stand or nothing"),
    ],
)
def test_arguments_that_are_missing_or_too_many(name, message):
    with pytest.raises(UserError, match=f"^{message}$"):
        places(name)


def test_any_method_may_be_given_a_name():
    assert labels(["a=howl:runs/d", "lookup", "howl:x=y", "b=suffix", "runs/a=b"]) == {
        "a": "howl:runs/d",
        "lookup": "lookup",
        "howl:x=y": "howl:x=y",
        "b": "suffix",
        "a=b": "runs/a=b",
    }


def test_a_new_kind_is_one_line_of_the_table(target, tmp_path, monkeypatch):
    """A kind over other methods: it is parsed, says what target it is for, and shares the head that they draft with."""
    place = str(save_drafter(tiny_head(target, 40), tmp_path / "drafter", {"target": "t"}))

    class First:
        def __init__(self, members):
            self.members = members

    first = Kind(
        "first[:METHOD,METHOD]",
        lambda known, argument, tree: First([known.drafter(name, tree) for name in argument.split(",") if name]),
        lambda argument: [name for name in argument.split(",") if name],
    )
    monkeypatch.setitem(KINDS, "first", first)
    name = f"first:{place},howl:{place},plain"
    assert places(name) == [place, place] and places("first") == []
    known = Drafters(target, "")
    head, howl, plain = known.drafter(name, chain(2)).members
    assert isinstance(head, HeadDrafter) and isinstance(howl, HowlDrafter) and isinstance(plain, NoDrafter)
    assert head.head is howl.head.head and howl.head.policy == chain(2)
    assert known.drafter(f"howl:{place}").head.policy == drafters.HOWL_TREE
    assert known.drafter("first").members == []
