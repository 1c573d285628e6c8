"""All verification rules by name."""

from draftsmith.eval.rejection import Rejection
from draftsmith.eval.spectr import KSeq
from draftsmith.eval.traversal import BLOCK, Traversal
from draftsmith.eval.typical import Typical
from draftsmith.eval.verify import MATCH, Verifier
from draftsmith.models.errors import UserError

RULES: dict[str, Verifier] = {rule.name: rule for rule in (MATCH, Rejection(), Traversal(), BLOCK, KSeq(), Typical())}


def parse_rule(text: str) -> Verifier:
    """A rule by its name; raises UserError that lists the names and says which one is lossy."""
    if text not in RULES:
        raise UserError(f"verifier: found {text!r}, expected {', '.join(name + ('' if rule.lossless else ' (lossy)') for name, rule in RULES.items())}")
    return RULES[text]
