"""`python -m jaxdiff.text2image --task input.json`: the course's delivery, file by file."""

import json
import os
import re

import numpy as np
import pytest
import torch
from commands import run_here
from PIL import Image
from safetensors.torch import save_file

from jaxdiff import text2image
from jaxdiff.io.images import read_png_texts
from jaxdiff.recipes.course_delivery import list_delivery

pytestmark = pytest.mark.usefixtures("quick_commands")
SMALL = ("--num-steps=2", "--height=16", "--width=16", "--devices=1", "--batch-size=8", "--guidance-scale=1")
DOG, STYLE = ("A <new1> on a hill.", "A <new1> on a bench."), ("The streets of Paris in the style of <new2>.",)


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with both learned words, each in a file of its own, where the command runs."""
    monkeypatch.chdir(tmp_path)
    for number, word in enumerate(("<new1>", "<new2>")):
        torch.manual_seed(number)
        save_file({word: 5 * torch.randn(64)}, f"{word}.safetensors")
    return tmp_path


def task(**prompts) -> str:
    """Write a task without what only the grader needs; its keys are the course's, "0" and "1"."""
    concepts = {
        key.strip("_"): {"src_image": "it", "token_name": f"<new{int(key.strip('_')) + 1}>", "prompt": list(texts)}
        for key, texts in prompts.items()
    }
    with open("input.json", "w") as file:
        json.dump(concepts, file)
    return "--task=input.json"


def deliver(*flags: str, words: tuple[str, ...] = ("<new1>", "<new2>")):
    files = ("--embeddings", *(f"{word}.safetensors" for word in words)) if words else ()
    return run_here(text2image.main, *flags, *files, *SMALL, "--out=out")


def pictures(place) -> dict[str, np.ndarray]:
    paths = sorted((place / "out").glob("*/**/*.png"))
    return {str(path.relative_to(place / "out")): np.asarray(Image.open(path)).astype(int) for path in paths}


def test_a_key_may_have_any_letters(tmp_path):
    (tmp_path / "input.json").write_text(
        json.dumps({"{a}": {"src_image": "it", "token_name": "<new1>", "prompt": ["A <new1>."]}})
    )
    _, jobs = list_delivery(tmp_path / "input.json", 2)
    assert [job.file for job in jobs] == [f"{{a}}/0/source{{a}}_prompt0_{n}.png" for n in range(2)]


def test_each_prompt_gets_25_pictures_under_the_names_that_the_grader_wants(place):
    answer = deliver(task(_0=DOG, _1=STYLE))
    assert answer.code == 0, answer.err
    assert all(path.exists() for path in answer.written)
    found = pictures(place)
    prompts = {"0/0": ("0_prompt0", DOG[0]), "0/1": ("0_prompt1", DOG[1]), "1/0": ("1_prompt0", STYLE[0])}
    assert set(found) == {f"{key}/source{name}_{n}.png" for key, (name, _) in prompts.items() for n in range(25)}
    for key, (name, prompt) in prompts.items():
        about = json.loads(read_png_texts(place / "out" / key / f"source{name}_24.png")["jaxdiff"])
        assert (about["prompt"], about["image"]) == (prompt, 24)
        assert np.abs(found[f"{key}/source{name}_0.png"] - found[f"{key}/source{name}_1.png"]).max() > 10

    kept = place / "out" / "0" / "0" / "source0_prompt0_0.png"
    before = os.stat(kept).st_mtime_ns
    for number in range(8):
        (place / "out" / "1" / "0" / f"source1_prompt0_{number}.png").unlink()
    again = deliver(task(_0=DOG, _1=STYLE))
    assert "67 of 75 pictures are there already" in again.out
    assert os.stat(kept).st_mtime_ns == before
    np.testing.assert_array_equal(pictures(place)["1/0/source1_prompt0_7.png"], found["1/0/source1_prompt0_7.png"])

    # The prompts of one key change nothing of the other's.
    for path in (place / "out" / "1" / "0").iterdir():
        path.unlink()
    answer = deliver(task(_0=DOG[:1], _1=STYLE), "--num-images=4")
    assert answer.code == 2
    assert re.search(r"source0_prompt0_10\.png: is none of the task's pictures", answer.sentence)
    (place / "out" / "0").rename(place / "away")
    assert deliver(task(_0=DOG[:1], _1=STYLE), "--num-images=4").code == 0
    for number in range(4):
        name = f"1/0/source1_prompt0_{number}.png"
        # Another place in the batch, so perhaps another order of sums.
        assert np.abs(pictures(place)[name] - found[name]).max() <= 1


def test_words_are_matched_by_their_name(place):
    answer = deliver(task(_1=STYLE), "--num-images=1", words=("<new1>",))
    assert answer.code == 2
    assert "no prompt says '<new1>', which is what the file holds" in answer.sentence
    needs = "'0' needs the learned word {}, which neither the model nor a file of --embeddings holds"
    assert needs.format("<new1>") in deliver(task(_0=DOG), words=()).sentence
    # A word that the model knows anyhow is not one that was learned.
    path = place / "input.json"
    path.write_text(path.read_text().replace('"token_name": "<new1>"', '"token_name": "photo"'))
    assert needs.format("photo") in deliver("--task=input.json", words=("<new1>",)).sentence
    assert not (place / "out").exists()


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ({"0": {"src_image": "dog", "token_name": "<new1>", "prompt": []}}, "prompt of '0' must be a list of texts"),
        ({"0": {"src_image": "dog", "token_name": "<new1>"}}, "prompt of '0' must be a list of texts, is None"),
        ({"0": {"src_image": "dog", "prompt": ["a"]}}, "token_name of '0' must be a text"),
        (
            {"../0": {"src_image": "dog", "token_name": "<new1>", "prompt": ["a"]}},
            "'../0' must be the name of a folder",
        ),
        ({}, "names no concept"),
    ],
)
def test_a_task_that_cannot_be_read_is_one_sentence(place, content, sentence):
    (place / "input.json").write_text(json.dumps(content))
    answer = deliver("--task=input.json")
    assert answer.code == 2
    assert sentence in answer.sentence
    assert not (place / "out").exists()


def test_a_task_beside_prompts_is_refused(place):
    assert "--task brings its own prompts" in deliver(task(_0=DOG), "--prompt=a").sentence
    assert "nope.json" in deliver("--task=nope.json").sentence
