"""`python -m jaxdiff.zeroshot` as a user runs it, against transformers' torch CLIP on the same pictures."""

import csv
import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
import torch
from clip_twins import make_full_size_twin, make_twin
from clip_vocabulary import vocabulary, write_vocabulary
from commands import finish, run_here, start_several
from PIL import Image
from sklearn.datasets import load_sample_images
from transformers import CLIPImageProcessorPil, CLIPTokenizer

from jaxdiff import CLIPConfig, CLIPTextConfig, CLIPVisionConfig, zeroshot
from jaxdiff.io.digit_captions import CONTEXT
from jaxdiff.io.shards import Shards
from jaxdiff.recipes import contrastive

pytestmark = pytest.mark.usefixtures("quick_commands")

NAMES = ["red cat", "digit", "photo_of_it", "dog"]
PER_CLASS = 4


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXDIFF_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A folder as transformers writes it, random weights."""
    folder = tmp_path_factory.mktemp("checkpoint")
    ids = vocabulary()
    ends = {"bos_token_id": ids["<|startoftext|>"], "eos_token_id": ids["<|endoftext|>"]}
    small = {"num_hidden_layers": 1, "vocab_size": len(ids), "max_position_embeddings": 40, **ends}
    twin = make_twin(small, {"num_hidden_layers": 1})
    twin.save_pretrained(folder)
    CLIPImageProcessorPil(size=20, crop_size=20).save_pretrained(folder)
    write_vocabulary(folder)
    return folder, twin


@pytest.fixture
def optimized():
    """Compile with all optimisations, which long work pays back."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)


def cut_pictures(folder, num_classes, per_class, sides):
    """Write real pictures, cut from photographs, in the course's flat layout."""
    folder.mkdir(exist_ok=True)
    photos = load_sample_images().images
    rng = np.random.default_rng(0)
    for label in range(num_classes):
        for number in range(per_class):
            photo = photos[rng.integers(2)]
            height, width = rng.integers(*sides, 2)
            top, left = rng.integers(photo.shape[0] - height), rng.integers(photo.shape[1] - width)
            Image.fromarray(photo[top : top + height, left : left + width]).save(folder / f"{label}_{number}.png")
    return folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return cut_pictures(tmp_path_factory.mktemp("pictures"), len(NAMES), PER_CLASS, (30, 90))


def write_labels(path, names):
    path.write_text(json.dumps({str(number): name for number, name in enumerate(names)}))
    return path


@pytest.fixture
def labels(tmp_path):
    return write_labels(tmp_path / "id2label.json", NAMES)


