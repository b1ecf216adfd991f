"""What a command prints as a sentence, not as a traceback: two exceptions, and all that tell of too little memory."""


class InputError(ValueError):
    """Something the user gave (flag, folder, file) cannot be used; the message names it, the rule and the fix."""


class InterruptedRun(Exception):  # noqa: N818 (an outcome, not a fault)
    """The user or the scheduler stopped the run; the message says what was saved and how to go on."""


def wants_memory(error: Exception) -> bool:
    """Tell whether an error says that a device or the machine is out of memory."""
    # Told by its name, because importing jax here would slow --help down.
    on_device = type(error).__name__ == "JaxRuntimeError" and str(error).startswith("RESOURCE_EXHAUSTED")
    return on_device or isinstance(error, MemoryError)
