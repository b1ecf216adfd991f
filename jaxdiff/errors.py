"""The two exceptions that a command prints as a sentence instead of a traceback."""


class InputError(ValueError):
    """Something the user gave (flag, folder, file) cannot be used; the message names it, the rule and the fix."""


class InterruptedRun(Exception):  # noqa: N818 (an outcome, not a fault)
    """The user or the scheduler stopped the run; the message says what was saved and how to go on."""