def rows_of(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def torch_probabilities(checkpoint, pictures, names, templates):
    folder, twin = checkpoint
    tokenizer, processor = CLIPTokenizer.from_pretrained(folder), CLIPImageProcessorPil.from_pretrained(folder)
    weights = []
    for name in names:
        inputs = tokenizer([text.format(name) for text in templates], padding=True, return_tensors="pt")
        with torch.no_grad():
            embeds = twin.get_text_features(inputs["input_ids"], inputs["attention_mask"]).pooler_output
        embeds = (embeds / embeds.norm(dim=-1, keepdim=True)).mean(0)
        weights.append(embeds / embeds.norm())
    found, paths = {}, sorted(pictures.glob("*.png"))
    for first in range(0, len(paths), 8):
        part = paths[first : first + 8]
        pixels = processor([Image.open(path) for path in part], return_tensors="pt")["pixel_values"]
        with torch.no_grad():
            images = twin.get_image_features(pixels).pooler_output
            logits = twin.logit_scale.exp() * images / images.norm(dim=-1, keepdim=True) @ torch.stack(weights).T
        for path, row in zip(part, logits.softmax(-1).tolist()):
            found[path.name] = dict(zip(names, row))
    return found


def require_same_answers(rows, wanted):
    """Compare the rows of predictions.csv with torch's probabilities; return the largest difference."""
    assert sorted(row["image"] for row in rows) == sorted(wanted)
    worst = 0.0
    for row in rows:
        probabilities = wanted[row["image"]]
        assert row["name_1"] == max(probabilities, key=probabilities.get)
        for rank in range(1, min(5, len(probabilities)) + 1):
            worst = max(worst, abs(float(row[f"probability_{rank}"]) - probabilities[row[f"name_{rank}"]]))
    # Four digits of a cosine times at most 100.
    assert worst < 1e-3
    return worst


@pytest.mark.parametrize("templates", [["A photo of {}."], ["a photo of {}", "{}!!", "the {}, it's of it"]])
def test_answers_are_those_of_torch_picture_by_picture(tmp_path, checkpoint, pictures, labels, templates):
    answer = run_here(
        zeroshot.main,
        f"--images={pictures}",
        f"--labels={labels}",
        f"--model={checkpoint[0]}",
        f"--out={tmp_path / 'run'}",
        "--template",
        *templates,
        "--cases=2",
        *(["--compare-templates"] if len(templates) > 1 else []),
    )
    assert answer.code == 0, answer.err
    names = {path.name for path in answer.written}
    assert {"predictions.csv", "per_class.csv", "results.json", "report.html"} <= names
    assert all(path.is_file() for path in answer.written)
    rows = rows_of(tmp_path / "run" / "predictions.csv")
    require_same_answers(rows, torch_probabilities(checkpoint, pictures, NAMES, templates))
    correct = 0
    for row in rows:
        assert row["label"] == NAMES[int(row["image"].split("_")[0])]
        correct += int(row["label"] == row["name_1"])
        assert int(row["correct"]) == int(row["label"] == row["name_1"])
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    model = str(checkpoint[0])
    assert results[f"top1.{model}"] == correct / len(rows)
    assert results[f"top5.{model}"] == 1.0
    assert results[f"images.{model}"] == len(NAMES) * PER_CLASS
    if len(templates) > 1:
        alone = torch_probabilities(checkpoint, pictures, NAMES, templates[-1:])
        right = sum(max(alone[n], key=alone[n].get) == NAMES[int(n.split("_")[0])] for n in alone)
        assert results[f"template.{templates[-1]}.{model}"] == right / len(alone)
    page = (tmp_path / "run" / "report.html").read_text()
    assert "Pictures named by words" in page
    assert sum(int(row["images"]) for row in rows_of(tmp_path / "run" / "per_class.csv")) == len(rows)


@pytest.mark.parametrize(("weighting", "label"), [("autoclip", "AutoCLIP"), ("zpe", "ZPE")])
def test_weighted_prompts_are_labelled_and_shown_beside_equal_ones(
    tmp_path, checkpoint, pictures, labels, weighting, label
):
    templates = ["a photo of {}", "{}!!", "the {}, it's of it"]
    flags = [f"--images={pictures}", f"--labels={labels}", f"--model={checkpoint[0]}", "--template", *templates]
    plain, weighted = tmp_path / "plain", tmp_path / "weighted"
    assert run_here(zeroshot.main, *flags, f"--out={plain}").code == 0
    answer = run_here(zeroshot.main, *flags, f"--out={weighted}", f"--prompt-weights={weighting}")
    assert answer.code == 0, answer.err
    before, after = (json.loads((out / "results.json").read_text()) for out in (plain, weighted))
    model = str(checkpoint[0])
    assert after[f"top1_equal_weights.{model}"] == before[f"top1.{model}"]
    assert sum(after[f"prompt_weight.{text}.{model}"] for text in templates) == pytest.approx(1, abs=1e-5)
    rows = [rows_of(out / "predictions.csv") for out in (plain, weighted)]
    assert [row["image"] for row in rows[0]] == [row["image"] for row in rows[1]]
    assert any(one["probability_1"] != other["probability_1"] for one, other in zip(*rows))
    pages = [(out / "report.html").read_text() for out in (plain, weighted)]
    assert f"Prompts weighted by {label} (arXiv" in pages[1]
    assert not re.search("AutoCLIP|ZPE", pages[0])


def test_several_models_make_one_table_and_unreadable_pictures_are_counted(tmp_path, checkpoint, pictures, labels):
    folder = tmp_path / "pictures"
    for path in pictures.iterdir():
        place = folder / NAMES[int(path.name[0])] / path.name
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(path.read_bytes())
    (folder / "dog" / "broken.png").write_bytes(b"no picture")
    twin = tmp_path / "twin"
    twin.mkdir()
    for path in checkpoint[0].iterdir():
        (twin / path.name).write_bytes(path.read_bytes())
    answer = run_here(
        zeroshot.main,
        f"--images={folder}",
        "--clean-names",
        "--model",
        str(checkpoint[0]),
        str(twin),
        "--dtype=bfloat16",
        f"--out={tmp_path / 'run'}",
    )
    assert answer.code == 0, answer.err
    assert answer.out.count("1 skipped") == 2
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results[f"top1.{checkpoint[0]}"] == results[f"top1.{twin}"]
    assert results[f"skipped.{twin}"] == 1
    assert len(list((tmp_path / "run").glob("predictions_*.csv"))) == 2
    page = (tmp_path / "run" / "report.html").read_text()
    assert "broken.png" in page
    # Folders by as much of their paths as tells them apart.
    assert f"top-1 accuracy of {twin.name}<" in page
    assert "photo of it" in page


def test_tiny_digits_is_trained_once_and_read_like_any_model(tmp_path, monkeypatch):
    # Smaller still: what is trained is not what counts here.
    def smallest(vocab_size, eos_token_id):
        text = CLIPTextConfig(vocab_size, 16, 16, 16, 1, 2, CONTEXT, bos_token_id=None, eos_token_id=eos_token_id)
        return CLIPConfig(text, CLIPVisionConfig(16, 16, 16, 1, 2, image_size=16, patch_size=8), 16)

    monkeypatch.setattr(contrastive, "tiny_config", smallest)
    monkeypatch.setattr(contrastive, "BATCH", 8)
    flags = ["--tiny-steps=2", f"--out={tmp_path / 'run'}", "--cases=1", "--template", "{}", "a {}", "--devices=1"]
    first = run_here(zeroshot.main, *flags)
    assert first.code == 0, first.err
    assert "training tiny-digits" in first.out
    second = run_here(zeroshot.main, *flags)
    assert second.code == 0, second.err
    assert "training tiny-digits" not in second.out
    (folder,) = (tmp_path / "cache").glob("tiny-digits-2-*")
    kept = {path.name for path in folder.iterdir()}
    assert {"config.json", "model.safetensors", "vocab.json", "merges.txt", "preprocessor_config.json"} <= kept
    assert len(list((tmp_path / "cache" / "prompts").iterdir())) == 1


@pytest.mark.slow
@pytest.mark.parametrize("number", [2, 4])
def test_several_processes_share_the_pictures_and_write_the_answers_of_one(
    tmp_path, checkpoint, pictures, labels, number
):
    broken = tmp_path / "pictures"
    shutil.copytree(pictures, broken)
    (broken / "1_2.png").write_bytes(b"not a picture")
    flags = [f"--images={broken}", f"--labels={labels}", f"--model={checkpoint[0]}", "--batch-size=3", "--cases=1"]
    alone = run_here(zeroshot.main, *flags, f"--out={tmp_path / 'one'}", "--devices=1")
    assert alone.code == 0, alone.err
    words = ["-m", "jaxdiff.zeroshot"]
    answers = [finish(process) for process in start_several(words, number, *flags, f"--out={tmp_path / 'many'}")]
    assert [answer.code for answer in answers] == [0] * number, answers
    assert "1 skipped" in answers[0].out
    assert not any("top-1" in answer.out for answer in answers[1:])
    names = {path.name for path in (tmp_path / "one").iterdir()}
    assert {path.name for path in (tmp_path / "many").iterdir()} == names
    for name in names - {"results.json", "report.html", ".lock"}:
        assert (tmp_path / "many" / name).read_bytes() == (tmp_path / "one" / name).read_bytes()


def test_pictures_that_a_killed_run_had_encoded_are_not_encoded_again(
    tmp_path, checkpoint, pictures, labels, monkeypatch
):
    flags = [f"--images={pictures}", f"--labels={labels}", f"--model={checkpoint[0]}", "--batch-size=3", "--devices=1"]
    flags += [f"--out={tmp_path / 'run'}"]
    whole = Shards.write

    def killed(shards, number, arrays):
        if number == 4:
            raise KeyboardInterrupt
        whole(shards, number, arrays)

    monkeypatch.setattr(Shards, "write", killed)
    assert run_here(zeroshot.main, *flags).code == 130
    written = []
    monkeypatch.setattr(Shards, "write", lambda *args: written.append(args[1]) or whole(*args))
    again = run_here(zeroshot.main, *flags)
    assert again.code == 0, again.err
    assert written == [4, 5]
    # Another picture under the same name is another picture.
    monkeypatch.setattr(Shards, "write", killed)
    assert run_here(zeroshot.main, *flags).code == 130
    os.utime(pictures / "0_0.png", (1, 1))
    written.clear()
    monkeypatch.setattr(Shards, "write", lambda *args: written.append(args[1]) or whole(*args))
    assert run_here(zeroshot.main, *flags).code == 0
    assert written == [0, 1, 2, 3, 4, 5]


THINGS = [
    f"{colour} {thing}" for colour in ("red", "green", "old", "two") for thing in ["cat", "dog", "boat", "lamp", "rose"]
]


@pytest.mark.slow
@pytest.mark.usefixtures("optimized")
@pytest.mark.parametrize("name", ["ViT-B/32", "ViT-L/14"])
def test_full_size_checkpoints_answer_200_pictures_like_torch(tmp_path, name):
    twin = make_full_size_twin(name, vocabulary())
    folder = tmp_path / "checkpoint"
    twin.save_pretrained(folder)
    CLIPImageProcessorPil().save_pretrained(folder)
    write_vocabulary(folder)
    pictures = cut_pictures(tmp_path / "pictures", len(THINGS), 10, (60, 300))
    labels = write_labels(tmp_path / "id2label.json", THINGS)
    flags = [f"--images={pictures}", f"--labels={labels}", f"--model={folder}", f"--out={tmp_path / 'run'}"]
    answer = run_here(zeroshot.main, *flags, "--devices=1", "--batch-size=8")
    assert answer.code == 0, answer.err
    wanted = torch_probabilities((folder, twin), pictures, THINGS, ["A photo of {}."])
    worst = require_same_answers(rows_of(tmp_path / "run" / "predictions.csv"), wanted)
    ranked = np.sort([list(row.values()) for row in wanted.values()], axis=1)
    margins = ranked[:, -1] - ranked[:, -2]
    print(f"{name}: largest difference {worst:.1e}, smallest margin {margins.min():.1e}, mean {margins.mean():.2f}")
    # Else which class is best would be chance, and the answers would prove little.
    assert len({max(row, key=row.get) for row in wanted.values()}) > 2
    assert margins.min() > worst
    assert np.median(margins) > 1000 * worst


@pytest.mark.slow
@pytest.mark.usefixtures("optimized")
def test_tiny_digits_names_digits_that_it_has_never_seen(tmp_path):
    answer = run_here(zeroshot.main, f"--out={tmp_path / 'run'}", "--devices=1")
    assert answer.code == 0, answer.err
    assert json.loads((tmp_path / "run" / "results.json").read_text())["top1.tiny-digits"] > 0.85


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--images=/nowhere"], "--images /nowhere: no such folder or csv file; or give `digits`"),
        (["--template", "a photo"], "--template 'a photo': must hold {} once, where the class name goes"),
        (["--template", "{} {}"], "--template '{} {}': must hold {} once"),
        (["--model", "a/b", "a/b"], "--model: give each model once"),
        (["--model", "a/b", "c/d", "--revision=main"], "--revision goes with one --model, got several"),
        (["--cases=0"], "--cases must be at least 1, got 0"),
        (["--labels=x.json"], "--labels has no effect with --images digits: drop it"),
        (["--clean-names"], "--clean-names has no effect with --images digits: drop it"),
        (["--model=a/b", "--tiny-steps=900"], "--tiny-steps has no effect without --model tiny-digits: drop it"),
        (["--revision=main"], "--revision has no effect with --model tiny-digits: drop it"),
        (["--tiny-steps=0"], "--tiny-steps must be at least 1, got 0"),
        (["--template", "{}", "{}"], "--template: give each template once"),
        (["--compare-templates"], "--compare-templates has no effect with one template: give several, or drop it"),
        (["--prompt-weights=zpe"], "--prompt-weights has no effect with one template: give several, or drop it"),
        (["--descriptions=x.json", "--prompt-weights=zpe"], "--prompt-weights has no effect with --descriptions"),
        (["--descriptions=x.json", "--compare-templates"], "--compare-templates has no effect with --descriptions"),
        (["--descriptions=x.json", "--template", "{}"], "--template has no effect with --descriptions"),
        (["--model=./nowhere"], "--model ./nowhere: no such folder; give the folder of a model, or OWNER/NAME"),
    ],
)
def test_a_flag_that_cannot_be_used_is_one_sentence(tmp_path, monkeypatch, flags, sentence):
    monkeypatch.chdir(tmp_path)
    answer = run_here(zeroshot.main, *flags)
    assert answer.code == 2
    assert "Traceback" not in answer.err
    assert sentence in answer.sentence
    assert not (tmp_path / "runs").exists()


