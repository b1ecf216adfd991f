"""Convert published weights into a folder that jaxdiff reads; the first word says what kind of model they are.

    python -m weights_convert ddpm google/ddpm-celebahq-256 weights/celebahq

    python -m weights_convert stable_diffusion v1-5-pruned.safetensors weights/sd15

Writes into OUT: config.json and safetensors; or one safetensors file.
"""

import importlib
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from jaxdiff.command import print_commands, run_command

COMMANDS = {
    "ddpm": "a pixel-space UNet: a folder or hub name of diffusers, or the course's UNet.pt",
    "stable_diffusion": "Stable Diffusion 1.x or 2.x: a folder of diffusers, or a single file; one from the other",
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


@dataclass(frozen=True)
class StableDiffusionConfig:
    """Convert Stable Diffusion between single files and folders of diffusers, all bits kept."""

    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE")]
    """Single file (.safetensors, .ckpt), folder, or OWNER/NAME of a folder on the Hugging Face hub."""
    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
    """Single file to write, ending in .safetensors, or folder; an earlier conversion there is replaced, anything else
    refused."""
    revision: str | None = None
    """Branch, tag or commit on the hub; None means the newest. Only with a hub name."""
    tokenizer: str | None = None
    """Folder or hub name with vocab.json and merges.txt, which a single file lacks; None means
    openai/clip-vit-large-patch14. Only from a single file to a folder."""
    ema: bool = False
    """Take the averaged weights that full checkpoints hold beside the last. Only with a single file."""
    prediction_type: Literal["epsilon", "v"] | None = None
    """What the network predicts; None means as the file's metadata or its tensor v_pred say, else epsilon. v for the
    768-pixel models of 2.x. Only with a single file."""


CONFIGS: dict[str, type] = {"ddpm": Config, "stable_diffusion": StableDiffusionConfig}


def main() -> int:
    """Hand the remaining arguments to the conversion that the first one names."""
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name not in COMMANDS:
        return print_commands("python -m weights_convert", "SOURCE OUT", COMMANDS, name)

    def run(config: object) -> list[Path]:
        return importlib.import_module(f"weights_convert.{name}").run(**vars(config))

    return run_command(name, CONFIGS[name], run, sys.argv[2:], program="python -m weights_convert")


if __name__ == "__main__":
    sys.exit(main())
