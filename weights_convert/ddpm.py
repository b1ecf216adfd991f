"""Pixel-space UNets: a diffusers folder with a UNet2DModel, or the course's bare UNet.pt.

    python -m weights_convert ddpm google/ddpm-celebahq-256 weights/celebahq
    python -m weights_convert ddpm hw2_data/face/UNet.pt weights/face

Writes what `jaxdiff.recipes.pretrained_unet` loads.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxdiff.errors import InputError
from jaxdiff.io.file_kinds import check_kind
from jaxdiff.io.hub import open_model
from jaxdiff.io.pretrained_files import DIFFUSERS as FILES
from jaxdiff.io.pretrained_files import candidates, find_weights, read_tensors, say_if_variant
from jaxdiff.io.weights import flatten_params, spec_of, unflatten_params
from jaxdiff.models.unet import PRETRAINED, UNetConfig
from jaxdiff.recipes.diffusers_scheduler import read_scheduler
from jaxdiff.recipes.pretrained_unet import (
    CONFIG,
    FORMAT,
    WEIGHTS,
    ForwardProcess,
    PretrainedConfig,
    SamplingDefaults,
    Source,
    save_pretrained_unet,
    unet_shapes,
)
from weights_convert.diffusers_config import translate_unet
from weights_convert.output import check_output
from weights_convert.rules import Rule, convert
from weights_convert.source import Open, digest, find_source
from weights_convert.unet_tables import DIFFUSERS, FREQUENCIES, course_rules

WEIGHTS_OF_DIFFUSERS = candidates(FILES, "never")
SCHEDULERS = ("scheduler/scheduler_config.json", "scheduler_config.json")
COURSE = "course-face"
COURSE_IMAGE_SIZE = 256
COURSE_SAMPLING = SamplingDefaults(spacing="leading", steps_offset=1, final=0, clip=False)
"""Timesteps 1, 21, .., 981 of 50, the last step down to timestep 0: what reproduces the course's pictures."""


def run(source: str, out: Path, revision: str | None = None) -> list[Path]:
    """Convert one model and return the paths that were written.

    Raises:
      InputError: the source is missing, damaged, or not a UNet that jaxdiff has.
    """
    folder = check_output(out, FORMAT, (CONFIG, WEIGHTS))
    path = find_source(source, fetch_files, revision)
    params, config = convert_folder(source, path) if path.is_dir() else convert_course(source, path)
    print(
        f"{source}: {sum(leaf.size for leaf in flatten_params(params).values()):,} parameters, "
        f"{config.image_size}x{config.image_size} pixels\n  {config.diffusion}\n  {config.sampling}"
    )
    return save_pretrained_unet(folder, params, config)


def fetch_files(name: str, open_part: Open) -> None:
    """Fetch what is converted of a pipeline of diffusers, or of its model alone."""
    whole = open_part("")
    part = "unet" if whole("unet/config.json") else ""
    if not part:
        whole("config.json")
    for scheduler in SCHEDULERS:
        whole(scheduler)
    find_weights(name, open_part(part), WEIGHTS_OF_DIFFUSERS)


def convert_folder(name: str, folder: Path) -> tuple[dict[str, Any], PretrainedConfig]:
    """Return the parameters and the config of a pipeline folder of diffusers, or of a folder of its model alone."""
    model = folder / "unet" if (folder / "unet").is_dir() else folder
    unet, image_size = translate_unet(model / "config.json")
    found = [folder / name for name in SCHEDULERS if (folder / name).is_file()]
    diffusion, sampling = ForwardProcess(), SamplingDefaults()
    if found:
        diffusion, defaults, sampler = read_scheduler(found[0])
        found_own = [of for name, of in defaults.items() if name == sampler]
        if not found_own:
            print(f"{name}: jaxdiff does not have the sampler of {sampler}, so DDIM takes its settings")
        sampling = found_own[0] if found_own else defaults["ddim"]
    else:
        print(f"{name}: no scheduler_config.json, so schedule and sampling are set as in DDPM (arXiv 2006.11239)")
    weights = find_weights(str(model), open_model(model), WEIGHTS_OF_DIFFUSERS)
    say_if_variant(str(model), weights)
    source = Source(name, digest(weights))
    try:
        config = PretrainedConfig(unet, image_size, diffusion, sampling, source)
    except ValueError as error:
        raise InputError(f"{model / 'config.json'}: {error}") from error
    return convert_tensors(str(weights), read_tensors(weights), DIFFUSERS, unet), config


def convert_course(name: str, path: Path) -> tuple[dict[str, Any], PretrainedConfig]:
    """Return the parameters and the config of the course's face model."""
    unet = UNetConfig(**PRETRAINED[COURSE])
    tensors = read_tensors(path)
    if "conv_in.weight" in tensors:
        raise InputError(f"{path}: weights of diffusers, which need the config.json beside them; name their folder")
    check_kind(str(path), tensors, "course")
    params = convert_tensors(str(path), tensors, course_rules(unet), unet)
    if FREQUENCIES in tensors:
        check_frequencies(path, tensors[FREQUENCIES], unet.block_out_channels[0])
    source = Source(name, digest(path))
    return params, PretrainedConfig(unet, COURSE_IMAGE_SIZE, ForwardProcess(), COURSE_SAMPLING, source)


def convert_tensors(
    origin: str, tensors: Mapping[str, np.ndarray], rules: tuple[Rule, ...], unet: UNetConfig
) -> dict[str, Any]:
    """Return the parameter tree that the rules make for a network."""
    wanted = {name: spec_of(leaf) for name, leaf in flatten_params(unet_shapes(unet)).items()}
    return unflatten_params(convert(origin, tensors, rules, wanted))


def check_frequencies(path: Path, found: np.ndarray, features: int) -> None:
    """Check that the course's buffer holds the frequencies of which our embedding has the formula.

    Raises:
      InputError: it does not, so the timesteps would be told to the network in other words than it learned.
    """
    expected = 10_000.0 ** (-np.arange(0, features, 2) / features)
    if not (found.shape == expected.shape and np.allclose(found, expected, rtol=1e-5, atol=0)):
        raise InputError(f"{path}: {FREQUENCIES} is not 10000^(-2j/{features}); is it another model's?")