def test_a_prompt_that_is_too_long_is_named_and_cut_on_request(tmp_path, checkpoint, pictures, labels):
    flags = [f"--images={pictures}", f"--labels={labels}", f"--model={checkpoint[0]}", f"--out={tmp_path / 'run'}"]
    flags += ["--template", "it " * 40 + "{}"]
    answer = run_here(zeroshot.main, *flags)
    assert answer.code == 2
    assert "the prompt 'it it it" in answer.sentence
    assert "tokens, begin and end included, more than the 40 that the model reads" in answer.sentence
    assert "--truncate" in answer.sentence
    assert run_here(zeroshot.main, *flags, "--truncate").code == 0
    answer = run_here(zeroshot.main, *flags[:-2], "--truncate")
    assert answer.code == 2
    assert "--truncate has no effect: no prompt is too long; drop it" in answer.sentence


def test_help_is_quick_and_tells_every_flag_its_meaning_and_its_default():
    code = (
        "import atexit, sys; from jaxdiff import zeroshot\n"
        "atexit.register(lambda: print([m for m in ('jax', 'numpy', 'PIL', 'tokenizers') if m in sys.modules]))\n"
        "zeroshot.main(['--help'])"
    )
    environment = {**os.environ, "PYTHONIOENCODING": "utf-8"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.stdout.endswith("[]\n")
    text = re.sub(r"[│╰╯─\s]+", " ", done.stdout)
    for field in dataclasses.fields(zeroshot.Config):
        if field.name == "devices":  # a group of flags
            continue
        default = field.default if not isinstance(field.default, tuple) else field.default[0]
        flag = field.name.replace("_", "-")
        meaning, shown = re.search(rf" --{flag},? (.*?)\(default: (.*?)\)", text).groups()
        assert len(meaning.split()) > 3, field.name
        assert str(default) in shown, field.name
