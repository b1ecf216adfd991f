"""The tables of rules for the two ways in which the tensors of a pixel-space UNet are named."""

from collections.abc import Iterator
from functools import partial

import numpy as np

from jaxdiff.models.unet import UNetConfig
from weights_convert.rules import Rule, Transform, conv_kernel, dense_kernel, keep

FREQUENCIES = "time.0.inv_freq"
"""The course's buffer of the sinusoidal embedding, for which ours has the formula."""


def layer(source: str, target: str, kernel: str, transform: Transform) -> tuple[Rule, Rule]:
    """Return the rules for weight and bias of one layer.

    Args:
      source: pattern of the layer's name.
      target: template of ours.
      kernel: our name of the weight.
      transform: of the weight; a bias stays as it is.
    """
    return (
        Rule(rf"{source}\.weight", ((f"{target}.{kernel}", transform),)),
        Rule(rf"{source}\.bias", ((f"{target}.bias", keep),)),
    )


# --- diffusers' UNet2DModel: our names, but with dots before the indices

_PLACES = (
    ("", ""),
    (r"time_embedding\.", "time_embedding."),
    (r"(down_blocks|up_blocks)\.(\d+)\.(\w+)\.(\d+)\.", r"\1_\2.\3_\4."),
    (r"mid_block\.(\w+)\.(\d+)\.", r"mid_block.\1_\2."),
)
_LAYERS = (
    *((name, name, "kernel", conv_kernel) for name in ("conv_in", "conv1", "conv2", "conv_shortcut", "conv_out")),
    ("conv", "conv", "kernel", conv_kernel),
    *((name, name, "kernel", dense_kernel) for name in ("linear_1", "linear_2", "time_emb_proj")),
    *((name, name, "scale", keep) for name in ("conv_norm_out", "norm1", "norm2", "group_norm")),
    *((name, name, "kernel", dense_kernel) for name in ("to_q", "to_k", "to_v")),
    (r"to_out\.0", "to_out_0", "kernel", dense_kernel),
    # As older diffusers called them, and google/ddpm-* still does.
    ("query", "to_q", "kernel", dense_kernel),
    ("key", "to_k", "kernel", dense_kernel),
    ("value", "to_v", "kernel", dense_kernel),
    ("proj_attn", "to_out_0", "kernel", dense_kernel),
)
DIFFUSERS: tuple[Rule, ...] = tuple(
    rule
    for place, folder in _PLACES
    for source, target, kernel, transform in _LAYERS
    for rule in layer(place + source, folder + target, kernel, transform)
)


# --- the course's UNet: modules numbered in the order of the forward pass


def course_rules(config: UNetConfig) -> tuple[Rule, ...]:
    """Return the table of the course's UNet of this layout; each rule fits one tensor."""
    return tuple(_course_rules(config))


def _course_rules(config: UNetConfig) -> Iterator[Rule]:
    levels = len(config.block_out_channels)
    yield Rule(FREQUENCIES.replace(".", r"\."), ())
    yield from layer(r"time\.1", "time_embedding.linear_1", "kernel", dense_kernel)
    yield from layer(r"time\.3", "time_embedding.linear_2", "kernel", dense_kernel)
    yield from layer("down1", "conv_in", "kernel", conv_kernel)
    number = 1
    for i, attends in enumerate(config.attention):
        for j in range(config.layers_per_block):
            number += 1
            yield from _course_block(f"down{number}", f"down_blocks_{i}", j, attends)
        if i < levels - 1:
            number += 1
            yield from layer(rf"down{number}\.0", f"down_blocks_{i}.downsamplers_0.conv", "kernel", conv_kernel)
    yield from _course_block("mid1", "mid_block", 0, attends=True)
    yield from _course_block("mid2", "mid_block", 1, attends=False)
    number = 0
    for i, attends in enumerate(reversed(config.attention)):
        for j in range(config.layers_per_block + 1):
            number += 1
            yield from _course_block(f"up{number}", f"up_blocks_{i}", j, attends)
        if i < levels - 1:
            number += 1
            yield from layer(rf"up{number}\.1", f"up_blocks_{i}.upsamplers_0.conv", "kernel", conv_kernel)
    yield from layer(r"out\.0", "conv_norm_out", "scale", keep)
    yield from layer(r"out\.2", "conv_out", "kernel", conv_kernel)


def _course_block(source: str, folder: str, index: int, attends: bool) -> Iterator[Rule]:
    """Yield the rules of one residual block and, where it has one, of its attention."""
    resnet = f"{folder}.resnets_{index}"
    for i in (1, 2):
        yield from layer(rf"{source}\.resblocks\.norm{i}", f"{resnet}.norm{i}", "scale", keep)
        yield from layer(rf"{source}\.resblocks\.conv{i}", f"{resnet}.conv{i}", "kernel", conv_kernel)
    yield from layer(rf"{source}\.resblocks\.time\.1", f"{resnet}.time_emb_proj", "kernel", dense_kernel)
    yield from layer(rf"{source}\.resblocks\.skip", f"{resnet}.conv_shortcut", "kernel", conv_kernel)
    if attends:
        attention = f"{folder}.attentions_{index}"
        yield from layer(rf"{source}\.attention\.norm", f"{attention}.group_norm", "scale", keep)
        yield from layer(rf"{source}\.attention\.out", f"{attention}.to_out_0", "kernel", dense_kernel)
        for end, leaf, part in (("weight", "kernel", _third_kernel), ("bias", "bias", _third)):
            outputs = tuple((f"{attention}.to_{name}.{leaf}", partial(part, index=i)) for i, name in enumerate("qkv"))
            yield Rule(rf"{source}\.attention\.qkv\.{end}", outputs)


def _third(fused: np.ndarray, index: int) -> np.ndarray:
    """Return the rows of query (0), key (1) or value (2)."""
    return np.split(fused, 3)[index]


def _third_kernel(fused: np.ndarray, index: int) -> np.ndarray:
    return dense_kernel(_third(fused, index))
