"""What the pretrained classes return, under the names that transformers' users know."""

from collections.abc import Iterator
from dataclasses import fields
from typing import Any

from flax import struct
from jax import Array


class ModelOutput(struct.PyTreeNode):
    """Fields by attribute, by name in brackets, or by number among those that are not None."""

    def keys(self) -> list[str]:
        """Return the names of the fields that are not None."""
        return [field.name for field in fields(self) if getattr(self, field.name) is not None]

    def values(self) -> list[Any]:
        """Return the fields that are not None."""
        return [getattr(self, name) for name in self.keys()]

    def items(self) -> list[tuple[str, Any]]:
        """Return names and values of the fields that are not None."""
        return [(name, getattr(self, name)) for name in self.keys()]

    def to_tuple(self) -> tuple[Any, ...]:
        """Return the fields that are not None, those that are outputs themselves as tuples."""
        return tuple(value.to_tuple() if isinstance(value, ModelOutput) else value for value in self.values())

    def __getitem__(self, key: str | int | slice) -> Any:
        if not isinstance(key, str):
            return self.to_tuple()[key]
        if key not in self.keys():
            raise KeyError(key)
        return getattr(self, key)

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys())

    def __len__(self) -> int:
        return len(self.keys())


class FlaxBaseModelOutputWithPooling(ModelOutput):
    """One transformer's tokens, its pooled output and, on request, what every layer gave."""

    last_hidden_state: Array | None = None
    pooler_output: Array | None = None
    hidden_states: tuple[Array, ...] | None = None


class FlaxCLIPTextModelOutput(ModelOutput):
    """The text embedding, not normalized, and the text transformer's tokens."""

    text_embeds: Array | None = None
    last_hidden_state: Array | None = None
    hidden_states: tuple[Array, ...] | None = None


class FlaxCLIPVisionModelOutput(ModelOutput):
    """The image embedding, not normalized, and the vision transformer's tokens."""

    image_embeds: Array | None = None
    last_hidden_state: Array | None = None
    hidden_states: tuple[Array, ...] | None = None


class FlaxCLIPOutput(ModelOutput):
    """Similarities, embeddings of length 1, and what both transformers gave."""

    logits_per_image: Array | None = None
    logits_per_text: Array | None = None
    text_embeds: Array | None = None
    image_embeds: Array | None = None
    text_model_output: FlaxBaseModelOutputWithPooling | None = None
    vision_model_output: FlaxBaseModelOutputWithPooling | None = None
