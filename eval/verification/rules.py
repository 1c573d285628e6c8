"""All verification rules by name."""

from draftsmith.eval.verification.rejection import Rejection
from draftsmith.eval.verification.spectr import KSeq
from draftsmith.eval.verification.traversal import BLOCK, Traversal
from draftsmith.eval.verification.typical import Typical
from draftsmith.eval.verification.verifier import MATCH, Verifier
from draftsmith.models.errors import UserError

RULES: dict[str, Verifier] = {rule.name: rule for rule in (MATCH, Rejection(), Traversal(), BLOCK, KSeq(), Typical())}


def parse_rule(text: str) -> Verifier:
    """A rule by its name; raises UserError that lists the names and says which one is lossy."""
    if text not in RULES:
        raise UserError(
            f"verifier: found {text!r}, expected "
            f"{', '.join(name + ('' if rule.lossless else ' (lossy)') for name, rule in RULES.items())}"
        )
    return RULES[text]
