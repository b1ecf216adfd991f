"""Small CLIP models of transformers' torch classes with random weights, and their parameters in linen's layout."""

from collections.abc import Mapping

import jax
import numpy as np
import torch
from transformers import CLIPConfig, CLIPModel

from jaxdiff.io.torch_layout import from_torch
from jaxdiff.io.weights import unflatten_params
from jaxdiff.models.clip import CLIP
from jaxdiff.models.clip_config import read_clip_config

TEXT = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 11,
    "bos_token_id": 97,
    "eos_token_id": 98,
    "pad_token_id": 1,
    "projection_dim": 20,
}
VISION = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "image_size": 20,
    "patch_size": 5,
    "projection_dim": 20,
}
IDS = np.array([[97, 5, 6, 98, 1, 1], [97, 7, 8, 9, 10, 98], [97, 98, 1, 1, 1, 1]])
MASK = (IDS != 1).astype(np.int32)


def make_twin(text=(), vision=(), projection_dim: int = 20) -> CLIPModel:
    """Return a torch model whose weights are large enough for every part to matter."""
    config = CLIPConfig(
        text_config={**TEXT, **dict(text)}, vision_config={**VISION, **dict(vision)}, projection_dim=projection_dim
    )
    torch.manual_seed(0)
    twin = CLIPModel(config).eval()
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter += 0.1 * torch.randn(parameter.shape)
    return twin


def make_full_size_twin(name: str, vocab: Mapping[str, int]) -> CLIPModel:
    """Return a torch model of ViT-B/32's or ViT-L/14's size whose answers differ from picture to picture.

    The kernels keep the variance of what goes through them, and cosines are multiplied by 100, as in published models.
    """
    text: dict[str, int] = {"bos_token_id": vocab["<|startoftext|>"], "eos_token_id": vocab["<|endoftext|>"]}
    vision: dict[str, int] = {}
    if name == "ViT-L/14":
        text |= {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12}
        vision = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
        vision |= {"patch_size": 14}
    width = 768 if name == "ViT-L/14" else 512
    torch.manual_seed(0)
    twin = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=width)).eval()
    with torch.no_grad():
        twin.logit_scale.fill_(np.log(100))
        for module in twin.modules():
            if isinstance(module, torch.nn.Linear):
                module.weight.normal_(0, module.in_features**-0.5)
    return twin


def make_pair(text=(), vision=(), projection_dim: int = 20) -> tuple[CLIPModel, CLIP, dict]:
    """Return a torch model, its linen twin and the parameters that both have."""
    twin = make_twin(text, vision, projection_dim)
    config = read_clip_config(twin.config.to_dict())
    model = CLIP(config)
    images = np.zeros((1, config.vision_config.image_size, config.vision_config.image_size, 3), np.float32)
    expected = jax.eval_shape(model.init, jax.random.key(0), IDS, images)["params"]
    tensors = {name: tensor.numpy() for name, tensor in twin.state_dict().items()}
    return twin, model, unflatten_params(dict(from_torch("twin", tensors, expected, ignored="")))


def draw_pixels(number: int, size: int = 20) -> np.ndarray:
    """Return normalized images, channels second."""
    return np.random.default_rng(number).standard_normal((number, 3, size, size), np.float32)
