"""How every command starts and ends: parse flags, run, print an error as one sentence.

Exit codes: 0 done, 2 the input cannot be used, 3 another process of the run was lost, 130 interrupted (saved; run again
to go on).
"""

import os
import sys
import traceback
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import is_dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated, TypeVar, cast, get_args, get_origin, get_type_hints

import tyro

from jaxdiff import processes
from jaxdiff.errors import InputError, InterruptedRun, wants_memory
from jaxdiff.freed_memory import keep_freed_memory
from jaxdiff.io.cache import keep_compiled
from jaxdiff.io.interruption import INTERRUPTED, obey_signals
from jaxdiff.io.weight_files import forget_weights
from jaxdiff.settings import as_flag

ConfigType = TypeVar("ConfigType")
INTERRUPTED_SENTENCE = "interrupted; run the same command again to go on"


def run_command(
    name: str,
    config_class: type[ConfigType],
    run: Callable[[ConfigType], Sequence[Path]],
    args: Sequence[str] | None = None,
    program: str = "jaxdiff",
) -> int:
    """Parse `args` into `config_class`, call `run` on it, print the paths it returns.

    Args:
      name: the command as typed after `jaxdiff`.
      config_class: frozen dataclass whose fields are the flags.
      run: does the work and returns the paths that it wrote.
      args: command line without the program; None means `sys.argv[1:]`.
      program: what is typed before the name.

    Returns:
      The exit code.
    """
    command = f"{program} {name}"
    try:
        forget_weights()
        keep_freed_memory()
        keep_compiled()
        config = parse(command, config_class, sys.argv[1:] if args is None else args)
        with obey_signals(f"{command}: {INTERRUPTED_SENTENCE}"):
            paths = run(config)
            processes.finish()
    except InterruptedRun as stop:
        print(f"\n{command}: {stop}", file=sys.stderr)
        processes.finish()
        return INTERRUPTED
    except KeyboardInterrupt:
        # CPython would end by SIGINT at last where it interrupted a string that is executed, as dataclasses do: with a
        # new string it forgets that.
        exec("")
        return give_up(command, INTERRUPTED, INTERRUPTED_SENTENCE)
    except Exception as error:
        processes.await_cause(error)
        sentence = explain(error)
        if sentence is None or os.environ.get("JAXDIFF_TRACEBACK"):
            processes.fail(1, f"{type(error).__name__}: {error}", traceback.format_exc())
            raise
        return give_up(command, 2, f"error: {sentence}")
    if paths:
        print("\nWritten:", *(f"  {path}" for path in paths), sep="\n")
    return 0


def give_up(command: str, code: int, sentence: str) -> int:
    """Print why a command ends early, the same to the other processes of its run, and return the exit code."""
    print(("\n" if code == INTERRUPTED else "") + f"{command}: {sentence}", file=sys.stderr)
    processes.fail(code, sentence)
    return code


def print_commands(program: str, arguments: str, commands: Mapping[str, str], word: str) -> int:
    """Print the list of commands, as help or because `word` names none of them; return the exit code."""
    width = max(map(len, commands))
    listing = "\n".join(f"  {command:<{width}}  {does}" for command, does in commands.items())
    more = f"{program} COMMAND --help lists the options."
    usage = f"usage: {program} COMMAND {arguments}\n\ncommands:\n{listing}\n\n{more}"
    if word in ("-h", "--help"):
        print(usage)
        return 0
    print(f"{program}: error: no command {word!r}\n\n{usage}", file=sys.stderr)
    return 2


MAY_BE_EMPTY = {"--negative"}
"""Flags whose empty value means something."""


def parse(command: str, config_class: type[ConfigType], args: Sequence[str]) -> ConfigType:
    """Return the config that the flags describe; tyro itself answers --help and flags that it cannot read.

    Raises:
      InputError: the config refuses a value, or a value is empty.
    """
    for before, arg in pairwise([command, *args]):
        # Else --out "$RUN" with RUN unset would mean the current folder.
        if (not arg or (arg.startswith("--") and arg.endswith("="))) and (arg[:-1] or before) not in MAY_BE_EMPTY:
            raise InputError(f"the value after {arg[:-1] or before} is empty; is a shell variable unset?")
        if any("\ud800" <= letter <= "\udfff" for letter in arg):
            raise InputError(f"{arg!r} is not UTF-8")

    # tyro breaks up and boxes what a class refuses; what the argument of a function refuses comes through.
    def given(config: Annotated[config_class, tyro.conf.arg(name="")]):  # type: ignore[valid-type]
        return config

    return tyro.cli(
        given,
        prog=command,
        description=config_class.__doc__,
        args=join_repeated(args, list_flags(config_class)),
        config=(tyro.conf.OmitArgPrefixes,),
    )


def list_flags(config_class: type) -> set[str]:
    """Return the flags of a config that take any number of values."""
    found = set()
    for name, hint in get_type_hints(config_class).items():
        if is_dataclass(hint):
            found |= list_flags(cast(type, hint))
        elif any(get_origin(choice) is tuple and Ellipsis in get_args(choice) for choice in (hint, *get_args(hint))):
            found.add(as_flag(name))
    return found


def join_repeated(args: Sequence[str], lists: Collection[str]) -> list[str]:
    """Return the arguments with all values of a flag of `lists` after its first mention, of which tyro takes the last.

    Of other flags the last counts, as it does in most commands, so that a script may add to what it is given.
    """
    parts: list[list[str]] = [[]]
    first: dict[str, list[str]] = {}
    part = parts[0]
    for arg in args:
        name, *value = arg.split("=", 1)
        flag = as_flag(name[2:])
        if not arg.startswith("--"):
            part.append(arg)
        elif flag in lists and flag in first:
            part = first[flag]
            part[:1] = part[0].split("=", 1)
            part += value
        else:
            part = first[flag] = [arg]
            parts.append(part)
    return [arg for part in parts for arg in part]


def explain(error: Exception) -> str | None:
    """Return the sentence for an error that the user can do something about, else None."""
    if isinstance(error, InputError | OSError):
        return str(error)
    if wants_memory(error):
        return f"out of memory, use a smaller batch size ({next(iter(str(error).splitlines()), type(error).__name__)})"
    return None
