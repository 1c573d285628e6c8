"""Where answers end: at every id with which the generation config, the model's config, the tokenizer or the chat
template ends them.

Checkpoints often disagree on it, and an answer that runs past its end is measured and taught as if the target had
written it so.
"""

from collections.abc import Iterable
from dataclasses import dataclass

ANSWER = "xyzzy"  # stands in no template


@dataclass(frozen=True)
class Stops:
    """sources: the ids of each source that names any, the one that engines stop at first; wrong: one line for each
    value that is no id of the target.
    """

    sources: dict[str, frozenset[int]]
    wrong: tuple[str, ...] = ()

    @classmethod
    def of(cls, target, reader) -> "Stops":
        """target: `TextTarget` or `Description`; reader: its tokenizer, or the `Reader` of one that sees."""
        sources, wrong = {}, []
        for name, source in (
            ("generation_config.json", target.generation_config),
            ("config.json", target.config),
            ("the tokenizer", reader),
        ):
            found = getattr(source, "eos_token_id", None)
            ids = [] if found is None else found if isinstance(found, (list, tuple)) else [found]
            known = [type(i) is int and 0 <= i < target.vocab_size for i in ids]
            good = frozenset(i for i, right in zip(ids, known) if right)
            if found is not None and not (ids and all(known)):
                wrong.append(
                    f"{name}: eos_token_id: found {found!r}, expected ids from 0 to {target.vocab_size - 1}; what is "
                    f"none is left out"
                )
            if good:
                sources[name] = good
        closing = template_end(reader)
        if closing is not None and closing < target.vocab_size:
            sources["the chat template"] = frozenset([closing])
        return cls(sources, tuple(wrong))

    @property
    def ids(self) -> set[int]:
        return set().union(*self.sources.values())

    def notes(self) -> list[str]:
        """A line for each value that is no id, and one where another source adds ids to those of the first, or where
        none names any.
        """
        said = list(self.wrong)
        if not self.sources:
            return [*said, "no stop id is known: every answer goes on as far as it may"]
        first, *_ = self.sources.values()
        if self.ids > first:
            each = ", ".join(f"{name} says {listed(ids)}" for name, ids in self.sources.items())
            said.append(f"stop ids differ: {each}; an answer ends at any of {listed(self.ids)}")
        return said


def listed(ids: Iterable[int]) -> str:
    return " or ".join(map(str, sorted(ids)))


def template_end(reader) -> int | None:
    """The id of the special token with which the chat template closes the last answer of a conversation; None where it
    closes it with none, or takes no such conversation.
    """
    tokenizer, renderer = getattr(reader, "tokenizer", reader), getattr(reader, "processor", reader)
    said = (lambda text: text) if tokenizer is reader else (lambda text: [{"type": "text", "text": text}])
    asked = [{"role": "user", "content": said("?")}, {"role": "assistant", "content": said(ANSWER)}]
    try:
        before, answer, behind = renderer.apply_chat_template(asked, tokenize=False).rpartition(ANSWER)
    except Exception:  # templates refuse in ways of their own; what needs one says so
        return None
    ids = tokenizer(behind.lstrip(), add_special_tokens=False)["input_ids"] if answer else []
    special = {*getattr(tokenizer, "added_tokens_decoder", ()), *tokenizer.all_special_ids}
    return ids[0] if ids and ids[0] in special else None
