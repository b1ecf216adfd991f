"""Conversions as a user runs them, and a tiny model of diffusers to convert."""

import json
import re
import sys
from pathlib import Path

import pytest
import torch
from commands import Answer, run_here
from diffusers import UNet2DModel

from weights_convert import __main__

SIZE = 16


def convert(*words: object, kind: str = "ddpm") -> Answer:
    """Run the command in this process, for a kind of model."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["weights_convert", kind, *map(str, words)])
        return run_here(lambda _: __main__.main())


def refused(answer: Answer, *parts: str):
    """Check that a conversion was refused in one sentence with these parts."""
    assert answer.code == 2, answer
    assert re.match(r"python -m weights_convert (ddpm|stable_diffusion): error: ", answer.err)
    assert answer.err.count("\n") == 1
    for part in parts:
        assert part in answer.err


def randomize(module: torch.nn.Module, spread: float = 0.1) -> torch.nn.Module:
    """Give every parameter noise, so that no layer is the identity or nothing."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(spread * torch.randn_like(parameter))
    return module.eval()


def make_twin(spread: float = 0.1, **changes) -> UNet2DModel:
    """Make a tiny model of the layout of google/ddpm-*: two levels of 16x16 and 8x8 pixels, attention at 8x8."""
    settings = {
        "sample_size": SIZE,
        "block_out_channels": (16, 32),
        "layers_per_block": 1,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        "attention_head_dim": None,
        "norm_num_groups": 8,
        "norm_eps": 1e-6,
        "flip_sin_to_cos": False,
        "freq_shift": 1,
        "downsample_padding": 0,
    }
    torch.manual_seed(0)
    return randomize(UNet2DModel(**{**settings, **changes}), spread)


def change_json(path: Path, changes: dict):
    """Set some fields of a JSON object."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
