"""Compare jaxdiff's FlaxCLIPModel with the one that transformers 4.57 had, on the same flax_model.msgpack.

    python -m venv old && old/bin/pip install transformers==4.57.6 jax==0.10.2 flax==0.12.8 'huggingface_hub<1'
    old/bin/python scripts/compare_with_flax_clip.py write DIR
    python scripts/compare_with_flax_clip.py check DIR

The two versions of transformers and their hub packages cannot share an environment, so one writes and one checks.
"""

import sys
from pathlib import Path

import numpy as np

TEXT = {"vocab_size": 99, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
TEXT |= {"max_position_embeddings": 11, "bos_token_id": 97, "projection_dim": 20}
VISION = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 3}
VISION |= {"image_size": 20, "patch_size": 5, "projection_dim": 20}
VARIANTS = {"quick_gelu": ("quick_gelu", 98), "gelu": ("gelu", 98), "legacy_eos": ("quick_gelu", 2)}
ATOL = 1e-5


def draw_inputs() -> dict[str, np.ndarray]:
    """Return token ids with padding, their mask, and pixels."""
    rng = np.random.default_rng(0)
    input_ids = np.array([[97, 5, 6, 98, 1, 1], [97, 7, 8, 9, 10, 98], [97, 98, 1, 1, 1, 1]], np.int32)
    pixel_values = rng.standard_normal((2, 3, 20, 20)).astype(np.float32)
    return {"input_ids": input_ids, "pixel_values": pixel_values, "attention_mask": (input_ids != 1).astype(np.int32)}


def run(model) -> dict[str, np.ndarray]:
    """Return everything that the calls of an old script give."""
    inputs = draw_inputs()
    outputs = model(**inputs)
    found = {name: outputs[name] for name in ("logits_per_image", "logits_per_text", "text_embeds", "image_embeds")}
    for tower in ("text_model_output", "vision_model_output"):
        for name in ("last_hidden_state", "pooler_output"):
            found[f"{tower}.{name}"] = outputs[tower][name]
    found["text_features"] = model.get_text_features(inputs["input_ids"], inputs["attention_mask"])
    found["image_features"] = model.get_image_features(inputs["pixel_values"])
    return {name: np.asarray(value) for name, value in found.items()}


def write(folder: Path) -> None:
    """With transformers 4.57: save random models and what they answer."""
    import jax
    from transformers import CLIPConfig, FlaxCLIPModel

    for name, (activation, eos) in VARIANTS.items():
        text = {**TEXT, "hidden_act": activation, "eos_token_id": eos}
        vision = {**VISION, "hidden_act": activation}
        model = FlaxCLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=20))
        rng = np.random.default_rng(1)
        # Large enough for every part to matter.
        leaves, tree = jax.tree.flatten(model.params)
        model.params = tree.unflatten([leaf + 0.2 * rng.standard_normal(leaf.shape, np.float32) for leaf in leaves])
        model.save_pretrained(folder / name)
        np.savez(folder / name / "answers.npz", **run(model))


def check(folder: Path) -> int:
    """With jaxdiff: load the models and compare; return the exit code."""
    import jax

    from jaxdiff import FlaxCLIPModel

    jax.config.update("jax_default_matmul_precision", "highest")
    worst = 0.0
    for name in VARIANTS:
        wanted = np.load(folder / name / "answers.npz")
        for key, found in run(FlaxCLIPModel.from_pretrained(folder / name)).items():
            difference = float(np.abs(found - wanted[key]).max())
            worst = max(worst, difference)
            print(f"{name:12s} {key:40s} largest difference {difference:.1e} of {np.abs(wanted[key]).max():.2f}")
    print(f"worst {worst:.1e}, allowed {ATOL:.0e}")
    return int(worst > ATOL)


if __name__ == "__main__":
    task, place = sys.argv[1], Path(sys.argv[2])
    sys.exit(check(place) if task == "check" else write(place))
