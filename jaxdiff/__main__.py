"""`jaxdiff COMMAND ...` and `python -m jaxdiff COMMAND ...`: the same as `python -m jaxdiff.COMMAND ...`."""

import importlib
import sys

COMMANDS = {
    "train_cfg": "train a class- and domain-conditional diffusion model, sample it, judge it",
    "sample_cfg": "sample and judge a trained run again, with other guidance, steps or seeds",
    "zeroshot": "classify pictures by the names of their classes alone, with CLIP",
}


def main() -> int:
    """Hand the remaining arguments to the command that the first one names."""
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in COMMANDS:
        return importlib.import_module(f"jaxdiff.{name}").main(sys.argv[2:])
    listing = "\n".join(f"  {command:<12} {does}" for command, does in COMMANDS.items())
    usage = f"usage: jaxdiff COMMAND [OPTIONS]\n\ncommands:\n{listing}\n\njaxdiff COMMAND --help lists the options."
    if name in ("-h", "--help"):
        print(usage)
        return 0
    print(f"jaxdiff: error: no command {name!r}\n\n{usage}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
