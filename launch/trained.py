"""What a drafter was trained for, as its draftsmith.json tells: for cards, and for whoever asks an engine for more."""

from dataclasses import dataclass

from draftsmith.models.errors import UserError
from draftsmith.models.formats.layout import Stored

NOT_RECORDED = "not recorded"


def section(document: dict, name: str) -> dict:
    found = document.get(name)
    return found if isinstance(found, dict) else {}


@dataclass(frozen=True)
class Trained:
    """None stands for what is not recorded.

    steps: drafted levels; context: tokens of the longest row; temperatures: of the answers, None in it for answers that
    do not say; laws: theirs beside the temperatures (top_k and the like), with None likewise; template_variables: those
    of the chat template with the values that they had, None where it was left to its default.
    """

    steps: int | None = None
    context: int | None = None
    temperatures: list[float | None] | None = None
    laws: list[dict | None] | None = None
    template_variables: dict | None = None

    @classmethod
    def of(cls, stored: Stored) -> "Trained":
        """`trained` of draftsmith.json; of a directory that was written without it, what the recipe says. Raises
        UserError for a value of another kind.
        """
        recipe = section(stored.about, "recipe")
        steps, context = section(recipe, "objective").get("steps"), section(recipe, "data").get("max_length")
        found = section(stored.about, "trained") or {"steps": steps, "context": context}
        kinds = {"steps": int, "context": int, "temperatures": list, "laws": list, "template_variables": dict}
        for name, kind in kinds.items():
            if not isinstance(found.get(name), kind | None):
                raise UserError(
                    f"{stored.folder}/draftsmith.json: trained.{name}: found {found[name]!r}, expected "
                    f"{kind.__name__} or null"
                )
        return cls(**{name: found.get(name) for name in kinds})

    def exceeded(self, depth: int, context: int) -> list[str]:
        """One line for each thing in which serving goes beyond the training: depth drafted tokens, a target that takes
        `context` tokens.
        """
        lines = []
        if self.steps is None:
            lines.append(f"trained steps: {NOT_RECORDED}; {depth} drafted tokens are asked for")
        elif depth > self.steps:
            lines.append(
                f"warning: {depth} drafted tokens are asked for, {self.steps} steps were trained; measure what the "
                f"tokens behind them gain before serving them"
            )
        if self.context is None:
            lines.append(f"trained context: {NOT_RECORDED}; the target takes {context:,} tokens")
        elif context > self.context:
            lines.append(
                f"warning: the target takes {context:,} tokens, rows of at most {self.context:,} were trained on; "
                f"measure long prompts before serving them"
            )
        return lines

    def lines(self) -> list[str]:
        """A list in Markdown, for the card."""
        steps = NOT_RECORDED if self.steps is None else f"{self.steps} (deeper ones were not trained)"
        context = NOT_RECORDED if self.context is None else f"rows of at most {self.context:,} tokens"
        return [
            f"- drafted tokens: {steps}",
            f"- context: {context}",
            f"- answers of the target: {self._answers()}",
            f"- variables of the chat template: {self._variables()}",
        ]

    def _answers(self) -> str:
        if self.temperatures is None:
            return NOT_RECORDED
        said = ["greedy" if t == 0 else f"sampled at T = {t:g}" for t in self.temperatures if t is not None]
        said += [f"some with a temperature that is {NOT_RECORDED}"] * (None in self.temperatures)
        return ", ".join(said) + "".join(f"; {self._law(law)}" for law in self.laws or ())

    def _law(self, law: dict | None) -> str:
        if law is None:
            return f"some with cuts and penalties that are {NOT_RECORDED}"
        return "with " + ", ".join(f"{name.replace('_', ' ')} {value:g}" for name, value in sorted(law.items()))

    def _variables(self) -> str:
        if self.template_variables is None:
            return NOT_RECORDED
        said = [f"`{k}` {'left unset' if v is None else f'= {v}'}" for k, v in self.template_variables.items()]
        return ", ".join(said) or "it has none"
