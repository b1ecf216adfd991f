"""`python -m jaxdiff.text2image` as a user runs it, with the model made on the spot and with folders of diffusers."""

import hashlib
import json
import os
import re
import shutil

import jax
import numpy as np
import pytest
import torch
from commands import finish, run_here, start, start_several
from conftest import FLOAT32_ATOL
from diffusers import StableDiffusionPipeline
from PIL import Image
from safetensors.torch import save_file
from stable_diffusion_twins import converted, make_pipeline, make_standard_pipeline

from jaxdiff import text2image
from jaxdiff.io import hub
from jaxdiff.io.images import read_png_texts
from jaxdiff.mesh import make_mesh
from jaxdiff.recipes.stable_diffusion import encode_texts
from jaxdiff.recipes.text_to_image import make_jobs
from jaxdiff.recipes.text_to_image_model import prepare
from jaxdiff.text2image_settings import LatentModelSettings, PictureSettings

pytestmark = pytest.mark.usefixtures("quick_commands")
SMALL = ("--num-steps=2", "--height=16", "--width=16")


def draw(*args: str):
    return run_here(text2image.main, *args)


def pixels(folder, prompt: int, number: int) -> np.ndarray:
    return np.asarray(Image.open(folder / f"{prompt:03d}_{number:03d}.png"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipeline")
    make_pipeline(folder)
    return folder


@pytest.mark.slow
def test_several_processes_share_the_pictures_and_write_the_bytes_of_one(tmp_path):
    args = (*SMALL, "--prompt", "a photo of a cat", "a dog", "--num-images=2", "--batch-size=1")
    alone = draw(*args, "--devices=1", f"--out={tmp_path / 'one'}")
    assert alone.code == 0, alone.err
    words = ["-m", "jaxdiff.text2image"]
    answers = [finish(process) for process in start_several(words, 2, *args, f"--out={tmp_path / 'two'}")]
    assert [answer.code for answer in answers] == [0, 0], answers
    assert {path.name for path in (tmp_path / "two").iterdir()} == {path.name for path in (tmp_path / "one").iterdir()}
    for path in (tmp_path / "one").glob("*.png"):
        assert (tmp_path / "two" / path.name).read_bytes() == path.read_bytes()


def test_the_defaults_draw_and_a_rerun_draws_only_what_is_missing(tmp_path):
    args = (*SMALL, "--prompt", "a photo of a cat", "zwölf Boxkämpfer", "--num-images=2", f"--out={tmp_path}")
    args = (*args, "--negative", "")
    answer = draw(*args)
    assert answer.code == 0, answer.err
    assert "random" in answer.out
    assert all(path.exists() for path in answer.written)
    first = pixels(tmp_path, 1, 1)
    assert first.shape == (16, 16, 3)
    texts = read_png_texts(tmp_path / "001_001.png")
    about = json.loads(texts["jaxdiff"])
    assert (about["prompt"], about["image"], about["sampler"], about["num_steps"]) == ("zwölf Boxkämpfer", 1, "pndm", 2)
    assert texts["parameters"].startswith(
        "zwölf Boxkämpfer\nSteps: 2, Sampler: pndm, CFG scale: 7.5, Seed: 0, Size: 16x16"
    )
    results = json.loads((tmp_path / "results.json").read_text())
    assert (results["pictures"], results["new_pictures"]) == (4, 4)
    assert about["sha256"] == results["hashes"]["params"]
    assert "a photo of a cat" in (tmp_path / "report.html").read_text()

    kept = os.stat(tmp_path / "000_000.png").st_mtime_ns
    (tmp_path / "001_001.png").write_bytes(b"half a picture")
    answer = draw(*args)
    assert "3 of 4 pictures are there already" in answer.out
    np.testing.assert_array_equal(pixels(tmp_path, 1, 1), first)
    assert os.stat(tmp_path / "000_000.png").st_mtime_ns == kept
    other_seed = draw(*args, "--seed=1").out
    assert "2 of 4" not in other_seed
    assert f"pictures of earlier runs that are replaced in {tmp_path}: 4, such as 000_000.png" in other_seed
    assert np.abs(pixels(tmp_path, 1, 1).astype(int) - first).max() > 0
    fewer = draw(*SMALL, "--prompt=a photo of a cat", f"--out={tmp_path}")
    assert "pictures of earlier runs that stay in" in fewer.out
    grid = (tmp_path / "grid.png").read_bytes()
    Image.new("RGB", (16, 16)).save(tmp_path / "grid.png")
    assert draw(*SMALL, "--prompt=a cat", f"--out={tmp_path}").sentence.endswith(
        "grid.png: is no grid that jaxdiff drew; move it away, or choose another --out"
    )
    (tmp_path / "grid.png").write_bytes(grid)
    Image.new("RGB", (16, 16)).save(tmp_path / "000_000.png")
    assert draw(*SMALL, "--prompt=a cat", f"--out={tmp_path}").sentence.endswith(
        "000_000.png: was not drawn by jaxdiff; move it away, or choose another --out"
    )
    assert ": 3, such as 000_001.png" in fewer.out


def test_learned_words_of_a_file_reach_the_picture(tmp_path):
    save_file({"<w>": 5 * torch.ones(64)}, tmp_path / "w.safetensors")
    words = f"--embeddings={tmp_path / 'w.safetensors'}"
    for name, flags in (("with", [words]), ("without", [])):
        answer = draw(*SMALL, "--prompt", "a photo of <w>", *flags, f"--out={tmp_path / name}")
        assert answer.code == 0, answer.err
    record, plain = (json.loads((tmp_path / name / "results.json").read_text()) for name in ("with", "without"))
    assert record["config"]["embeddings"] == [words.split("=")[1]]
    # The record tells which bytes were read, of this command alone.
    digest = hashlib.sha256((tmp_path / "w.safetensors").read_bytes()).hexdigest()
    assert record["hashes"][str(tmp_path / "w.safetensors")] == digest
    assert plain["hashes"].keys() == {"params"}
    assert np.abs(pixels(tmp_path / "with", 0, 0).astype(int) - pixels(tmp_path / "without", 0, 0)).max() > 0


def test_a_picture_depends_on_seed_prompt_and_number_alone(tmp_path):
    # With the mark and the line ends of Windows, and a sign that ends no line.
    (tmp_path / "prompts.txt").write_bytes("\ufeffa photo of a cat\r\n\r\na digit\u2028or two\r\n".encode())
    file = f"--prompts={tmp_path / 'prompts.txt'}"
    assert draw(*SMALL, file, "--num-images=3", "--batch-size=2", "--devices=1", f"--out={tmp_path / 'a'}").code == 0
    assert len(list((tmp_path / "a").glob("00?_00?.png"))) == 6
    assert json.loads(read_png_texts(tmp_path / "a" / "000_000.png")["jaxdiff"])["prompt"] == "a photo of a cat"
    other = ("--prompt", "a photo of a cat", "--num-images=2", "--batch-size=8", "--devices=8")
    assert draw(*SMALL, *other, f"--out={tmp_path / 'b'}").code == 0
    for number in range(2):
        difference = pixels(tmp_path / "a", 0, number).astype(int) - pixels(tmp_path / "b", 0, number)
        assert np.abs(difference).max() <= 1
    assert np.abs(pixels(tmp_path / "a", 0, 0).astype(int) - pixels(tmp_path / "a", 0, 1)).max() > 10


def test_the_record_holds_the_digest_of_every_weight_file(folder, tmp_path):
    answer = draw(f"--model={folder}", *SMALL, "--prompt=a", f"--out={tmp_path}")
    assert answer.code == 0, answer.err
    hashes = json.loads((tmp_path / "results.json").read_text())["hashes"]
    weights = [path for path in folder.rglob("*") if path.suffix in (".safetensors", ".bin", ".msgpack")]
    assert len(weights) == 3
    assert hashes.keys() - {"params"} == {str(path) for path in weights}
    assert all(hashes[str(path)] == hashlib.sha256(path.read_bytes()).hexdigest() for path in weights)


@pytest.mark.slow
def test_a_single_file_becomes_a_folder_that_draws_the_same(tmp_path):
    make_standard_pipeline(tmp_path).save_pretrained(tmp_path / "folder")
    converted(tmp_path / "folder", tmp_path / "single.safetensors")
    converted(tmp_path / "single.safetensors", tmp_path / "back", "--tokenizer", tmp_path / "vocabulary")
    for name in ("folder", "back"):
        answer = draw(*SMALL, "--prompt", "a cat", f"--model={tmp_path / name}", f"--out={tmp_path / name / 'out'}")
        assert answer.code == 0, answer.err
    np.testing.assert_array_equal(pixels(tmp_path / "folder" / "out", 0, 0), pixels(tmp_path / "back" / "out", 0, 0))


# --- learned words, and prompts of any length


def learned(tmp_path) -> dict[str, torch.Tensor]:
    torch.manual_seed(5)
    return {"<one>": torch.randn(32), "<many>": torch.randn(3, 32)}


@pytest.mark.parametrize("layout", ["diffusers", "torch", "a1111", "comfyui", "a1111 torch", "the paper's code"])
def test_learned_words_are_read_as_diffusers_reads_them(folder, tmp_path, layout):
    words = learned(tmp_path)
    if layout == "diffusers":
        save_file(words, tmp_path / "words.safetensors")
        files = [tmp_path / "words.safetensors"]
    elif layout == "torch":
        torch.save(words, tmp_path / "words.bin")
        files = [tmp_path / "words.bin"]
    else:
        files = []
        for word, rows in words.items():
            rows = torch.atleast_2d(rows)
            if layout in ("a1111", "comfyui"):
                files.append(tmp_path / f"{word}.safetensors")
                save_file({"clip_l" if layout == "comfyui" else "emb_params": rows}, files[-1])
            else:
                files.append(tmp_path / f"{word}.pt")
                saved = {"string_to_token": {"*": 265}, "string_to_param": {"*": rows}, "name": word}
                if layout == "the paper's code":
                    found = torch.nn.ParameterDict({"*": torch.nn.Parameter(rows)})
                    saved = {"string_to_token": {"*": torch.tensor(265)}, "string_to_param": found}
                torch.save(saved, files[-1])
    theirs = StableDiffusionPipeline.from_pretrained(folder)
    for word, rows in words.items():
        theirs.load_textual_inversion({word: rows})
    prompt = "a photo of <many> and of <one> <one>"
    expected = theirs.encode_prompt(prompt, "cpu", 1, False)[0].detach().numpy()
    drawing = prepare(LatentModelSettings(str(folder), embeddings=tuple(files)), PictureSettings(), make_mesh(1))
    found = drawing.encode(np.stack(drawing.tokenize([prompt])))
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


def test_long_prompts_are_encoded_in_pieces_of_75_tokens(folder):
    drawing = prepare(LatentModelSettings(str(folder)), PictureSettings(long_prompts=True), make_mesh(1))
    # Ten letters a word, none of them merged: ten tokens.
    words = ["xxxxxxxxxx"] * 11
    long, short = drawing.tokenize([" ".join(words), ""])
    assert short.shape == (1, 77)
    found = drawing.encode(long[None])
    assert found.shape == (1, 2 * 77, 32)
    # All 110 tokens of the text without its begin and end, 75 to a piece; the second ends in padding.
    begin, *word, end = drawing.tokenizer(words[:1]).input_ids[0]
    text = word * 11
    pieces = [[begin, *text[:75], end], [begin, *text[75:], end, *[end] * 40]]
    expected = encode_texts(drawing.model, drawing.params, jax.numpy.asarray(pieces))
    np.testing.assert_allclose(found[0], np.concatenate(expected), rtol=0, atol=FLOAT32_ATOL)


def test_a_model_whose_sampler_is_missing_is_drawn_with_the_one_named(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "model")
    edit(copy / "scheduler" / "scheduler_config.json", _class_name="DEISMultistepScheduler")
    args = (f"--model={copy}", "--prompt=a photo", "--num-steps=2", f"--out={tmp_path / 'out'}")
    assert "scheduler is DEISMultistepScheduler, which jaxdiff does not have: choose --sampler" in draw(*args).sentence
    assert draw(*args, "--sampler=ddim").code == 0
    assert draw(f"--model={copy}", "--sampler=ddim", "--dry-run").code == 0


@pytest.mark.slow
def test_a_rerun_draws_anew_what_another_config_would_draw_otherwise(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "model")
    args = (f"--model={copy}", "--prompt=a photo", "--num-steps=2", f"--out={tmp_path / 'out'}")
    assert draw(*args).code == 0
    moved = copy.rename(tmp_path / "moved")
    args = (f"--model={moved}", *args[1:])
    assert "1 of 1 pictures are there already" in draw(*args).out
    edit(moved / "scheduler" / "scheduler_config.json", prediction_type="v_prediction")
    assert_drawn_anew(draw(*args))
    edit(moved / "vae" / "config.json", scaling_factor=0.5)
    assert_drawn_anew(draw(*args))
    (moved / "tokenizer" / "merges.txt").write_text("#version: 0.2\n")
    assert_drawn_anew(draw(*args))


def assert_drawn_anew(answer):
    assert answer.code == 0, answer.err
    assert "there already" not in answer.out


@pytest.mark.slow
def test_a_picture_does_not_depend_on_how_long_the_other_prompts_are(folder):
    drawing = prepare(LatentModelSettings(str(folder)), PictureSettings(long_prompts=True, num_steps=2), make_mesh(1))
    prompts = ["a cat", "xxxxxxxxxx " * 11, "a dog"]
    together = {job.prompt: pixels for job, pixels in drawing.draw(make_jobs(prompts, 1), prompts)}
    assert together.keys() == {0, 1, 2}
    for number in (0, 2):
        job = [job for job in make_jobs(prompts, 1) if job.prompt == number]
        ((_, alone),) = drawing.draw(job, [prompts[number] if n == number else "" for n in range(3)])
        np.testing.assert_array_equal(together[number], alone)


# --- what is refused


def edit(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ((), "--prompt, --prompts or --task must say what to draw"),
        (("--prompt", " "), "--prompt: one is empty"),
        (("--prompts=nope.txt",), "--prompts nope.txt: cannot be read"),
        (("--prompts=empty.txt",), "--prompts empty.txt: holds no prompt"),
        (("--prompt=a", "--height=21"), "height must be a multiple of 4 pixels, got 21: try 20"),
        (("--prompt=a", "--num-steps=0"), "--num-steps must be at least 1, got 0"),
        (("--prompt=a", "--num-steps=2000"), "--num-steps 2000, leading spacing: num_steps must lie in 1..1000"),
        (("--prompt=a", "--eta=0.5"), "--eta has no effect without --sampler ddim"),
        (("--prompt=a", "--negative=b", "--guidance-scale=1"), "--negative has no effect at --guidance-scale 1"),
        (("--prompt=a", "--guidance-scale=inf"), "--guidance-scale must lie in [0, 1000]"),
        (("--prompt=a", "--seed=-1"), "--seed must lie in [0, 2^32)"),
        (("--prompt=a", "--revision=main"), "--revision has no effect with --model tiny"),
        (("--prompt=a", "--model=owner/none"), "the Hugging Face hub cannot be reached"),
        (("--prompt=a", "--model=./none"), "./none: no such folder"),
        (("--prompt=a", "--model=empty.txt"), "is a single file; `python -m weights_convert stable_diffusion"),
        (("--prompt=a", "--model=."), "has no model_index.json, so it is no folder of a diffusers pipeline"),
        (("--prompt=a", "--embeddings=none.bin"), "--embeddings none.bin: no such file"),
        (("--prompt=<w>", "--embeddings=wide.safetensors"), "<w>: its vectors have 5 numbers, but this model's tokens"),
        (("--prompt=a</w>", "--embeddings=known.safetensors"), "a</w> stands for something already"),
        (("--prompt=<w>", "--embeddings", "wide.safetensors", "again.safetensors"), "<w> is in another"),
        (("--prompt=a", "--embeddings=complex.bin"), "--embeddings complex.bin: <w> has complex numbers"),
        (("--prompt=a", "--embeddings=state.pt"), "--embeddings state.pt: no prompt says 'state_dict'"),
        (("--prompt=a", "--embeddings=unnamed.bin"), "--embeddings unnamed.bin: the name '' is no word"),
        (("--prompt=w", "--embeddings=wide.safetensors"), "no prompt says '<w>', which is what the file holds"),
        (("--prompt=a", "--num-steps=1000", "--sampler=unipc"), "must lie in 1..999 with unipc"),
        (("--prompt=" + "photo " * 80,), "'photo photo photo photo photo ' would be lost"),
        (("--prompt=a", "--adjust=<w>"), '--adjust must be WORD:CLASS, such as "<new1>:dog"'),
        (("--prompt=a", "--adjust", "<w>:a", "<w>:b"), "--adjust: one word is given twice"),
        (("--prompt=a", "--adjust-norm=2"), "--adjust-norm has no effect without --adjust"),
        (("--prompt=a", "--adjust=<w>:a", "--adjust-angle=2"), "--adjust-angle must lie in [0, 1], got 2.0"),
        (("--prompt=<w>", "--adjust=<w>:a"), "<w> is no word of --embeddings or --adapters, of which none was given"),
        (("--prompt=a", "--dtype=float64"), "invalid choice 'float64'"),
    ],
)  # fmt: skip
def test_what_cannot_be_drawn_is_one_sentence(tmp_path, monkeypatch, flags, sentence):
    monkeypatch.setattr(hub, "is_reachable", lambda: False)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_text("\n \n")
    save_file({"<w>": torch.zeros(5)}, tmp_path / "wide.safetensors")
    torch.save({"<w>": torch.zeros(64, dtype=torch.complex64)}, tmp_path / "complex.bin")
    torch.save({"state_dict": torch.zeros(2, 64)}, tmp_path / "state.pt")
    torch.save({"": torch.zeros(64)}, tmp_path / "unnamed.bin")
    save_file({"<w>": torch.zeros(5)}, tmp_path / "again.safetensors")
    save_file({"a</w>": torch.zeros(64)}, tmp_path / "known.safetensors")
    answer = draw(*flags)
    assert answer.code == 2
    assert sentence in answer.sentence
    assert "Traceback" not in answer.err
    assert not (tmp_path / "runs").exists()


def test_a_dry_run_reads_no_weights(folder, tmp_path, monkeypatch):
    shutil.copytree(folder, tmp_path / "copy")
    for path in (tmp_path / "copy").rglob("*.safetensors"):
        path.unlink()
    monkeypatch.chdir(tmp_path)
    answer = draw("--model=copy", "--dry-run", *SMALL)
    assert answer.code == 0, answer.err
    assert re.search(r"in all, at the most +\d+\.\d\d GB", answer.out)
    assert not (tmp_path / "runs").exists()


def test_interrupting_loses_no_picture(tmp_path, quick_settings):
    args = ["--prompt=a", "--num-images=200", "--batch-size=1", *SMALL, f"--out={tmp_path / 'out'}"]
    process = start("jaxdiff.text2image", *args)
    while process.poll() is None and not (tmp_path / "out" / "000_002.png").exists():
        pass
    process.send_signal(2)
    answer = finish(process)
    assert answer.code == 130, answer.err
    assert "run the same command again to go on" in answer.err
    assert "Traceback" not in answer.err
    done = sorted((tmp_path / "out").glob("*.png"))
    assert 3 <= len(done) < 200
    assert all(read_png_texts(path) for path in done)
