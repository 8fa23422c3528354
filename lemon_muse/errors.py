"""The two errors that a command turns into one sentence and an exit code."""


class UserError(ValueError):
    """The user's words or files are wrong: the command prints the message and exits with 2.

    The message is one sentence that says what is wrong and how to mend it.
    """


class RunError(RuntimeError):
    """The job failed while running (non-finite loss, full disk, collapse): exit code 1."""


class Stopped(RunError):  # noqa: N818 - it is no failure
    """A signal ended the job in good order: everything is saved, the same words go on.

    Args:
        message: one sentence.
        again: the scheduler wants it to go on later (SIGUSR2), rather than to end.
    """

    def __init__(self, message: str, *, again: bool = False) -> None:
        super().__init__(message)
        self.again = again
