"""The one exception that a user is meant to read."""


class UserError(Exception):
    """Bad input: one line naming the file, key or row, the value found and the value expected. Exit code 2, no
    traceback.
    """


class ProcessError(UserError):
    """One that a single process meets, a full disk say: it prints it itself, whatever its rank."""
