"""The two errors that a command turns into one sentence and an exit code."""


class UserError(ValueError):
    """The user's words or files are wrong: the command prints the message and exits with 2.

    The message is one sentence that says what is wrong and how to mend it.
    """


class RunError(RuntimeError):
    """The job failed while running (non-finite loss, full disk, collapse): exit code 1."""
