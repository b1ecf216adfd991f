"""Commands as a user runs them, in this process or in one of their own; what they answer; and the smallest real run."""

import contextlib
import io
import os
import re
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

TINY_SAMPLING = ["--samples-per-class=2", "--deliver=2", "--num-steps=3", "--sample-batch-size=20"]
TINY_RUN = [
    "--data=digits",
    "--devices=1",
    "--preset=tiny",
    "--train-steps=8",
    "--batch-size=8",
    "--warmup-steps=2",
    "--log-every=1",
    "--save-every=4",
    "--sample-every=3",
    "--judge-steps=5",
    *TINY_SAMPLING,
]


def xla_flags(devices: int) -> str:
    """Return what XLA_FLAGS asks for in tests: so many CPU devices, and quick compilation.

    XLA's older code for fusions rounds a little otherwise and is compiled a third faster.
    """
    return f"--xla_force_host_platform_device_count={devices} --xla_cpu_use_fusion_emitters=false"


class Answer(NamedTuple):
    """Exit code and what was printed."""

    code: int
    out: str
    err: str

    @property
    def written(self) -> list[Path]:
        """The paths that the last printed lines name."""
        return [Path(line.strip()) for line in self.out.split("\nWritten:\n")[1].splitlines()]

    @property
    def sentence(self) -> str:
        """The error message alone: without progress bars, and without the frame and line breaks that tyro adds."""
        lines = [line.split("\r")[-1].strip("│╭╮╰╯─ ") for line in self.err.splitlines()]
        return " ".join(line for line in lines if line and not re.match(r"(judge|training|sampling): ", line))


def run_here(main, *args: str) -> Answer:
    """Call a command's main in this process, where the types of all arguments are checked."""
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        try:
            code = main(list(args))
        except SystemExit as stop:
            code = stop.code
    return Answer(code, out.getvalue(), err.getvalue())


def start(module: str, *args: str, environment: Mapping[str, str] | None = None) -> subprocess.Popen:
    """Start `python -m MODULE ARGS`, with additions to this process's environment."""
    command = [sys.executable, "-m", module, *args]
    # Empty means none, so that no test leaves programs in the user's cache.
    variables = {"JAX_COMPILATION_CACHE_DIR": "", **os.environ, **(environment or {})}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=variables)


def start_several(
    words: list[str], number: int, *args: str, environment: Mapping[str, str] | None = None
) -> list[subprocess.Popen]:
    """Start `python WORDS ARGS` as `number` processes that work together, each with one device."""
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        port = place.getsockname()[1]
    variables = {**os.environ, **(environment or {}), "XLA_FLAGS": xla_flags(1)}
    return [
        subprocess.Popen(
            [sys.executable, *words, *args, f"--distributed=127.0.0.1:{port},{number},{index}"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=variables,
        )
        for index in range(number)
    ]


def finish(process: subprocess.Popen) -> Answer:
    """Wait for a started command."""
    out, err = process.communicate(timeout=300)
    return Answer(process.returncode, out, err)
