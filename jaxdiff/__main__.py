"""`jaxdiff COMMAND ...` and `python -m jaxdiff COMMAND ...`: the same as `python -m jaxdiff.COMMAND ...`."""

import importlib
import sys

from jaxdiff.command import print_commands

COMMANDS = {
    "train_cfg": "train a class- and domain-conditional diffusion model, sample it, judge it",
    "sample_cfg": "sample and judge a trained run again, with other guidance, steps or seeds",
    "ddim_grid": "show what DDIM does: etas, ways between noises, step counts, inversion",
    "zeroshot": "classify pictures by the names of their classes alone, with CLIP",
    "clip_scores": "score pictures by CLIP: likeness to references, fit to prompts, the course's grade",
    "text2image": "draw pictures from texts with Stable Diffusion",
    "textual_inversion": "teach Stable Diffusion new words from a few pictures each",
}


def main() -> int:
    """Hand the remaining arguments to the command that the first one names."""
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in COMMANDS:
        return importlib.import_module(f"jaxdiff.{name}").main(sys.argv[2:])
    return print_commands("jaxdiff", "[OPTIONS]", COMMANDS, name)


if __name__ == "__main__":
    sys.exit(main())
