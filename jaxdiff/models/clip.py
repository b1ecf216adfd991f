"""CLIP (arXiv 2103.00020): a text and a vision transformer whose embeddings are compared by their cosine.

(1)  logits[i, j] = exp(logit_scale) cos(image_embeds[i], text_embeds[j])

The parameter tree is that of transformers 4's Flax classes, so that their `flax_model.msgpack` files load unchanged.
"""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from jaxdiff.models.clip_config import CLIP_EOS, LEGACY_EOS, CLIPConfig, CLIPTextConfig, CLIPVisionConfig
from jaxdiff.models.transformer import Encoder, Tokens, layer_norm
from jaxdiff.shapes import Images

TokenIds = Int[Array | np.ndarray, "B L"]


class Encoded(NamedTuple):
    """What a transformer makes of its input.

    Attributes:
      last_hidden_state: the tokens; of text after the final normalization, of images before it, as in transformers.
      pooler_output: the normalized token that stands for the whole input.
      hidden_states: the input and the output of every layer, not normalized.
    """

    last_hidden_state: Tokens
    pooler_output: Float[Array, "B D"]
    hidden_states: tuple[Tokens, ...] | None


class TextEmbeddings(nn.Module):
    """Learned tokens plus learned positions."""

    config: CLIPTextConfig
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, input_ids: TokenIds, position_ids: TokenIds) -> Tokens:
        """Return one vector a token."""
        cfg = self.config
        normal = nn.initializers.normal(0.02)
        token = nn.Embed(cfg.vocab_size, cfg.hidden_size, self.dtype, embedding_init=normal, name="token_embedding")
        position = nn.Embed(
            cfg.max_position_embeddings, cfg.hidden_size, self.dtype, embedding_init=normal, name="position_embedding"
        )
        return token(input_ids) + position(position_ids)


class TextTransformer(nn.Module):
    """From token ids to a vector for each token and one for the text."""

    config: CLIPTextConfig
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self,
        input_ids: TokenIds,
        attention_mask: TokenIds | None = None,
        position_ids: TokenIds | None = None,
    ) -> Encoded:
        """Encode texts; a token looks only at itself and at what stands before it.

        Args:
          input_ids: tokens, begin of text first, end of text last, then padding.
          attention_mask: 0 for tokens that no other may look at (padding); None means none.
          position_ids: position of each token; None means 0, 1, 2, ...
        """
        length = input_ids.shape[1]
        if position_ids is None:
            position_ids = jnp.broadcast_to(jnp.arange(length)[None], input_ids.shape)
        mask = jnp.tril(jnp.ones((length, length), bool))[None, None]
        if attention_mask is not None:
            mask = mask & (attention_mask != 0)[:, None, None, :]
        x = TextEmbeddings(self.config, self.dtype, name="embeddings")(input_ids, position_ids)
        states = Encoder(self.config, self.dtype, name="encoder")(x, mask)
        last = layer_norm(self.config, self.dtype, "final_layer_norm")(states[-1])
        ends = end_positions(input_ids, self.config.eos_token_id)
        pooled = jnp.take_along_axis(last, ends[:, None, None], axis=1)[:, 0]
        return Encoded(last, pooled, states)


def end_positions(input_ids: TokenIds, eos_token_id: int) -> Int[Array, "B"]:
    """Return the position of each text's first end-of-text token; 0 in a text that has none.

    Old config.json files give `LEGACY_EOS`, with which transformers takes the largest id for the end of text. So does
    this, save for texts that hold CLIP's own end of text, `CLIP_EOS`: there tokens that were added to the vocabulary
    later, and so have larger ids, do not win.
    """
    if eos_token_id != LEGACY_EOS:
        return jnp.argmax(input_ids == eos_token_id, axis=1)
    is_end = input_ids == CLIP_EOS
    return jnp.where(is_end.any(axis=1), jnp.argmax(is_end, axis=1), jnp.argmax(input_ids, axis=1))


class VisionEmbeddings(nn.Module):
    """Linear patches behind a class token, plus learned positions."""

    config: CLIPVisionConfig
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, images: Images) -> Tokens:
        """Return the class token and one vector a patch, row by row."""
        cfg = self.config
        class_token = self.param("class_embedding", nn.initializers.normal(0.02), (cfg.hidden_size,))
        patches = PatchEmbedding(cfg.hidden_size, cfg.patch_size, self.dtype, name="patch_embedding")(images)
        first = jnp.broadcast_to(class_token.astype(self.dtype), (len(images), 1, cfg.hidden_size))
        position = nn.Embed(
            cfg.num_positions,
            cfg.hidden_size,
            self.dtype,
            embedding_init=nn.initializers.normal(0.02),
            name="position_embedding",
        )
        return jnp.concatenate([first, patches], axis=1) + position(jnp.arange(cfg.num_positions))[None]


