"""The networks of Stable Diffusion 1.x and 2.x, as far as the names and shapes of their tensors tell them apart.

Sizes that no tensor shows (heads, groups of the norms) are the same in all of these models, or follow from the version:
8 heads at every level in 1.x, 64 channels a head in 2.x.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from jaxdiff.errors import InputError
from jaxdiff.io.weights import Spec

MAX_LEVELS, MAX_LAYERS = 8, 64
"""More than any of these models has; a hostile file could otherwise ask for tables of any length."""
UNET, VAE, TEXT_V1, TEXT_V2 = (
    "model.diffusion_model.",
    "first_stage_model.",
    "cond_stage_model.transformer.text_model.",
    "cond_stage_model.model.",
)
"""What the names of each network begin with in a single file."""


@dataclass(frozen=True)
class UNetLayout:
    """The denoising network.

    Attributes:
      attends: for each level whether its blocks have attention.
      context: width of the text's embeddings.
      linear: the projections around attention are matrices (2.x), not 1x1 convolutions (1.x).
    """

    in_channels: int
    out_channels: int
    channels: tuple[int, ...]
    layers: int
    attends: tuple[bool, ...]
    context: int
    linear: bool

    def __post_init__(self):
        _check_size(len(self.channels), self.layers)


@dataclass(frozen=True)
class VAELayout:
    """The autoencoder."""

    in_channels: int
    out_channels: int
    channels: tuple[int, ...]
    layers: int
    latent_channels: int

    def __post_init__(self):
        _check_size(len(self.channels), self.layers)


@dataclass(frozen=True)
class TextLayout:
    """The text encoder.

    Attributes:
      hidden: width of the feed-forward layers.
      open_clip: OpenCLIP's model (2.x), not OpenAI's (1.x).
    """

    tokens: int
    positions: int
    width: int
    hidden: int
    layers: int
    open_clip: bool

    def __post_init__(self):
        _check_size(1, self.layers)


@dataclass(frozen=True)
class Layout:
    """The three networks of a pipeline."""

    unet: UNetLayout
    vae: VAELayout
    text_encoder: TextLayout

    def __post_init__(self):
        unet, text = self.unet, self.text_encoder
        if unet.linear != text.open_clip:
            of = {False: "of Stable Diffusion 1.x", True: "of Stable Diffusion 2.x"}
            raise InputError(f"the UNet is {of[unet.linear]}, the text encoder {of[text.open_clip]}")
        if unet.context != text.width:
            raise InputError(f"the UNet reads text of width {unet.context}, the text encoder's is {text.width}")

    @property
    def version(self) -> int:
        """1 or 2."""
        return 2 if self.unet.linear else 1


def read_layout(specs: Mapping[str, Spec]) -> Layout:
    """Return the layout of a single file, from its tensors' names and shapes.

    Raises:
      InputError: they are not those of Stable Diffusion 1.x or 2.x; the message does not name the file.
    """
    for prefix, what in ((UNET, "UNet"), (VAE, "VAE"), ("cond_stage_model.", "text encoder")):
        if not any(name.startswith(prefix) for name in specs):
            raise InputError(f"holds no {what} (no name begins with {prefix}); is it another kind of file?")
    return Layout(_read_unet(specs), _read_vae(specs), _read_text_encoder(specs))


def _read_unet(specs: Mapping[str, Spec]) -> UNetLayout:
    blocks = 1 + _last_index(specs, rf"{UNET}input_blocks\.(\d+)\..*")
    downs = [n for n in range(min(blocks, 1000)) if f"{UNET}input_blocks.{n}.0.op.weight" in specs]
    layers = (downs[0] if downs else blocks) - 1
    _check_size(len(downs) + 1, layers)
    firsts = [f"{UNET}input_blocks.{1 + level * (layers + 1)}" for level in range(len(downs) + 1)]
    first = _shape(specs, f"{UNET}input_blocks.0.0.weight", 4)
    projection = f"{UNET}middle_block.1.proj_in.weight"
    return UNetLayout(
        in_channels=first[1],
        out_channels=_shape(specs, f"{UNET}out.2.weight", 4)[0],
        channels=tuple(_shape(specs, f"{block}.0.in_layers.2.weight", 4)[0] for block in firsts),
        layers=layers,
        attends=tuple(f"{block}.1.norm.weight" in specs for block in firsts),
        context=_shape(specs, f"{UNET}middle_block.1.transformer_blocks.0.attn2.to_k.weight", 2)[1],
        linear=len(_shape(specs, projection, 2, 4)) == 2,
    )


def _read_vae(specs: Mapping[str, Spec]) -> VAELayout:
    levels = 1 + _last_index(specs, rf"{VAE}encoder\.down\.(\d+)\..*")
    layers = 1 + _last_index(specs, rf"{VAE}encoder\.down\.0\.block\.(\d+)\..*")
    _check_size(levels, layers)
    downs = [f"{VAE}encoder.down.{level}.block.0.conv1.weight" for level in range(levels)]
    return VAELayout(
        in_channels=_shape(specs, f"{VAE}encoder.conv_in.weight", 4)[1],
        out_channels=_shape(specs, f"{VAE}decoder.conv_out.weight", 4)[0],
        channels=tuple(_shape(specs, down, 4)[0] for down in downs),
        layers=layers,
        latent_channels=_shape(specs, f"{VAE}decoder.conv_in.weight", 4)[1],
    )


def _read_text_encoder(specs: Mapping[str, Spec]) -> TextLayout:
    open_clip = any(name.startswith(TEXT_V2) for name in specs)
    if open_clip:
        layers = 1 + _last_index(specs, rf"{TEXT_V2}transformer\.resblocks\.(\d+)\..*")
        tokens, positions = f"{TEXT_V2}token_embedding.weight", f"{TEXT_V2}positional_embedding"
        hidden = f"{TEXT_V2}transformer.resblocks.0.mlp.c_fc.weight"
    else:
        layers = 1 + _last_index(specs, rf"{TEXT_V1}encoder\.layers\.(\d+)\..*")
        tokens, positions = (f"{TEXT_V1}embeddings.{kind}_embedding.weight" for kind in ("token", "position"))
        hidden = f"{TEXT_V1}encoder.layers.0.mlp.fc1.weight"
    count, width = _shape(specs, tokens, 2)
    return TextLayout(
        tokens=count,
        positions=_shape(specs, positions, 2)[0],
        width=width,
        hidden=_shape(specs, hidden, 2)[0],
        layers=layers - has_unused_layer(specs, layers),
        open_clip=open_clip,
    )


def has_unused_layer(specs: Mapping[str, Spec], layers: int) -> bool:
    """Tell whether the last layer of a text encoder is there, but not used.

    Stable Diffusion 2.x reads OpenCLIP's text before the last layer. The original files hold the whole model, to be
    told by its projection or by its 24 layers; files that were made of a folder hold the layers that are used.
    """
    is_open_clip = f"{TEXT_V2}token_embedding.weight" in specs
    return is_open_clip and (layers == 24 or f"{TEXT_V2}text_projection" in specs)


def _last_index(specs: Mapping[str, Spec], pattern: str) -> int:
    """Return the largest number that the pattern's group finds in a name.

    Raises:
      InputError: it is in no name.
    """
    numbers = [int(match[1]) for name in specs if (match := re.fullmatch(pattern, name))]
    if not numbers:
        readable = pattern.replace("\\", "").replace("(d+)", "0").replace(".*", "")
        raise InputError(f"holds no tensor whose name begins with {readable}; is it another kind of model?")
    return max(numbers)


def _shape(specs: Mapping[str, Spec], name: str, *ranks: int) -> tuple[int, ...]:
    if name not in specs:
        raise InputError(f"not the parameters of this model (missing: {name}); is it another model's?")
    shape = specs[name][0]
    if len(shape) not in ranks:
        raise InputError(f"{name} has shape {list(shape)}, but should have {' or '.join(map(str, ranks))} axes")
    return shape


def _check_size(levels: int, layers: int) -> None:
    if not (1 <= levels <= MAX_LEVELS and 1 <= layers <= MAX_LAYERS):
        raise InputError(
            f"a network of {levels} levels with {layers} layers each, which is not within 1 to {MAX_LEVELS} levels and "
            f"1 to {MAX_LAYERS} layers"
        )
