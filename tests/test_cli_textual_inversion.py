"""`python -m jaxdiff.textual_inversion` as a user runs it."""

import json
import re
import shutil
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from commands import finish, run_here, start_several
from PIL import Image
from safetensors import safe_open
from sklearn.datasets import load_sample_images

from jaxdiff import FlaxCLIPModel, text2image, textual_inversion
from jaxdiff.errors import InputError
from jaxdiff.io.adapters import read_adapter, write_adapter
from jaxdiff.io.concept_pictures import parse_concept
from jaxdiff.io.digit_captions import caption_vocabulary
from jaxdiff.io.images import read_png_texts
from jaxdiff.io.interruption import StopRequest
from jaxdiff.io.learned_embeddings import read_learned, write_learned
from jaxdiff.io.metrics import METRICS, read_lines
from jaxdiff.io.runs import write_json
from jaxdiff.io.tokenizer import write_tokenizer
from jaxdiff.io.weights import write_safetensors
from jaxdiff.mesh import make_mesh
from jaxdiff.recipes import inversion_memory, inversion_parts, loop, text_to_image_model, training
from jaxdiff.recipes.contrastive import PREPROCESSOR, tiny_digits_config
from jaxdiff.recipes.custom_diffusion import text_matrices
from jaxdiff.recipes.image_score import ImageScore
from jaxdiff.recipes.inversion_parts import prepare_inversion
from jaxdiff.recipes.learned_words import TABLE, get_leaf
from jaxdiff.recipes.tiny_stable_diffusion import make_tiny
from jaxdiff.text2image_settings import LatentModelSettings
from jaxdiff.textual_inversion_settings import InversionSettings

pytestmark = pytest.mark.usefixtures("quick_commands")
SMALL = (
    "--model=tiny",
    "--size=16",
    "--train-steps=6",
    "--batch-size=4",
    "--devices=1",
    "--warmup-steps=1",
    "--save-every=2",
    "--log-every=1",
    "--sample-every=4",
    "--sample-images=2",
    "--sample-steps=2",
)


def learn(*args: str):
    return run_here(textual_inversion.main, *args)


