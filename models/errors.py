"""The exceptions that a user is meant to read."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager


class UserError(Exception):
    """Bad input: one line naming the file, key or row, the value found and the value expected. Exit code 2, no
    traceback. Whatever the input holds, the line is one and can be printed.
    """

    def __init__(self, message=""):
        line = str(message).replace("\r", "\\r").replace("\n", "\\n")
        super().__init__(line.encode("utf-8", "backslashreplace").decode())


SHOWN = 6  # differences named in one message


def differing_keys(place: str, differences: list[str], expected: int) -> UserError:
    """What a file of weights has otherwise than it should. differences: `key: what`, one a key; expected: how many keys
    it should have.
    """
    if len(differences) == 1:
        return UserError(f"{place}: {differences[0]}")
    more = f"; and {len(differences) - SHOWN} more" if len(differences) > SHOWN else ""
    shown = "; ".join(differences[:SHOWN])
    return UserError(f"{place}: found {len(differences)} differences from the {expected} expected keys: {shown}{more}")


class ProcessError(UserError):
    """One that a single process meets, a full disk say: it prints it itself, whatever its rank."""


class Interrupted(KeyboardInterrupt):
    """Ctrl-C in the middle of work of which something is kept: one line that says what, and how to go on."""


@contextmanager
def keeping(line: Callable[[], str]) -> Iterator[None]:
    """A block that Ctrl-C leaves as `Interrupted`, with the line as it is then."""
    try:
        yield
    except Interrupted:
        raise
    except KeyboardInterrupt:
        raise Interrupted(line()) from None
