"""Every tensor of Stable Diffusion 1.x and 2.x by both its names: in a single file, and in a folder of diffusers.

    row             single file (CompVis)                          folder (diffusers, transformers)
    UNet            input_blocks.{1 + level * (layers + 1) + i}    down_blocks.{level}.{resnets, attentions}.{i}
                    output_blocks.{level * (layers + 1) + i}       up_blocks.{level}, the coarsest first in both
    VAE             decoder.up.{level}, the finest first           decoder.up_blocks.{level}, the coarsest first
    VAE, attention  q (C C 1 1)                                    to_q (C C)
    text, 1.x       the same                                       the same
    text, 2.x       attn.in_proj_weight (3D D)                     q_proj.weight, k_proj.weight, v_proj.weight (D D)

A table is made for one layout and holds all names and shapes, so it is strict in both directions.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from jaxdiff.errors import InputError
from jaxdiff.io.torch_layout import as_float32
from jaxdiff.io.weights import LazyTensors, Spec, check_finite, check_specs
from weights_convert.sd_layout import TEXT_V1, TEXT_V2, UNET, VAE, TextLayout, UNetLayout, VAELayout

UNET_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
VAE_RESNET = {"norm1": "norm1", "conv1": "conv1", "norm2": "norm2", "conv2": "conv2", "conv_shortcut": "nin_shortcut"}
VAE_ATTENTION = {"to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
OPEN_CLIP = {
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "encoder.layers": "transformer.resblocks",
    "self_attn.out_proj": "attn.out_proj",
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "final_layer_norm": "ln_final",
}
"""Names in folders, which are OpenAI's, to OpenCLIP's."""

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Row:
    """One tensor of a single file.

    Attributes:
      single: its name there.
      parts: names of the folder's tensors that it is made of, one upon the other.
      shape: of each part.
      single_shape: of the single file's tensor.
    """

    single: str
    parts: tuple[str, ...]
    shape: Shape
    single_shape: Shape


def unet_rows(layout: UNetLayout) -> Iterator[Row]:
    """Yield the rows of the denoising network."""
    channels, layers = layout.channels, layout.layers
    time = 4 * channels[0]
    yield from layer(f"{UNET}time_embed.0", "time_embedding.linear_1", (time, channels[0]))
    yield from layer(f"{UNET}time_embed.2", "time_embedding.linear_2", (time, time))
    yield from layer(f"{UNET}input_blocks.0.0", "conv_in", (channels[0], layout.in_channels, 3, 3))
    block, before, skips = 0, channels[0], [channels[0]]
    for level, width in enumerate(channels):
        for i in range(layers):
            block += 1
            at, to = f"{UNET}input_blocks.{block}", f"down_blocks.{level}"
            yield from resnet(f"{at}.0", f"{to}.resnets.{i}", UNET_RESNET, before, width, time)
            if layout.attends[level]:
                yield from transformer(f"{at}.1", f"{to}.attentions.{i}", width, layout)
            before = width
            skips.append(width)
        if level < len(channels) - 1:
            block += 1
            at = f"{UNET}input_blocks.{block}.0.op"
            yield from layer(at, f"down_blocks.{level}.downsamplers.0.conv", (width, width, 3, 3))
            skips.append(width)
    yield from resnet(f"{UNET}middle_block.0", "mid_block.resnets.0", UNET_RESNET, before, before, time)
    yield from transformer(f"{UNET}middle_block.1", "mid_block.attentions.0", before, layout)
    yield from resnet(f"{UNET}middle_block.2", "mid_block.resnets.1", UNET_RESNET, before, before, time)
    for level, width in enumerate(reversed(channels)):
        attends = layout.attends[::-1][level]
        for i in range(layers + 1):
            at, to = f"{UNET}output_blocks.{level * (layers + 1) + i}", f"up_blocks.{level}"
            yield from resnet(f"{at}.0", f"{to}.resnets.{i}", UNET_RESNET, before + skips.pop(), width, time)
            if attends:
                yield from transformer(f"{at}.1", f"{to}.attentions.{i}", width, layout)
            before = width
        if level < len(channels) - 1:
            yield from layer(f"{at}.{1 + attends}.conv", f"{to}.upsamplers.0.conv", (width, width, 3, 3))
    yield from layer(f"{UNET}out.0", "conv_norm_out", (channels[0],))
    yield from layer(f"{UNET}out.2", "conv_out", (layout.out_channels, channels[0], 3, 3))


def vae_rows(layout: VAELayout) -> Iterator[Row]:
    """Yield the rows of the autoencoder."""
    channels, latent = layout.channels, layout.latent_channels
    yield from layer(f"{VAE}quant_conv", "quant_conv", (2 * latent, 2 * latent, 1, 1))
    yield from layer(f"{VAE}post_quant_conv", "post_quant_conv", (latent, latent, 1, 1))
    yield from layer(f"{VAE}encoder.conv_in", "encoder.conv_in", (channels[0], layout.in_channels, 3, 3))
    yield from layer(f"{VAE}decoder.conv_in", "decoder.conv_in", (channels[-1], latent, 3, 3))
    before = channels[0]
    for level, width in enumerate(channels):
        at, to = f"{VAE}encoder.down.{level}", f"encoder.down_blocks.{level}"
        for i in range(layout.layers):
            yield from resnet(f"{at}.block.{i}", f"{to}.resnets.{i}", VAE_RESNET, before, width)
            before = width
        if level < len(channels) - 1:
            yield from layer(f"{at}.downsample.conv", f"{to}.downsamplers.0.conv", (width, width, 3, 3))
    for side in ("encoder", "decoder"):
        yield from vae_middle(f"{VAE}{side}.mid", f"{side}.mid_block", channels[-1])
    before = channels[-1]
    for level, width in enumerate(reversed(channels)):
        at, to = f"{VAE}decoder.up.{len(channels) - 1 - level}", f"decoder.up_blocks.{level}"
        for i in range(layout.layers + 1):
            yield from resnet(f"{at}.block.{i}", f"{to}.resnets.{i}", VAE_RESNET, before, width)
            before = width
        if level < len(channels) - 1:
            yield from layer(f"{at}.upsample.conv", f"{to}.upsamplers.0.conv", (width, width, 3, 3))
    for side, width, out in (("encoder", channels[-1], 2 * latent), ("decoder", channels[0], layout.out_channels)):
        yield from layer(f"{VAE}{side}.norm_out", f"{side}.conv_norm_out", (width,))
        yield from layer(f"{VAE}{side}.conv_out", f"{side}.conv_out", (out, width, 3, 3))


def text_rows(layout: TextLayout) -> Iterator[Row]:
    """Yield the rows of the text encoder."""
    width, hidden = layout.width, layout.hidden
    prefix = TEXT_V2 if layout.open_clip else TEXT_V1
    names = OPEN_CLIP if layout.open_clip else {name: name for name in OPEN_CLIP}
    for name, count in (("token", layout.tokens), ("position", layout.positions)):
        place = f"embeddings.{name}_embedding.weight"
        yield Row(prefix + names[place], (f"text_model.{place}",), (count, width), (count, width))
    shapes: dict[str, Shape] = {"self_attn.out_proj": (width, width), "layer_norm1": (width,), "layer_norm2": (width,)}
    shapes |= {"mlp.fc1": (hidden, width), "mlp.fc2": (width, hidden)}
    for i in range(layout.layers):
        single, folder = f"{prefix}{names['encoder.layers']}.{i}", f"text_model.encoder.layers.{i}"
        if layout.open_clip:
            yield from fused(f"{single}.attn.in_proj", f"{folder}.self_attn", width)
        else:
            for name in "qkv":
                yield from layer(f"{single}.self_attn.{name}_proj", f"{folder}.self_attn.{name}_proj", (width, width))
        for name, shape in shapes.items():
            yield from layer(f"{single}.{names[name]}", f"{folder}.{name}", shape)
    yield from layer(prefix + names["final_layer_norm"], "text_model.final_layer_norm", (width,))


def fused(single: str, folder: str, width: int) -> Iterator[Row]:
    """Yield weight and bias of a matrix that makes query, key and value at once."""
    for end, shape in (("weight", (width, width)), ("bias", (width,))):
        parts = tuple(f"{folder}.{name}_proj.{end}" for name in "qkv")
        yield Row(f"{single}_{end}", parts, shape, (3 * width, *shape[1:]))


def layer(single: str, folder: str, shape: Shape, single_shape: Shape = (), bias: bool = True) -> Iterator[Row]:
    """Yield weight and bias of a convolution, a matrix or a norm."""
    yield Row(f"{single}.weight", (f"{folder}.weight",), shape, single_shape or shape)
    if bias:
        yield Row(f"{single}.bias", (f"{folder}.bias",), shape[:1], shape[:1])


def resnet(single: str, folder: str, names: Mapping[str, str], before: int, width: int, time: int = 0) -> Iterator[Row]:
    """Yield the rows of a residual block, with a projection of the time embedding where that has a width."""
    shapes: dict[str, Shape] = {"norm1": (before,), "conv1": (width, before, 3, 3)}
    if time:
        shapes["time_emb_proj"] = (width, time)
    shapes |= {"norm2": (width,), "conv2": (width, width, 3, 3)}
    if before != width:
        shapes["conv_shortcut"] = (width, before, 1, 1)
    for name, shape in shapes.items():
        yield from layer(f"{single}.{names[name]}", f"{folder}.{name}", shape)


def transformer(single: str, folder: str, width: int, layout: UNetLayout) -> Iterator[Row]:
    """Yield the rows of a block that attends to the picture and to the text; inside, both sides use the same names."""
    projection = (width, width) if layout.linear else (width, width, 1, 1)
    yield from layer(f"{single}.norm", f"{folder}.norm", (width,))
    yield from layer(f"{single}.proj_in", f"{folder}.proj_in", projection)
    yield from layer(f"{single}.proj_out", f"{folder}.proj_out", projection)
    single, folder = f"{single}.transformer_blocks.0", f"{folder}.transformer_blocks.0"
    for name, keys in (("attn1", width), ("attn2", layout.context)):
        for part, columns in (("to_q", width), ("to_k", keys), ("to_v", keys)):
            yield from layer(f"{single}.{name}.{part}", f"{folder}.{name}.{part}", (width, columns), bias=False)
        yield from layer(f"{single}.{name}.to_out.0", f"{folder}.{name}.to_out.0", (width, width))
    shapes: dict[str, Shape] = {f"norm{i}": (width,) for i in (1, 2, 3)}
    for name, shape in (shapes | {"ff.net.0.proj": (8 * width, width), "ff.net.2": (width, 4 * width)}).items():
        yield from layer(f"{single}.{name}", f"{folder}.{name}", shape)


def vae_middle(single: str, folder: str, width: int) -> Iterator[Row]:
    """Yield the rows of the middle of the encoder or the decoder."""
    for i in (0, 1):
        yield from resnet(f"{single}.block_{i + 1}", f"{folder}.resnets.{i}", VAE_RESNET, width, width)
    yield from layer(f"{single}.attn_1.norm", f"{folder}.attentions.0.group_norm", (width,))
    for name, old in VAE_ATTENTION.items():
        place = f"{folder}.attentions.0.{name}"
        yield from layer(f"{single}.attn_1.{old}", place, (width, width), (width, width, 1, 1))


def to_folder(origin: str, rows: Iterable[Row], source: Mapping[str, np.ndarray]) -> LazyTensors:
    """Return the folder's tensors, made of a single file's when they are asked for.

    Args:
      origin: what the user named, for messages.
      rows: the table.
      source: the single file's tensors, by its names, with `specs`.

    Raises:
      InputError: a tensor is missing, not expected, of another shape or no floating-point number.
    """
    rows = list(rows)
    found = check_source(origin, source, {row.single: (row.single_shape, row.shape) for row in rows})
    places = {part: (row, index) for row in rows for index, part in enumerate(row.parts)}

    def read(name: str) -> np.ndarray:
        row, index = places[name]
        tensor = source[row.single]
        check_finite(origin, row.single, tensor)
        return tensor.reshape(len(row.parts), *row.shape)[index]

    return LazyTensors({name: (row.shape, found[row.single][1]) for name, (row, _) in places.items()}, read)


def to_single(origin: str, rows: Iterable[Row], source: Mapping[str, np.ndarray]) -> LazyTensors:
    """Return a single file's tensors, made of a folder's when they are asked for.

    Raises:
      InputError: as `to_folder`; or tensors that become one are of different types.
    """
    by_name = {row.single: row for row in rows}
    found = check_source(
        origin, source, {part: (row.shape, row.single_shape) for row in by_name.values() for part in row.parts}
    )
    for row in by_name.values():
        if len({found[part][1] for part in row.parts}) > 1:
            raise InputError(f"{origin}: {' and '.join(row.parts)} become one tensor, but are of different types")

    def read(name: str) -> np.ndarray:
        row = by_name[name]
        tensors = [source[part] for part in row.parts]
        for part, tensor in zip(row.parts, tensors):
            check_finite(origin, part, tensor)
        whole = tensors[0] if len(tensors) == 1 else np.concatenate(tensors)
        return whole.reshape(row.single_shape)

    return LazyTensors({name: (row.single_shape, found[row.parts[0]][1]) for name, row in by_name.items()}, read)


def check_source(
    origin: str, source: Mapping[str, np.ndarray], wanted: Mapping[str, tuple[Shape, Shape]]
) -> Mapping[str, Spec]:
    """Return the specs of a source, checked to have exactly the names, shapes and kind that are wanted.

    A matrix may be stored as a 1x1 convolution and the other way about, where that is the difference between the two
    shapes that are given for its name; the first is the usual one.
    """
    specs: Mapping[str, Spec] = source.specs  # type: ignore[attr-defined]
    found = {name: as_float32(spec) for name, spec in specs.items()}
    for name, shapes in wanted.items():
        if {len(shape) for shape in shapes} == {2, 4} and name in found and found[name][0] in shapes:
            found[name] = shapes[0], found[name][1]
    check_specs(origin, found, {name: (shapes[0], "float32") for name, shapes in wanted.items()})
    return specs
