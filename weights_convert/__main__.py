"""Convert published weights into a folder that jaxdiff reads; the first word says what kind of model they are.

    python -m weights_convert ddpm google/ddpm-celebahq-256 weights/celebahq

Writes into OUT: config.json and safetensors.
"""

import importlib
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from jaxdiff.command import print_commands, run_command

COMMANDS = {
    "ddpm": "a pixel-space UNet: a folder or hub name of diffusers, or the course's UNet.pt",
}


@dataclass(frozen=True)
class Config:
    """Convert published weights into a folder that jaxdiff reads."""

    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE")]
    """Folder or file with the weights, or OWNER/NAME of a model on the Hugging Face hub."""
    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
    """Folder to write into; an earlier conversion there is replaced, anything else is refused."""
    revision: str | None = None
    """Branch, tag or commit on the hub; None means the newest. Only with a hub name."""


def main() -> int:
    """Hand the remaining arguments to the conversion that the first one names."""
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name not in COMMANDS:
        return print_commands("python -m weights_convert", "SOURCE OUT", COMMANDS, name)

    def run(config: Config) -> list[Path]:
        conversion = importlib.import_module(f"weights_convert.{name}")
        return conversion.run(config.source, config.out, config.revision)

    return run_command(name, Config, run, sys.argv[2:], program="python -m weights_convert")


if __name__ == "__main__":
    sys.exit(main())
