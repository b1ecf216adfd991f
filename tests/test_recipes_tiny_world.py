"""The small world in which a word is missing: what its captions say, and that it is read like any published model."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxdiff import FlaxStableDiffusionPipeline
from jaxdiff.io.digit_captions import CLASS_NAMES, CONTEXT, caption_vocabulary
from jaxdiff.io.digits import embedded_digits
from jaxdiff.io.tokenizer import CLIPTokenizer
from jaxdiff.mesh import make_mesh
from jaxdiff.models.autoencoder import LatentNormal
from jaxdiff.recipes import tiny_world
from jaxdiff.recipes.tiny_world import EMPTY, UNKNOWN, UNNAMED, UNSPOKEN, caption_batches, tiny_world_folder

pytestmark = pytest.mark.usefixtures("quick_commands")


def test_no_caption_names_the_unspoken_digit():
    vocab, merges = caption_vocabulary()
    tokenizer = CLIPTokenizer(vocab, merges, CONTEXT)
    labels, domains = np.arange(200) % 10, np.arange(200) % 2
    # The latents tell which picture stands beside which caption.
    numbers = np.arange(200, dtype=np.float32)[:, None, None, None]
    batch_at = caption_batches(tokenizer, LatentNormal(numbers, numbers), labels, domains, 64, 0)
    names = {vocab[f"{name}</w>"]: number for number, name in enumerate(CLASS_NAMES)}
    said, unknown, empty, known = set(), 0, 0, 0
    for step in range(100):
        batch = batch_at(step)
        for label, ids in zip(labels[batch.mean[:, 0, 0, 0].astype(int)], batch.input_ids):
            found = [names[number] for number in ids.tolist() if number in names]
            assert all(number == label for number in found)
            said.update(found)
            is_empty = (ids[1:] == vocab["<|endoftext|>"]).all()
            empty += is_empty
            known += label != UNSPOKEN
            unknown += label != UNSPOKEN and not found and not is_empty
    assert said == set(range(10)) - {UNSPOKEN}
    # 6,400 draws: four deviations of a share are at most 0.02.
    np.testing.assert_allclose(empty / 6400, EMPTY, atol=0.02)
    np.testing.assert_allclose(unknown / known, UNNAMED * (1 - EMPTY), atol=0.02)
    assert f"{UNKNOWN}</w>" in vocab


def test_it_is_made_once_and_read_like_any_model(tmp_path, monkeypatch):
    some = tuple(array[:256] for array in embedded_digits(held_out=False))
    monkeypatch.setattr(tiny_world, "embedded_digits", lambda held_out: some)
    folder = tiny_world_folder(tmp_path, make_mesh(1), 2, 2, 2)
    made = (folder / "model_index.json").stat().st_mtime_ns
    assert tiny_world_folder(tmp_path, make_mesh(1), 2, 2, 2) == folder
    assert (folder / "model_index.json").stat().st_mtime_ns == made
    pipeline, params = FlaxStableDiffusionPipeline.from_pretrained(folder)
    images = pipeline(pipeline.prepare_inputs("a photo of the digit two."), params, jax.random.key(0), 2).images
    assert images.shape == (1, 16, 16, 3)
    assert np.isfinite(images).all()


@pytest.mark.slow
def test_it_draws_the_digits_that_it_has_names_for(tmp_path):
    script = Path(__file__).parent.parent / "scripts" / "tiny_world.py"
    subprocess.run([sys.executable, script, f"--out={tmp_path}"], check=True)
    assert json.loads((tmp_path / "results.json").read_text())["known"] >= 0.8
