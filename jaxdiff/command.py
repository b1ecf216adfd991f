"""How every command starts and ends: parse flags, run, print an error as one sentence.

Exit codes: 0 done, 2 the input cannot be used, 130 interrupted (saved; run again to go on).
"""

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

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
        config = tyro.cli(config_class, prog=f"jaxdiff {name}", args=args, config=(tyro.conf.OmitArgPrefixes,))
        paths = run(config)
    except InterruptedRun as stop:
        print(f"\njaxdiff {name}: {stop}", file=sys.stderr)
        return 130
    except KeyboardInterrupt:
        print(f"\njaxdiff {name}: interrupted", file=sys.stderr)
        return 130
    except (InputError, OSError) as error:
        if os.environ.get("JAXDIFF_TRACEBACK"):
            raise
        print(f"jaxdiff {name}: error: {error}", file=sys.stderr)
        return 2
    print("\nWritten:")
    for path in paths:
        print(f"  {path}")
    return 0