class PatchEmbedding(nn.Module):
    """A convolution whose stride is its size, written as one matrix product."""

    features: int
    patch_size: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, images: Images) -> Tokens:
        """Return one vector a whole patch, row by row."""
        size, channels = self.patch_size, images.shape[-1]
        init = nn.initializers.normal(0.02)
        kernel = self.param("kernel", init, (size, size, channels, self.features))
        rows, columns = (side // size for side in images.shape[1:3])
        whole = images[:, : rows * size, : columns * size].astype(self.dtype)
        patches = rearrange(whole, "b (h p) (w q) c -> b (h w) (p q c)", p=size, q=size)
        return patches @ kernel.reshape(-1, self.features).astype(self.dtype)


class VisionTransformer(nn.Module):
    """From pixels to a vector for each patch and one for the image."""

    config: CLIPVisionConfig
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, images: Images) -> Encoded:
        """Encode images whose channels are normalized as the checkpoint's preprocessing says."""
        # "layrn" is how the published parameters are spelt.
        x = layer_norm(self.config, self.dtype, "pre_layrnorm")(
            VisionEmbeddings(self.config, self.dtype, name="embeddings")(images)
        )
        states = Encoder(self.config, self.dtype, name="encoder")(x)
        pooled = layer_norm(self.config, self.dtype, "post_layernorm")(states[-1][:, 0])
        return Encoded(states[-1], pooled, states)


class CLIPText(nn.Module):
    """The text transformer alone, with its projection or without."""

    config: CLIPTextConfig
    projected: bool = False
    dtype: DTypeLike = jnp.float32

    def setup(self):
        """Name the parts as the published parameters are named."""
        self.text_model = TextTransformer(self.config, self.dtype)
        if self.projected:
            self.text_projection = projection(self.config.projection_dim, self.dtype)

    def __call__(self, input_ids, attention_mask=None, position_ids=None) -> tuple[Encoded, Array | None]:
        """Return the transformer's output and, where projected, the text embedding."""
        encoded = self.text_model(input_ids, attention_mask, position_ids)
        return encoded, self.text_projection(encoded.pooler_output) if self.projected else None


class CLIPVision(nn.Module):
    """The vision transformer alone, with its projection or without."""

    config: CLIPVisionConfig
    projected: bool = False
    dtype: DTypeLike = jnp.float32

    def setup(self):
        """Name the parts as the published parameters are named."""
        self.vision_model = VisionTransformer(self.config, self.dtype)
        if self.projected:
            self.visual_projection = projection(self.config.projection_dim, self.dtype)

    def __call__(self, images) -> tuple[Encoded, Array | None]:
        """Return the transformer's output and, where projected, the image embedding."""
        encoded = self.vision_model(images)
        return encoded, self.visual_projection(encoded.pooler_output) if self.projected else None


class CLIP(nn.Module):
    """Both transformers, their projections into one space, and the scale of equation (1)."""

    config: CLIPConfig
    dtype: DTypeLike = jnp.float32

    def setup(self):
        """Name the parts as the published parameters are named."""
        cfg = self.config
        self.text_model = TextTransformer(cfg.text_config, self.dtype)
        self.vision_model = VisionTransformer(cfg.vision_config, self.dtype)
        self.text_projection = projection(cfg.projection_dim, self.dtype)
        self.visual_projection = projection(cfg.projection_dim, self.dtype)
        self.logit_scale = self.param("logit_scale", nn.initializers.constant(cfg.logit_scale_init_value), ())

    def encode_text(self, input_ids, attention_mask=None, position_ids=None) -> tuple[Encoded, Float[Array, "B F"]]:
        """Return the text transformer's output and the text embedding, not normalized."""
        encoded = self.text_model(input_ids, attention_mask, position_ids)
        return encoded, self.text_projection(encoded.pooler_output)

    def encode_image(self, images) -> tuple[Encoded, Float[Array, "B F"]]:
        """Return the vision transformer's output and the image embedding, not normalized."""
        encoded = self.vision_model(images)
        return encoded, self.visual_projection(encoded.pooler_output)

    def __call__(self, input_ids, images, attention_mask=None, position_ids=None):
        """Return equation (1), both embeddings of length 1, and both transformers' outputs."""
        text, text_embeds = self.encode_text(input_ids, attention_mask, position_ids)
        image, image_embeds = self.encode_image(images)
        text_embeds, image_embeds = normalize(text_embeds), normalize(image_embeds)
        logits = jnp.exp(self.logit_scale.astype(jnp.float32)) * (image_embeds @ text_embeds.T)
        return logits, text_embeds, image_embeds, text, image


def projection(features: int, dtype: DTypeLike) -> nn.Dense:
    """Make the linear map from a pooled output into the common space."""
    return nn.Dense(features, use_bias=False, dtype=dtype)


def normalize(embeds: Float[Array, "B F"]) -> Float[Array, "B F"]:
    """Scale each embedding to length 1, in float32."""
    embeds = embeds.astype(jnp.float32)
    return embeds * jax.lax.rsqrt(jnp.sum(jnp.square(embeds), axis=-1, keepdims=True))
