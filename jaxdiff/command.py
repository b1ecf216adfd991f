"""How every command starts and ends: parse flags, run, print an error as one sentence.

Exit codes: 0 done, 2 the input cannot be used, 130 interrupted (saved; run again to go on).
"""

import os
import sys
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Annotated, TypeVar

import tyro

from jaxdiff.errors import InputError, InterruptedRun

ConfigType = TypeVar("ConfigType")


def run_command(
    name: str,
    config_class: type[ConfigType],
    run: Callable[[ConfigType], Sequence[Path]],
    args: Sequence[str] | None = None,
) -> int:
    """Parse `args` into `config_class`, call `run` on it, print the paths it returns.

    Args:
      name: the command as typed after `python -m jaxdiff.`.
      config_class: frozen dataclass whose fields are the flags.
      run: does the work and returns the paths that it wrote.
      args: command line without the program; None means `sys.argv[1:]`.

    Returns:
      The exit code.
    """
    try:
        paths = run(parse(name, config_class, sys.argv[1:] if args is None else args))
    except InterruptedRun as stop:
        print(f"\njaxdiff {name}: {stop}", file=sys.stderr)
        return 130
    except KeyboardInterrupt:
        print(f"\njaxdiff {name}: interrupted; run the same command again to go on", file=sys.stderr)
        return 130
    except Exception as error:
        sentence = explain(error)
        if sentence is None or os.environ.get("JAXDIFF_TRACEBACK"):
            raise
        print(f"jaxdiff {name}: error: {sentence}", file=sys.stderr)
        return 2
    print("\nWritten:")
    for path in paths:
        print(f"  {path}")
    return 0


def parse(name: str, config_class: type[ConfigType], args: Sequence[str]) -> ConfigType:
    """Return the config that the flags describe; tyro itself answers --help and flags that it cannot read.

    Raises:
      InputError: the config refuses a value, or a value is empty.
    """
    for before, arg in pairwise([f"jaxdiff {name}", *args]):
        # Else --out "$RUN" with RUN unset would mean the current folder.
        if not arg or (arg.startswith("--") and arg.endswith("=")):
            raise InputError(f"the value after {arg[:-1] or before} is empty; is a shell variable unset?")

    # tyro breaks up and boxes what a class refuses; what the argument of a function refuses comes through.
    def given(config: Annotated[config_class, tyro.conf.arg(name="")]):  # type: ignore[valid-type]
        return config

    return tyro.cli(
        given,
        prog=f"jaxdiff {name}",
        description=config_class.__doc__,
        args=args,
        config=(tyro.conf.OmitArgPrefixes,),
    )


def explain(error: Exception) -> str | None:
    """Return the sentence for an error that the user can do something about, else None."""
    if isinstance(error, InputError | OSError):
        return str(error)
    # Told by its name, because importing jax here would slow --help down.
    on_device = type(error).__name__ == "JaxRuntimeError" and str(error).startswith("RESOURCE_EXHAUSTED")
    if on_device or isinstance(error, MemoryError):
        return f"out of memory, use a smaller batch size ({next(iter(str(error).splitlines()), type(error).__name__)})"
    return None
