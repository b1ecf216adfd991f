"""`python -m jaxdiff.clip_scores` against the course's grader and other scores, computed apart from ours in torch."""

import csv
import json
import re

import numpy as np
import pytest
import torch
from clip_twins import make_twin
from clip_vocabulary import vocabulary, write_vocabulary
from commands import finish, run_here, start_several
from PIL import Image
from sklearn.datasets import load_sample_images
from transformers import CLIPImageProcessorPil, CLIPTokenizer

from jaxdiff import clip_scores
from jaxdiff.io.images import write_overview, write_png
from jaxdiff.recipes.clip_groups import list_counted, list_pictures
from jaxdiff.recipes.clip_scores import Interval, best_intervals, cmmd, cmmd_intervals, mean_interval

pytestmark = pytest.mark.usefixtures("quick_commands")
COUNT = 6
PROMPTS = ["A cat on a digit.", "A photo of it!!"]


def score(*args: str):
    return run_here(clip_scores.main, *args)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXDIFF_CACHE", str(tmp_path / "cache"))


def cut(folder, count: int, seed: int):
    """Write real pictures, cut from photographs."""
    folder.mkdir(parents=True)
    photos, rng = load_sample_images().images, np.random.default_rng(seed)
    for number in range(count):
        photo = photos[rng.integers(2)]
        height, width = rng.integers(30, 90, 2)
        top, left = rng.integers(photo.shape[0] - height), rng.integers(photo.shape[1] - width)
        Image.fromarray(photo[top : top + height, left : left + width]).save(folder / f"{number}.png")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A tiny CLIP, and a task of one concept with two prompts."""
    folder = tmp_path_factory.mktemp("world")
    ids = vocabulary()
    ends = {"bos_token_id": ids["<|startoftext|>"], "eos_token_id": ids["<|endoftext|>"]}
    small = {"num_hidden_layers": 1, "vocab_size": len(ids), "max_position_embeddings": 77, **ends}
    twin = make_twin(small, {"num_hidden_layers": 1})
    twin.save_pretrained(folder / "clip")
    CLIPImageProcessorPil(size=20, crop_size=20).save_pretrained(folder / "clip")
    write_vocabulary(folder / "clip")
    cut(folder / "references" / "0", 3, 0)
    for number in range(2):
        cut(folder / "generated" / "0" / str(number), COUNT, 1 + number)
    task = {
        "src_image": "cat",
        "token_name": "<new1>",
        "prompt": [text.replace("cat", "<new1>") for text in PROMPTS],
        "prompt_4_clip_eval": PROMPTS,
        "baseline": [[-100, -100], [101, 0]],
    }
    (folder / "input.json").write_text(json.dumps({"0": task}))
    return folder, twin


@pytest.mark.slow
def test_eight_devices_and_two_processes_give_the_scores_of_one(world, tmp_path):
    folder, _ = world
    flags = (f"--task={folder / 'input.json'}", f"--generated={folder / 'generated'}", f"--count={COUNT}",
             f"--references={folder / 'references'}", f"--model={folder / 'clip'}", "--batch-size=4")  # fmt: skip
    found = []
    for devices in (1, 8):
        answer = score(*flags, f"--devices={devices}", f"--out={tmp_path / str(devices)}")
        assert answer.code == 0, answer.err
        assert not (tmp_path / str(devices) / "features").exists()
        found.append(json.loads((tmp_path / str(devices) / "results.json").read_text()))
    words = ["-m", "jaxdiff.clip_scores"]
    answers = [finish(one) for one in start_several(words, 2, *flags, f"--out={tmp_path / 'two'}")]
    assert [answer.code for answer in answers] == [0, 0], answers
    assert [len(answer.out.split("Written")) for answer in answers] == [2, 1]
    found.append(json.loads((tmp_path / "two" / "results.json").read_text()))
    figures = [name for name, value in found[0].items() if isinstance(value, float) and name != "seconds"]
    assert len(figures) > 20
    for name in figures:
        np.testing.assert_allclose([each[name] for each in found[1:]], found[0][name], rtol=1e-4, atol=1e-4)


def embed(folder, twin, files=(), texts=()) -> torch.Tensor:
    """Return embeddings of length 1 by transformers."""
    with torch.no_grad():
        if texts:
            tokenizer = CLIPTokenizer.from_pretrained(folder / "clip")
            found = twin.get_text_features(**tokenizer(list(texts), padding=True, return_tensors="pt"))
        else:
            processor = CLIPImageProcessorPil.from_pretrained(folder / "clip")
            pixels = processor([Image.open(file).convert("RGB") for file in files], return_tensors="pt")
            found = twin.get_image_features(**pixels)
    found = getattr(found, "pooler_output", found)
    return found / found.norm(dim=1, keepdim=True)


def listed(folder):
    return [folder / f"{number}.png" for number in range(len(list(folder.iterdir())))]


def test_the_grade_is_that_of_the_course(world, tmp_path):
    folder, twin = world
    answer = score(
        f"--task={folder / 'input.json'}",
        f"--generated={folder / 'generated'}",
        f"--references={folder / 'references'}",
        f"--model={folder / 'clip'}",
        f"--count={COUNT}",
        f"--out={tmp_path / 'out'}",
    )
    assert answer.code == 0, answer.err
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    references = embed(folder, twin, listed(folder / "references" / "0"))
    scale = float(twin.logit_scale.exp())
    rows = list(csv.DictReader((tmp_path / "out" / "scores.csv").open()))
    for number, prompt in enumerate(PROMPTS):
        drawn = embed(folder, twin, listed(folder / "generated" / "0" / str(number)))
        image = [100 * float(sum(torch.dot(one, other) for other in references)) / 3 for one in drawn]
        text = [scale * float(torch.dot(one, embed(folder, twin, texts=[prompt])[0])) for one in drawn]
        best = sorted(range(COUNT), key=lambda i, image=image, text=text: -(image[i] + 2.5 * text[i]))[:5]
        means = [sum(scores[i] for i in best) / 5 for scores in (image, text)]
        found = [results[f"0.{number}.best.{name}"] for name in ("image_score", "text_score")]
        np.testing.assert_allclose(found, means, rtol=1e-4)
        assert results[f"0.{number}.passed"] == (1, 0)[number]
        mine = rows[number * COUNT : (number + 1) * COUNT]
        np.testing.assert_allclose([float(row["image_score"]) for row in mine], image, atol=2e-3)
        assert [i for i, row in enumerate(mine) if row["among_best"] == "1"] == sorted(best)
        # The word left out of "A <new1> on a digit." leaves "A on a digit.".
        stripped = embed(folder, twin, texts=[prompt.replace("cat ", "")])[0]
        np.testing.assert_allclose(results[f"0.{number}.clip_t_stripped"], float((drawn @ stripped).mean()), atol=1e-5)
    assert (results["passed"], results["graded"]) == (1, 2)
    assert "0.0: PASS" in answer.out
    assert "0.1: FAIL" in answer.out


def test_two_folders_are_compared_and_words_looked_for(world, tmp_path):
    folder, twin = world
    generated, references = folder / "generated" / "0" / "0", folder / "references" / "0"
    answer = score(
        f"--generated={generated}", f"--references={references}", "--prompt=a <x> photo <y>", "--token", "<x>", "<y>",
        "--words", "cat", "digit", f"--model={folder / 'clip'}", f"--out={tmp_path / 'out'}",
    )  # fmt: skip
    assert answer.code == 0, answer.err
    assert re.search(r"clip_t_stripped .*: 'a photo'", answer.out)
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    x, y = (embed(folder, twin, listed(place)).double() for place in (generated, references))

    def mean_kernel(a, b, pairs):
        return np.mean([np.exp(-float((a[i] - b[j]).square().sum()) / 200) for i, j in pairs])

    both = [(i, j) for i in range(len(x)) for j in range(len(y))]
    for name, apart in (("cmmd", True), ("cmmd_with_self_pairs", False)):
        within = [
            mean_kernel(z, z, [(i, j) for i in range(len(z)) for j in range(len(z)) if not apart or i != j])
            for z in (x, y)
        ]
        expected = 1000 * (sum(within) - 2 * mean_kernel(x, y, both))
        np.testing.assert_allclose(results[f"pictures.{name}"], expected, rtol=1e-3, atol=1e-4)
        assert results[f"pictures.{name}_low"] < expected < results[f"pictures.{name}_high"]
    texts = embed(folder, twin, texts=["a photo of cat", "a photo of digit", "a photo"]).double()
    logits = x @ texts.T
    present = (logits[:, :2] > logits[:, 2:]).numpy()
    assert [results[f"pictures.present.{word}"] for word in ("cat", "digit")] == present.mean(0).tolist()
    assert results["pictures.all_present"] == present.all(1).mean()
    np.testing.assert_allclose(results["pictures.clip_i"], float((x @ y.T).mean()), atol=1e-5)


def test_each_of_several_concepts_has_its_own_references(world, tmp_path):
    folder, twin = world
    cut(tmp_path / "digit", 2, 7)
    generated = folder / "generated" / "0" / "0"
    given = {"cat": folder / "references" / "0", "digit": tmp_path / "digit"}
    references = [f"--references={word}:{place}" for word, place in given.items()]
    flags = (f"--generated={generated}", "--prompt=a cat and a digit", f"--model={folder / 'clip'}")
    answer = score(*flags, *references, "--words", "cat", "digit", f"--out={tmp_path / 'out'}")
    assert answer.code == 0, answer.err
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    drawn = embed(folder, twin, listed(generated))
    each = [100 * (drawn @ embed(folder, twin, listed(place)).T).mean(1).numpy() for place in given.values()]
    for word, scores in zip(given, each):
        np.testing.assert_allclose(results[f"pictures.image_score.{word}"], scores.mean(), rtol=1e-4)
        np.testing.assert_allclose(results[f"pictures.clip_i.{word}"], scores.mean() / 100, rtol=1e-4)
        assert re.search(rf"image_score\.{word} {scores.mean():.2f}.* present\.{word} [01]\.", answer.out)
    rows = csv.DictReader((tmp_path / "out" / "scores.csv").open())
    np.testing.assert_allclose([float(row["image_score"]) for row in rows], np.mean(each, axis=0), atol=2e-3)
    # The CMMD of a concept is that of a run with its references alone.
    alone = score(*flags, f"--references={given['digit']}", f"--out={tmp_path / 'alone'}")
    assert alone.code == 0, alone.err
    alone = json.loads((tmp_path / "alone" / "results.json").read_text())
    np.testing.assert_allclose(results["pictures.cmmd.digit"], alone["pictures.cmmd"], rtol=1e-5)
    assert "pictures.cmmd" not in results


def test_prompts_of_the_course_with_several_concepts_are_held_to_each(world, tmp_path):
    folder, twin = world
    (both,) = json.loads((folder / "input.json").read_text()).values()
    both |= {"prompt": ["A <new1>.", "<new1> and <new2>"], "prompt_4_clip_eval": ["A cat.", "Cat and digit"]}
    other = both | {
        "token_name": "<new2>",
        "prompt": ["A <new2>."],
        "prompt_4_clip_eval": ["digits"],
        "baseline": [[0, 0]],
    }
    (tmp_path / "input.json").write_text(json.dumps({"a": both, "b": other}))
    for number, place in enumerate(("generated/a/0", "generated/a/1", "generated/b/0", "references/a", "references/b")):
        cut(tmp_path / place, 2, number)
    flags = (f"--task={tmp_path / 'input.json'}", f"--generated={tmp_path / 'generated'}", "--count=2",
             f"--references={tmp_path / 'references'}", f"--model={folder / 'clip'}")  # fmt: skip
    answer = score(*flags, "--words", "cat", "digit", f"--out={tmp_path / 'out'}")
    assert answer.code == 0, answer.err
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    drawn = embed(folder, twin, listed(tmp_path / "generated" / "a" / "1"))
    for key, token in (("a", "<new1>"), ("b", "<new2>")):
        mean = 100 * float((drawn @ embed(folder, twin, listed(tmp_path / "references" / key)).T).mean())
        np.testing.assert_allclose(results[f"a.1.image_score.{token}"], mean, rtol=1e-4)
    stripped = embed(folder, twin, texts=["and"])[0]
    np.testing.assert_allclose(results["a.1.clip_t_stripped"], float((drawn @ stripped).mean()), atol=1e-5)
    # The grade is by the prompt's own concept.
    assert results["a.1.image_score"] == results["a.1.image_score.<new1>"] != results["a.1.image_score.<new2>"]
    np.testing.assert_allclose(results["a.1.best.image_score"], results["a.1.image_score.<new1>"], rtol=1e-6)
    assert "a.0.image_score.<new1>" not in results
    # Words are looked for where they are asked for: "digits" is another one.
    looked_for = {name.split(".present.")[0] for name in results if ".present.digit" in name and "_" not in name}
    assert looked_for == {"a.1"}
    assert {"a.0.present.cat", "a.1.present.cat", "a.1.all_present"} <= results.keys()
    assert re.search(r"a\.1: .*image_score\.<new2> .*present\.digit [01]\.", answer.out)
    unsaid = score(*flags, "--words=dog", f"--out={tmp_path / 'unsaid'}")
    assert unsaid.code == 2
    assert "--words dog: no prompt_4_clip_eval of --task says it" in unsaid.sentence


def test_intervals_have_the_width_that_theory_gives():
    rng = np.random.default_rng(0)
    interval = mean_interval(rng.normal(5, 2, 400), seed=1)
    np.testing.assert_allclose((interval.high - interval.low) / 2, 1.96 * 2 / 20, rtol=0.15)
    # CMMD of many fresh draws from one distribution, against the interval of a single one.
    angles = rng.normal(0, 0.5, (200, 60))
    circles = np.stack([np.cos(angles), np.sin(angles)], axis=-1)
    references = np.stack([np.cos(a := rng.normal(0.3, 0.5, 500)), np.sin(a)], axis=-1)
    spreads = np.std([cmmd(one, references) for one in circles], axis=0)
    for found, value, spread in zip(
        cmmd_intervals(circles[0], references, seed=0), cmmd(circles[0], references), spreads
    ):
        assert found.low < found.mean == value < found.high
        np.testing.assert_allclose((found.high - found.low) / 2, 1.96 * spread, rtol=0.5)


def test_the_best_five_are_chosen_anew_in_every_resample():
    image = np.random.default_rng(0).normal(80, 3, 25)
    found, of_text = best_intervals(image, np.full(25, 7.0), seed=3)
    rng = np.random.default_rng(3)
    means = [np.sort(image[rng.integers(0, 25, 25)])[-5:].mean() for _ in range(2000)]
    expected = [np.sort(image)[-5:].mean(), *np.percentile(means, (2.5, 97.5))]
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    assert of_text == (7.0, 7.0, 7.0)


def test_too_few_pictures_have_no_interval():
    assert mean_interval(np.array([3.0]), seed=0) == Interval(3.0, None, None)
    two = np.array([[1.0, 0.0], [0.0, 1.0]])
    assert all(found[1:] == (None, None) for found in cmmd_intervals(two, two, seed=0))


def test_what_counts_as_a_picture_of_the_task_is_what_its_grader_counts(tmp_path):
    for name in ("0.png", "1.gif", "2.webp", "3.txt"):
        (tmp_path / name).touch()
    write_overview(tmp_path / "grid.png", np.zeros((8, 8, 3), np.uint8))
    write_png(tmp_path / "other.png", np.zeros((8, 8, 3), np.uint8), {"Description": "a night"})
    counted = [path.name for path in list_counted(tmp_path, "--generated")]
    assert counted == ["0.png", "1.gif", "grid.png", "other.png"]
    # Grids are none of the pictures that they show.
    assert [path.name for path in list_pictures(tmp_path, "--generated")] == ["0.png", "2.webp", "other.png"]


def test_photographs_are_turned_as_they_were_held_but_for_the_course(world, tmp_path):
    folder, _ = world
    photo = Image.fromarray(load_sample_images().images[0][:200, :300])
    turned = Image.Exif()
    turned[0x0112] = 6  # hold it clockwise by a quarter
    for name in ("generated", "references"):
        (tmp_path / name / "0" / "0").mkdir(parents=True)
    photo.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "generated" / "0" / "0" / "0.png", exif=turned)
    photo.save(tmp_path / "references" / "0" / "0.png")
    task = json.loads((folder / "input.json").read_text())
    task["0"] |= {"prompt": task["0"]["prompt"][:1], "prompt_4_clip_eval": PROMPTS[:1], "baseline": [[0, 0]]}
    (tmp_path / "input.json").write_text(json.dumps(task))
    found = []
    for flags in (
        [f"--generated={tmp_path / 'generated' / '0' / '0'}", f"--references={tmp_path / 'references' / '0'}"],
        [f"--generated={tmp_path / 'generated'}", f"--references={tmp_path / 'references'}", "--count=1",
         f"--task={tmp_path / 'input.json'}"],
    ):  # fmt: skip
        answer = score(*flags, f"--model={folder / 'clip'}", f"--out={tmp_path / 'out'}")
        assert answer.code == 0, answer.err
        results = json.loads((tmp_path / "out" / "results.json").read_text())
        found.append(next(value for name, value in results.items() if name.endswith(".image_score")))
    assert found[0] == pytest.approx(100, abs=1e-3)
    assert found[1] < 99.99


def test_sheets_of_earlier_runs_go_and_nothing_else(world, tmp_path):
    folder, _ = world
    same = (f"--model={folder / 'clip'}", f"--out={tmp_path}")
    task = (f"--task={folder / 'input.json'}", f"--generated={folder / 'generated'}", f"--count={COUNT}")
    assert score(*task, f"--references={folder / 'references'}", *same).code == 0
    sheets = {path.name for path in tmp_path.glob("*.png")}
    assert sheets == {"sheet_0.0.png", "sheet_0.1.png"}
    # What somebody kept, drew, or had another command write stays.
    (tmp_path / "sheet_kept.png").write_bytes((tmp_path / "sheet_0.0.png").read_bytes())
    write_overview(tmp_path / "sheet_other.png", np.zeros((8, 8, 3), np.uint8))
    Image.new("RGB", (8, 8)).save(tmp_path / "sheet_mine.png")
    answer = score(f"--generated={folder / 'generated' / '0' / '0'}", "--prompt=a cat", *same)
    assert answer.code == 0, answer.err
    assert all(f"deleted: {tmp_path / name}" in answer.out for name in sheets)
    mine = {"sheet_kept.png", "sheet_other.png", "sheet_mine.png"}
    assert {path.name for path in tmp_path.glob("*.png")} == {"sheet_pictures.png", *mine}


@pytest.mark.parametrize(
    ("change", "flags", "sentence"),
    [
        ({}, ["--count=25"], "6 pictures, must be 25"),
        ({"prompt": []}, [], "prompt of '0' must be a list of texts, is []"),
        ({"prompt": ["a"]}, [], "'0' has 1 prompts, 2 prompts to grade by and 2 baselines"),
        ({"baseline": [[1, 2], [3]]}, [], "baseline of '0' must be a list of pairs of numbers"),
        ({"token_name": 5}, [], "token_name of '0' must be a text, is 5"),
        ({}, ["--references=nowhere"], "--references nowhere/0: no such folder"),
        ({}, ["--prompt=a"], "--task brings its own prompts"),
    ],
)
def test_a_task_that_cannot_be_graded_is_one_sentence(world, tmp_path, change, flags, sentence):
    folder, _ = world
    task = json.loads((folder / "input.json").read_text())
    task["0"] |= change
    (tmp_path / "input.json").write_text(json.dumps(task))
    given = {
        "--task": tmp_path / "input.json",
        "--generated": folder / "generated",
        "--references": folder / "references",
        "--count": 6,
        "--out": tmp_path / "out",
    } | dict(flag.split("=") for flag in flags)
    answer = score(*(f"{flag}={value}" for flag, value in given.items()))
    assert answer.code == 2
    assert sentence in answer.sentence
    assert "Traceback" not in answer.err


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ([], "nothing to score by"),
        (["--prompt=a", "--token=<x>"], "--token '<x>' is not in --prompt 'a'"),
        (["--prompt=a", "--count=3"], "--count has no effect without --task"),
        (["--prompt=a", "--references=empty"], "--references empty: holds no pictures"),
        (["--references", "empty", "pictures"], "--references empty: of several folders each needs its own word"),
        (["--references", "a:pictures", "a:pictures"], "the word 'a' has references already"),
        (["--references=a:nowhere"], "--references a: nowhere: no such folder"),
        (["--prompt=a"], "1 pictures cannot be read; the first is"),
    ],
)
def test_pictures_that_cannot_be_scored_are_one_sentence(world, tmp_path, monkeypatch, flags, sentence):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    cut(tmp_path / "pictures", 2, 0)
    (tmp_path / "pictures" / "1.png").write_bytes(b"no picture")
    answer = score("--generated=pictures", f"--model={world[0] / 'clip'}", *flags)
    assert answer.code == 2
    assert sentence in answer.sentence
