"""Conversions as a user runs them, and a tiny model of diffusers to convert."""

import json
import re
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from unittest.mock import Mock

import huggingface_hub
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


def write_bin_shards(path: Path, tensors: Mapping[str, torch.Tensor]) -> Path:
    """Write a state dict as two files of torch in the place of one called `path`; return their index."""
    names = sorted(tensors)
    weight_map = {name: f"{path.stem}-{1 + i % 2:05}-of-00002.bin" for i, name in enumerate(names)}
    for file in set(weight_map.values()):
        torch.save({name: tensors[name] for name in names if weight_map[name] == file}, path.with_name(file))
    index = path.with_name(f"{path.name}.index.json")
    index.write_text(json.dumps({"metadata": {"total_size": 0}, "weight_map": weight_map}))
    return index


def play_hub(patch: pytest.MonkeyPatch, remote: Path, cache: Path) -> list[tuple[str, str | None]]:
    """Put a folder in the place of the hub, and another in that of its cache; return a list of what is asked for."""
    asked: list[tuple[str, str | None]] = []

    def download(name, file, revision, subfolder):
        asked.append((name, revision))
        file = f"{subfolder}/{file}" if subfolder else file
        if not (remote / file).is_file():
            raise huggingface_hub.errors.RemoteEntryNotFoundError("404", response=Mock())
        (cache / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(remote / file, cache / file)
        return str(cache / file)

    patch.setattr("jaxdiff.io.hub.is_reachable", lambda: True)
    patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    patch.setattr(huggingface_hub, "hf_hub_download", download)
    return asked


def change_json(path: Path, changes: dict):
    """Set some fields of a JSON object."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