def pixels(out) -> bytes:
    """Return the first picture that text2image drew, without the texts in its file, which differ by the flags."""
    return Image.open(out / "000_000.png").tobytes()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two folders of real pictures, one with a file that is no picture."""
    folder = tmp_path_factory.mktemp("pictures")
    for name, photo in zip(("thing", "style"), load_sample_images().images):
        (folder / name).mkdir()
        for number in range(2):
            Image.fromarray(photo[40 * number : 40 * number + 60, :80]).save(folder / name / f"{number}.png")
    (folder / "thing" / "broken.png").write_bytes(b"no picture")
    (folder / "thing" / "telephone.HEIC").write_bytes(b"a picture")
    return folder


def concepts(folders) -> tuple[str, ...]:
    """Return flags as they are given one by one; others follow theirs."""
    return f"--concept=<new1>:{folders / 'thing'}:digit", "--concept", f"<new2>:{folders / 'style'}:photo:style"


def test_words_are_learned_and_kept(folders, tmp_path):
    answer = learn(*concepts(folders), *SMALL, "--vectors-per-token=2", f"--out={tmp_path / 'a'}")
    assert answer.code == 0, answer.err
    assert "left out: broken.png" in answer.out
    assert "left out: telephone.HEIC: only " in answer.out
    assert all(path.exists() for path in answer.written)
    learned = read_learned(tmp_path / "a" / "learned_embeds.safetensors")
    assert {word: row.shape for word, row in learned.items()} == {"<new1>": (2, 64), "<new2>": (2, 64)}
    results = json.loads((tmp_path / "a" / "results.json").read_text())
    assert all(results[f"moved.{word}"] > 1e-3 for word in learned)
    lines = [json.loads(line) for line in (tmp_path / "a" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4, 5, 6]
    checked = [line for line in lines if "validation_loss" in line]
    assert [line["step"] for line in checked] == [0, 2, 4, 6]
    bands = [name for name in checked[0] if name.startswith("loss_t")]
    assert bands == ["loss_t0_249", "loss_t250_499", "loss_t500_749", "loss_t750_999"]
    assert (results["first.loss_t0_249"], results["last.loss_t0_249"]) == tuple(
        checked[i]["loss_t0_249"] for i in (0, -1)
    )
    assert (tmp_path / "a" / "grids" / "step_0000004.png").exists()
    page = (tmp_path / "a" / "report.html").read_text()
    assert "a style" not in page
    assert re.search(r"What &lt;new2&gt; was learned from", page)

    for number, (word, row) in enumerate(learned.items()):
        (apart,) = read_learned(tmp_path / "a" / f"learned_embeds_{number}.safetensors").items()
        assert apart[0] == word
        np.testing.assert_array_equal(apart[1], row)

    # What is kept is the average over the steps, not the last of them.
    state = ocp.StandardCheckpointer().restore(tmp_path / "a" / "checkpoints" / "6" / "state")
    for word, row in learned.items():
        np.testing.assert_array_equal(row, state["ema_params"][word])
        assert np.abs(row - state["params"][word]).max() > 1e-5


@pytest.mark.slow
def test_rows_stay_float32_where_the_networks_compute_in_half_of_it(folders, tmp_path):
    answer = learn(*concepts(folders), *SMALL, "--dtype=bfloat16", f"--out={tmp_path}")
    assert answer.code == 0, answer.err
    with safe_open(tmp_path / "learned_embeds.safetensors", "np") as file:
        rows = [file.get_tensor(name) for name in file.keys()]  # noqa: SIM118
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["moved.<new1>"] > 1e-3
    for row in rows:
        assert row.dtype == np.float32
        assert np.abs(row - row.astype(jnp.bfloat16).astype(np.float32)).max() > 0


@pytest.mark.slow
def test_directions_are_learned_alone_from_crops_too(folders, tmp_path):
    flags = ("--fixed-norm", "--direction-prior=0.01", "--crops=2", "--accumulation-steps=2", "--learning-rate=0.1")
    answer = learn(*concepts(folders), *SMALL, *flags, f"--out={tmp_path}")
    assert answer.code == 0, answer.err
    assert "<new1>: 2 pictures, learned as an object" in answer.out
    learned = read_learned(tmp_path / "learned_embeds.safetensors")
    table = get_leaf(make_tiny("float32", "float32")[1], TABLE)
    norm = np.linalg.norm(table, axis=1).mean()
    results = json.loads((tmp_path / "results.json").read_text())
    for word, row in learned.items():
        np.testing.assert_allclose(np.linalg.norm(row, axis=1), norm, rtol=1e-5)
        assert results[f"moved.{word}"] > 0.01


@pytest.fixture(scope="module")
def learn_matrices(folders, tmp_path_factory):
    """Return how to learn keys and values of one concept, again and again, and the folder of the run."""
    folder = tmp_path_factory.mktemp("matrices")
    (folder / "masks").mkdir()
    for number in range(2):
        mask = np.zeros((60, 80, 3), np.uint8)
        mask[20:50, 10:60] = 255
        Image.fromarray(mask).save(folder / "masks" / f"{number}.png")
    flags = ("--kv-learning-rate=0.01", f"--prior={folders / 'style'}:a photo", "--prior-weight=0.5", "--crops=1",
             f"--mask=<new1>:{folder / 'masks'}", "--adapter-rank=4", "--fixed-norm")  # fmt: skip
    concept = f"--concept=<new1>:{folders / 'thing'}:digit"
    return lambda: learn(concept, *SMALL, *flags, f"--out={folder / 'run'}"), folder / "run"


@pytest.fixture(scope="module")
def learned_matrices(learn_matrices):
    """The answer of the first such run, and its folder."""
    again, folder = learn_matrices
    return again(), folder


def test_keys_and_values_are_learned_beside_class_pictures_and_masks(learned_matrices):
    answer, run = learned_matrices
    assert answer.code == 0, answer.err
    assert "'a photo': 2 pictures of a class" in answer.out
    assert {"adapter.safetensors", "pytorch_custom_diffusion_weights.safetensors"} <= {p.name for p in answer.written}
    adapter = read_adapter(run / "adapter.safetensors")
    words = read_learned(run / "learned_embeds.safetensors")
    np.testing.assert_array_equal(adapter.words["<new1>"], words["<new1>"])
    params = make_tiny("float32", "float32")[1]
    assert adapter.deltas.keys() == set(text_matrices(params))
    assert all(np.abs(delta).max() > 1e-4 for delta in adapter.deltas.values())
    assert all(np.linalg.matrix_rank(delta) <= 4 for delta in adapter.deltas.values())
    results = json.loads((run / "results.json").read_text())
    assert results["moved.matrices"] > 0


@pytest.mark.slow
def test_an_adapter_is_kept_and_drawn_with(learn_matrices, learned_matrices, tmp_path):
    # Checkpoints hold the matrices, and what the optimizer knows of them.
    run = learned_matrices[1]
    before = (run / "adapter.safetensors").read_bytes()
    assert "going on from step 6 of 6" in learn_matrices[0]().out
    assert (run / "adapter.safetensors").read_bytes() == before
    learned = [f"--adapters={run / 'adapter.safetensors'}"], [f"--embeddings={run / 'learned_embeds.safetensors'}"]
    pictures = set()
    for number, flags in enumerate([*learned, []]):
        args = ["--prompt=a photo of <new1>", "--num-steps=2", "--height=16", "--width=16", *flags]
        drawn = run_here(text2image.main, *args, f"--out={tmp_path / str(number)}")
        assert drawn.code == 0, drawn.err
        pictures.add(pixels(tmp_path / str(number)))
    assert len(pictures) == 3


def test_flips_crops_masks_class_pictures_and_their_weight_reach_the_batches(folders, tmp_path):
    (tmp_path / "masks").mkdir()
    for number in range(2):
        # White on the left, so that a mirror image is known by its mask.
        mask = Image.new("RGB", (80, 60))
        mask.paste("white", (0, 0, 40, 60))
        mask.save(tmp_path / "masks" / f"{number}.png")
    concept = parse_concept(f"<new1>:{folders / 'thing'}:digit")
    training = InversionSettings(
        crops=3,
        mask=(f"<new1>:{tmp_path / 'masks'}",),
        kv_learning_rate=1e-5,
        prior=(f"{folders / 'style'}:a photo",),
        prior_weight=0.5,
        batch_size=4,
        size=16,
    )
    for flip, views in ((True, 16), (False, 8)):
        model = LatentModelSettings("tiny", decode_dtype="float32")
        parts = prepare_inversion([concept], model, replace(training, flip=flip), make_mesh(1))
        (source,) = parts.data.concepts
        assert source.latents.mean.shape[0] == views
        assert source.masks.shape == (views, *source.latents.mean.shape[1:3])
        left, right = source.masks[:, :, 0].mean(axis=1), source.masks[:, :, -1].mean(axis=1)
        assert np.sum(right > left) == (views // 2 if flip else 0)
        batch = parts.batch_at(0)
        np.testing.assert_array_equal(batch.weight, [2, 1, 2, 1])
        assert (batch.mask[1::2] == 1).all()
        assert (batch.mask[::2] < 1).any(axis=(1, 2)).all()


def test_words_that_the_tiny_world_has_not_are_told_before_it_is_trained(folders, tmp_path, monkeypatch):
    monkeypatch.setattr(text_to_image_model, "tiny_world_folder", None)
    answer = learn(f"--concept=<new1>:{folders / 'thing'}:dog", "--devices=1", f"--out={tmp_path / 'run'}")
    assert answer.code == 2
    assert "tiny-world, the model unless --model names another, only knows digits, and has no token for 'dog'" in (
        answer.sentence
    )


def test_an_adapter_of_another_model_or_format_is_refused(learned_matrices, tmp_path):
    adapter = read_adapter(learned_matrices[1] / "adapter.safetensors")

    def refused(path, sentence):
        answer = run_here(text2image.main, "--prompt=<new1>", f"--adapters={path}", f"--out={tmp_path / 'refused'}")
        assert answer.code == 2
        assert sentence in answer.sentence
        assert not (tmp_path / "refused").exists()

    write_adapter(tmp_path / "other.safetensors", adapter._replace(base="0" * 64))
    refused(tmp_path / "other.safetensors", f"learned with the model of hash {'0' * 64}, but this model's is")
    version = {"format": "jaxdiff.adapter", "version": "99", "base": adapter.base}
    write_safetensors(tmp_path / "later.safetensors", {"word.<new1>": adapter.words["<new1>"]}, version)
    refused(tmp_path / "later.safetensors", "version 99 of the format, but only")


def learn_on(devices: int, folders, out):
    """Learn on so many devices; return the rows, and the flags but for the devices."""
    flags = [*concepts(folders), *SMALL, "--batch-size=8", "--learning-rate=0.01"]
    flags.remove("--devices=1")
    answer = learn(*flags, f"--devices={devices}", f"--out={out}")
    assert answer.code == 0, answer.err
    return read_learned(out / "learned_embeds.safetensors"), flags


def assert_same_rows(found, expected):
    assert found.keys() == expected.keys()
    for word, row in expected.items():
        np.testing.assert_allclose(found[word], row, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_eight_devices_learn_the_same(folders, tmp_path):
    one, eight = (learn_on(devices, folders, tmp_path / str(devices))[0] for devices in (1, 8))
    assert_same_rows(eight, one)


@pytest.mark.slow
def test_two_processes_learn_the_same_and_one_goes_on(folders, tmp_path):
    alone, flags = learn_on(1, folders, tmp_path / "1")
    words, out = ["-m", "jaxdiff.textual_inversion"], tmp_path / "two"
    answers = [finish(one) for one in start_several(words, 2, *flags, f"--out={out}")]
    assert [answer.code for answer in answers] == [0, 0], answers
    assert [len(answer.out.split("Written")) for answer in answers] == [2, 1]
    assert_same_rows(read_learned(out / "learned_embeds.safetensors"), alone)
    shutil.rmtree(out / "checkpoints" / "6")
    answer = learn(*flags, "--devices=1", f"--out={out}")
    assert answer.code == 0, answer.err
    assert "going on from step 4 of 6" in answer.out
    assert_same_rows(read_learned(out / "learned_embeds.safetensors"), alone)


@pytest.mark.slow
def test_values_are_learned_for_the_tokens_of_a_word_alone(folders, tmp_path):
    flags = ("--value-learning-rate=0.01", "--adapter-rank=4", f"--out={tmp_path / 'a'}")
    answer = learn(*concepts(folders), *SMALL, *flags)
    assert answer.code == 0, answer.err
    assert "pytorch_custom_diffusion_weights.safetensors" not in {path.name for path in answer.written}
    adapter = read_adapter(tmp_path / "a" / "adapter.safetensors")
    table = np.asarray(get_leaf(make_tiny("float32", "float32")[1], TABLE))
    assert adapter.words.keys() == {"<new1>", "<new2>"}
    # The words are their initialisers, bit for bit.
    assert all((table == row).all(axis=1).any() for rows in adapter.words.values() for row in rows)
    values = [name for name in text_matrices(make_tiny("float32", "float32")[1]) if "to_v" in name]
    assert adapter.deltas.keys() == {f"{word}@{name}" for word in adapter.words for name in values}
    assert all(np.abs(delta).max() > 1e-4 for delta in adapter.deltas.values())

    assert not list((tmp_path / "a").glob("learned_embeds*"))

    drawn = set()
    write_learned(tmp_path / "words.safetensors", adapter.words)
    words = f"--embeddings={tmp_path / 'words.safetensors'}"
    values = f"--adapters={tmp_path / 'a' / 'adapter.safetensors'}"
    for flags in ([values], [words], [words, "--adjust=<new1>:photo"]):
        args = ["--prompt=a photo of <new1>", "--num-steps=2", "--height=16", "--width=16", *flags]
        answer = run_here(text2image.main, *args, f"--out={tmp_path / 'drawn'}")
        assert answer.code == 0, answer.err
        # Drawn anew, into the same folder.
        assert "are there already" not in answer.out
        drawn.add(pixels(tmp_path / "drawn"))
    assert len(drawn) == 3
    for flags, sentence in (
        ([values], f"{tmp_path / 'a' / 'adapter.safetensors'}: no prompt says '<new1>' or '<new2>', and it changes"),
        (["--adjust=<new1>:photo"], "--adjust: no prompt says '<new1>'"),
    ):
        answer = run_here(text2image.main, "--prompt=a photo of <new3>", *flags, f"--out={tmp_path / 'none'}")
        assert answer.code == 2
        assert sentence in answer.sentence
    about = json.loads(read_png_texts(tmp_path / "drawn" / "000_000.png")["jaxdiff"])
    assert (about["adjust"], about["adjust_angle"], about["adjust_norm"]) == (["<new1>:photo"], 0.2, 1.0)


EACH_STEP = (*(flag for flag in SMALL if "sample-every" not in flag), "--score-model=clip", "--sample-every=1")


def scored(monkeypatch, *scores: float) -> None:
    """Have the pictures of each step scored so, one after another."""
    given = iter(scores)
    monkeypatch.setattr(
        inversion_parts, "make_image_score", lambda *_: ImageScore(lambda pictures: float(next(given)), "a")
    )


def saved_of(out) -> tuple[dict, np.ndarray]:
    """Return the results of a run, and the one word that it saved."""
    return json.loads((out / "results.json").read_text()), read_learned(out / "learned_embeds.safetensors")["<new1>"]


@pytest.mark.slow
def test_learning_ends_when_the_pictures_become_no_better_and_the_best_is_saved(folders, tmp_path, monkeypatch):
    same = (f"--concept=<new1>:{folders / 'thing'}:digit", *EACH_STEP, "--save-every=1", "--patience=1")
    scored(monkeypatch, 50, 60, 60)  # what is saved is not scored again
    # Asked again, it knows that it had ended.
    for again in (False, True):
        answer = learn(*same, f"--out={tmp_path}")
        assert answer.code == 0, answer.err
        assert "none of the last 1 is the best; nothing more is learned" in answer.out
        assert "60.00 at step 2 is the best of 3; what had been learned by then is saved" in answer.out
        assert ("going on from step 3 of 6" in answer.out) == again
        results, row = saved_of(tmp_path)
        assert (results["steps"], results["saved.step"], results["saved.image_score"]) == (3, 2, 60)
        state = ocp.StandardCheckpointer().restore(tmp_path / "checkpoints" / "2" / "state")
        np.testing.assert_array_equal(row, state["ema_params"]["<new1>"])
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["image_score"] for line in lines if "image_score" in line] == [50, 60, 60]
    assert "step 2, whose pictures scored best" in (tmp_path / "report.html").read_text()
    other = learn(*same, "--sample-every=2", f"--out={tmp_path}")
    assert other.code == 2
    assert "sample_every was 1, is 2" in other.sentence


@pytest.mark.slow
def test_a_run_killed_after_its_best_step_saves_the_same(folders, tmp_path, monkeypatch):
    flags = ("--kv-learning-rate=0.01", "--adapter-rank=2", "--save-every=4", "--patience=4", "--seed=3")
    same = (f"--concept=<new1>:{folders / 'thing'}:digit", *EACH_STEP, *flags)
    scored(monkeypatch, 50, 70, 60, 61, 62, 63)
    assert learn(*same, f"--out={tmp_path / 'whole'}").code == 0

    class Killed(BaseException):
        pass

    def score(pictures):
        if not given:
            raise Killed
        return float(given.pop(0))

    # Between the checkpoint of step 4 and its score, a step later, and between the last checkpoint and its score.
    monkeypatch.setattr(inversion_parts, "make_image_score", lambda *_: ImageScore(score, "a"))
    given: list[int] = []
    for scores in ([50, 70, 60], [61], [62]):
        given += scores
        with pytest.raises(Killed):
            learn(*same, f"--out={tmp_path / 'parts'}")
    given += [63]
    answer = learn(*same, f"--out={tmp_path / 'parts'}")
    assert answer.code == 0, answer.err
    assert "going on from step 6 of 6" in answer.out
    for name in ("learned_embeds.safetensors", "adapter.safetensors"):
        whole, parts = ((tmp_path / run / name).read_bytes() for run in ("whole", "parts"))
        assert whole == parts
    assert all(saved_of(tmp_path / run)[0]["saved.step"] == 2 for run in ("whole", "parts"))


@pytest.mark.slow
def test_two_processes_stop_and_save_by_the_scores_of_a_real_clip_as_one_does(folders, tmp_path):
    FlaxCLIPModel(tiny_digits_config(), seed=1).save_pretrained(tmp_path / "clip")
    write_json(tmp_path / "clip" / "preprocessor_config.json", PREPROCESSOR.to_dict())
    write_tokenizer(tmp_path / "clip", *caption_vocabulary())
    same = (*concepts(folders), *(flag for flag in SMALL if "--devices" not in flag and "sample-every" not in flag))
    flags = (*same, f"--score-model={tmp_path / 'clip'}", "--sample-every=1", "--patience=2", "--train-steps=20")
    assert learn(*flags, "--devices=1", f"--out={tmp_path / 'one'}").code == 0
    words = ["-m", "jaxdiff.textual_inversion"]
    answers = [finish(process) for process in start_several(words, 2, *flags, f"--out={tmp_path / 'two'}")]
    assert [answer.code for answer in answers] == [0, 0], answers
    found = []
    for run in (tmp_path / "one", tmp_path / "two"):
        results = json.loads((run / "results.json").read_text())
        scores = [line["image_score"] for line in read_lines(run / METRICS) if "image_score" in line]
        assert len(scores) == results["steps"] == results["saved.step"] + 2 < 20
        assert results["saved.image_score"] == max(scores) == scores[results["saved.step"] - 1]
        found.append(scores)
    # Sums over two processes are rounded otherwise, by which nearly equal scores may change their order.
    both = min(map(len, found))
    np.testing.assert_allclose(found[0][:both], found[1][:both], atol=0.02)
    # Another CLIP of the same name would rank other pictures.
    FlaxCLIPModel(tiny_digits_config(), seed=2).save_pretrained(tmp_path / "clip")
    answer = learn(*flags, "--devices=1", f"--out={tmp_path / 'one'}")
    assert answer.code == 2
    assert "weights of the models" in answer.sentence


def test_words_of_files_are_learned_beside_as_they_are_drawn(folders, tmp_path):
    for word, rows in (("<bg>", 3), ("<one>", 1)):
        write_learned(tmp_path / f"{word}.safetensors", {word: np.ones((rows, 64), np.float32)})
    (tmp_path / "texts").write_text("a photo of {} <bg>\n{} <one>\n")
    files = tuple(tmp_path / f"{word}.safetensors" for word in ("<bg>", "<one>"))
    model, mesh = LatentModelSettings("tiny", embeddings=files), make_mesh(1)
    settings = InversionSettings(
        templates=(str(tmp_path / "texts"),), size=16, sample_prompts=("a photo of <new1> <bg>",)
    )

    def prepare(initializer):
        concept = parse_concept(f"<new1>:{folders / 'thing'}:{initializer}")
        return inversion_parts.prepare_inversion([concept], model, settings, mesh)

    parts = prepare("<one>")
    drawn = {ids.tobytes() for (ids,) in parts.drawing.tokenize(["a photo of <new1> <bg>", "<new1> <one>"])}
    assert {ids.tobytes() for step in range(8) for ids in parts.batch_at(step).input_ids} == drawn
    np.testing.assert_array_equal(parts.start["<new1>"], np.ones((1, 64)))
    with pytest.raises(InputError, match=r"initialiser '<bg>' is several tokens, '<bg>' \+ '<bg>_1' \+ '<bg>_2'"):
        prepare("<bg>")
    (tmp_path / "texts").write_text("a photo of {}\n")
    with pytest.raises(InputError, match="no prompt says '<one>'"):
        prepare("digit")
    # A longer word does not say the shorter one that it begins with.
    write_learned(tmp_path / "<new.safetensors", {"<new": np.ones((1, 64), np.float32)})
    model = LatentModelSettings("tiny", embeddings=(files[0], tmp_path / "<new.safetensors"))
    with pytest.raises(InputError, match="no prompt says '<new'"):
        prepare("digit")


def test_a_text_to_draw_that_is_too_long_is_refused_before_anything_is_learned(folders, tmp_path):
    answer = learn(*concepts(folders), *SMALL, f"--sample-prompts={'word ' * 80}", f"--out={tmp_path / 'a'}")
    assert answer.code == 2
    assert "would be lost: shorten it" in answer.sentence
    assert not (tmp_path / "a").exists()


def test_a_dry_run_says_what_learning_would_take(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    answer = learn(*SMALL, "--concept", "<a>:nowhere:x", "<b>:nowhere:x:style", "--vectors-per-token=2", "--dry-run")
    assert answer.code == 0, answer.err
    for name in ("weights", "learning, 4 pictures a step", "encoding, 4 pictures at once", "in all, at the most"):
        assert re.search(rf"^{name} +\d+\.\d\d GB$", answer.out, re.MULTILINE)
    assert not list(tmp_path.iterdir())


def test_a_dry_run_counts_the_clip_that_scores(monkeypatch):
    def numbers(tree) -> int:
        return sum(leaf.size for leaf in jax.tree.leaves(tree))

    # Nothing is compiled.
    sizes = lambda held, programs: {"held": numbers(held), **dict.fromkeys(programs, 0)}  # noqa: E731
    monkeypatch.setattr(inversion_memory, "estimate_memory", sizes)
    training = InversionSettings(size=16, score_model="tiny-digits")
    found = inversion_memory.estimate_learning(["<a>"], LatentModelSettings("tiny"), training, make_mesh(1))
    assert found["held"] == numbers([make_tiny("float32", "float32")[1], FlaxCLIPModel(tiny_digits_config()).params])
    assert "scoring, 8 pictures at once" in found


@pytest.mark.slow
def test_rows_that_are_not_finite_are_not_kept(folders, tmp_path, monkeypatch):
    # The last step alone goes wrong: its loss and gradient are still finite.
    def make_optimizer(*args):
        optimizer, learning_rate = training.make_optimizer(*args)
        late = optax.scale_by_schedule(lambda step: jnp.where(step == 5, jnp.inf, 1.0))
        return optax.chain(optimizer, late), learning_rate

    monkeypatch.setattr(inversion_parts, "make_optimizer", make_optimizer)
    answer = learn(*concepts(folders), *SMALL, f"--out={tmp_path}")
    assert answer.code == 2
    assert re.search(
        r"diverged at step 6: params\..+ is not finite\. The last good checkpoint is step 4", answer.sentence
    )
    assert not list(tmp_path.glob("learned_embeds*"))


@pytest.mark.slow
def test_a_stopped_run_goes_on_and_ends_bit_for_bit(folders, tmp_path, monkeypatch):
    (tmp_path / "texts").write_text("a photo of {}\na drawing of {}\n")
    same = (*concepts(folders), *SMALL, f"--templates={tmp_path / 'texts'}")
    assert learn(*same, f"--out={tmp_path / 'whole'}").code == 0

    class StopAtThree(StopRequest):
        """Ask to stop as Ctrl-C in the third step does."""

        steps = 0

        def protect(self):
            super().protect()
            self.steps += 1
            self.requested = self.steps >= 3

    with monkeypatch.context() as patch:
        patch.setattr(loop, "StopRequest", StopAtThree)
        stopped = learn(*same, f"--out={tmp_path / 'parts'}")
    assert stopped.code == 130
    assert "stopped and saved at step 3 of 6" in stopped.err
    going_on = learn(*same, f"--out={tmp_path / 'parts'}")
    assert "going on from step 3 of 6" in going_on.out
    whole, parts = (read_learned(tmp_path / name / "learned_embeds.safetensors") for name in ("whole", "parts"))
    for word, row in whole.items():
        np.testing.assert_array_equal(parts[word], row)
    lines = [(tmp_path / name / "metrics.jsonl").read_text().splitlines() for name in ("whole", "parts")]
    told = [[line for line in map(json.loads, one) if "validation_loss" in line] for one in lines]
    assert told[0] == told[1]
    other = learn(*same, "--learning-rate=0.1", f"--out={tmp_path / 'parts'}")
    assert other.code == 2
    assert "learning_rate was 0.005, is 0.1" in other.sentence
    others = "the weights of the models or the machine's --dtype are not those that this run began with"
    more = folders / "thing" / "more.png"
    Image.new("RGB", (30, 30), "red").save(more)
    other = learn(*same, f"--out={tmp_path / 'parts'}")
    more.unlink()
    assert other.code == 2
    assert others in other.sentence
    (tmp_path / "texts").write_text("a photo of {}\na picture of {}\n")
    other = learn(*same, f"--out={tmp_path / 'parts'}")
    assert other.code == 2
    assert others in other.sentence


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (("--model=tiny",), "--concept must say what to learn"),
        (("--concept=<a>:nowhere:digit",), "--concept <a>: nowhere: no such folder"),
        (("--concept=<a>:empty:digit",), "holds no picture to learn from"),
        (("--concept=<a>:thing:a digit",), "'a digit' is several tokens"),
        (("--concept=photo</w>:thing:digit",), "photo</w> stands for something already"),
        (("--concept=photo:thing:digit",), "photo stands for something already"),
        (("--concept=<a>:thing:digit", "--crops=-1"), "--crops must be at least 0, got -1"),
        (("--concept=<a>:thing:digit", "--direction-prior=1"), "--direction-prior has no effect without --fixed-norm"),
        (("--concept=<a>:thing:digit", "--fixed-norm", "--clip-norm=2"), "--clip-norm has no effect with --fixed-norm"),
        (("--concept", "<a>:thing:digit", "<a>:style:digit"), "a word stands for two concepts"),
        (("--concept=<a>:thing:digit", "--kv-learning-rate=0"), "--kv-learning-rate must be positive and finite"),
        (("--concept=<a>:thing:digit", "--adapter-rank=4"), "--adapter-rank has no effect without --kv-learning-rate"),
        (("--concept=<a>:thing:digit", "--prior-weight=2"), "--prior-weight has no effect without --prior"),
        (("--concept=<a>:thing:digit", "--prior=style:a photo"), "--prior has no effect without --kv-learning-rate"),
        (("--concept=<a>:thing:digit", "--prior=style", "--kv-learning-rate=1"), "'style': must be FOLDER:TEXT"),
        (
            ("--concept=<a>:thing:digit", "--prior=empty:a photo", "--kv-learning-rate=1"),
            "--prior: empty: holds no picture to learn from",
        ),
        (("--concept=<a>:thing:digit", "--mean-initializer"), "every initialiser is one token; drop it"),
        (("--concept=<a>:thing:digit", "--mask=<b>:thing"), "must be <word>:FOLDER, once for a word of --concept"),
        (("--concept=<a>:thing:digit", "--mask=<a>:nowhere"), "nowhere: no such folder"),
        (("--concept=<a>:thing:digit", "--mask=<a>:empty"), "must hold one mask named 0, holds 0"),
        (("--concept=<a>:thing:digit", "--kv-learning-rate=1", "--adapters=x"), "drop --adapters"),
        (("--concept=<a>:thing:digit", "--value-learning-rate=1", "--adapters=x"), "drop --adapters"),
        (("--concept=<a>:thing:digit", "--value-learning-rate=0"), "--value-learning-rate must be positive"),
        (
            ("--concept=<a>:thing:digit", "--value-learning-rate=1", "--learning-rate=1"),
            "--learning-rate has no effect with --value-learning-rate",
        ),
        (
            ("--concept=<a>:thing:digit", "--score-model=x", "--patience=3"),
            "can never end this run, which scores 3",
        ),
        (("--concept=<a>:thing:digit", "--captions=x"), "--captions has no effect without two --adapters"),
        (("--concept=<a>:thing:digit", "--templates=style:fine"), "--templates style:fine: no --concept is a style"),
        (("--concept=<a>:thing:digit", "--templates", "fine", "object:fine"), "have templates already"),
        (("--concept=<a>:thing:digit", "--templates=object:texts"), "the line 'no word' has no {} for the word"),
        (("--concept=<a>:thing:digit", "--size=21"), "height must be a multiple of 4 pixels, got 21"),
        (("--concept=<a>:thing:digit", "--train-steps=0"), "--train-steps must be at least 1, got 0"),
        (("--concept=<a>:thing:digit", "--batch-size=3", "--devices=2"), "--batch-size 3 does not split over 2"),
        (("--concept=<a>:thing:digit", "--guidance-scale=nan"), "--guidance-scale must lie in [0, 1000]"),
    ],
)
def test_what_cannot_be_learned_is_one_sentence(folders, tmp_path, monkeypatch, flags, sentence):
    monkeypatch.chdir(folders)
    (folders / "empty").mkdir(exist_ok=True)
    (folders / "texts").write_text("{}\nno word\n")
    (folders / "fine").write_text("a {}\n")
    if "--model=tiny" not in flags:
        flags = ("--model=tiny", *flags)
    answer = learn(*flags, *(("--batch-size=8",) if "--batch-size=3" not in flags else ()), f"--out={tmp_path / 'out'}")
    assert answer.code == 2
    assert sentence in answer.sentence
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_numbers_that_are_not_finite_stop_the_run(folders, tmp_path):
    answer = learn(*concepts(folders), *SMALL, "--learning-rate=1e38", "--clip-norm=1e38", f"--out={tmp_path / 'out'}")
    assert answer.code == 2
    assert re.search(r"training diverged at step \d", answer.sentence)
