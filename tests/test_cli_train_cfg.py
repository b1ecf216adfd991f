"""train_cfg as a stranger uses it: what a run writes, what it says, and that no way to stop it changes the result."""

import base64
import json
import math
import re
import shutil
import signal
import time
from html.parser import HTMLParser
from importlib import metadata
from io import BytesIO
from types import SimpleNamespace

import numpy as np
import orbax.checkpoint as ocp
import pytest
from commands import TINY_RUN, finish, run_here, start, start_several
from PIL import Image

from jaxdiff import train_cfg
from jaxdiff.io.datasets import load_data
from jaxdiff.io.digits import DOMAINS, embedded_digits
from jaxdiff.io.provenance import tree_hash
from jaxdiff.io.run_lock import LOCK
from jaxdiff.mesh import make_mesh
from jaxdiff.recipes import judge
from jaxdiff.recipes.conditional_training import training_figures
from jaxdiff.recipes.digits_report import loss_section

pytestmark = pytest.mark.usefixtures("quick_commands")

DIGITS = tuple("0123456789")


def results(folder):
    return json.loads((folder / "results.json").read_text())


def logged(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def checkpoint_steps(folder):
    return sorted(int(path.name) for path in (folder / "checkpoints").iterdir())


@pytest.fixture
def copied_run(finished_run, tmp_path):
    return shutil.copytree(finished_run[0], tmp_path / "run")


# --- what a finished run leaves


def test_a_run_succeeds_and_ends_with_the_paths_of_all_that_it_wrote(finished_run):
    folder, answer = finished_run
    assert answer.code == 0, answer.err
    assert "Traceback" not in answer.err
    kept = {path.name for path in folder.iterdir()} - {LOCK}
    assert {path.relative_to(folder).parts[0] for path in answer.written} == kept
    assert [path for path in answer.written if not path.exists()] == []


def test_a_run_writes_every_file_that_it_promises(finished_run):
    folder, _ = finished_run
    assert json.loads((folder / "config.json").read_text())["train_steps"] == 8
    assert [path.stat().st_size > 0 for path in (folder / "tensorboard").glob("events.out.tfevents.*")] == [True]
    assert [path.name for path in sorted((folder / "grids").iterdir())] == ["step_0000003.png", "step_0000006.png"]
    pictures = [f"{kind}_{domain}.png" for kind in ("grid", "reverse") for domain in DOMAINS]
    for path in [*(folder / "grids").iterdir(), *(folder / name for name in pictures)]:
        with Image.open(path) as picture:
            # More than one colour, so something was drawn.
            assert np.asarray(picture.convert("L")).std() > 0


def test_every_step_is_logged_and_every_checkpoint_validated(finished_run):
    folder, _ = finished_run
    lines = logged(folder)
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 9))
    assert [line["step"] for line in lines if "validation_loss" in line] == [4, 8]
    assert checkpoint_steps(folder) == [4, 8]
    assert all(math.isfinite(value) for line in lines for value in line.values())


def test_results_have_plain_names_and_finite_numbers(finished_run):
    record = results(finished_run[0])
    for domain in DOMAINS:
        assert record[f"judge.samples.{domain}"] == 2 * len(DIGITS)
        low, share, high = (record[f"judge.sample_accuracy{end}.{domain}"] for end in ("_low", "", "_high"))
        assert 0 <= low <= share <= high <= 1
        by_class = [record[f"judge.sample_accuracy.{domain}.{digit}"] for digit in DIGITS]
        assert math.isclose(np.mean(by_class), share)
        assert 0 <= record[f"judge.real_accuracy.{domain}"] <= 1
    figures = {name: value for name, value in record.items() if not isinstance(value, dict | str)}
    assert {"seconds", "training.images_per_second", "sampling.images_per_second"} <= figures.keys()
    assert [name for name, value in figures.items() if not math.isfinite(value)] == []
    assert set(record) - set(figures) == {"config", "versions", "hashes", "command"}


def test_results_agree_with_the_log_the_data_and_the_checkpoint(finished_run):
    folder, _ = finished_run
    record, lines = results(folder), logged(folder)
    rates = [line["images_per_second"] for line in lines if "loss" in line]
    assert record["training.images_per_second"] == np.median(rates)
    assert record["training.final_loss"] == next(line["loss"] for line in lines if line["step"] == 8)
    _, _, domains = embedded_digits(held_out=True)
    assert [record[f"judge.real_images.{domain}"] for domain in DOMAINS] == np.bincount(domains).tolist()
    # Read by Orbax alone.
    saved = ocp.StandardCheckpointer().restore(folder / "checkpoints" / "8" / "state")
    assert record["hashes"]["ema_params"] == tree_hash(saved["ema_params"])
    assert record["training.parameters"] == sum(leaf.size for leaf in ocp.tree.to_flat_dict(saved["params"]).values())


def test_results_say_where_they_come_from(finished_run):
    folder, _ = finished_run
    record = results(folder)
    assert record["command"] == " ".join(["python -m jaxdiff.train_cfg", *TINY_RUN, f"--out={folder}"])
    assert record["config"] == json.loads((folder / "config.json").read_text())
    assert record["versions"]["jax"] == metadata.version("jax")
    assert record["versions"]["device"] == "1 x cpu"


def test_the_single_pictures_are_delivered_one_file_each(finished_run):
    folder, _ = finished_run
    pictures = {str(path.relative_to(folder / "samples")): path for path in (folder / "samples").rglob("*.*")}
    assert set(pictures) == {
        f"{domain}/{digit}_{n}.png" for domain in DOMAINS for digit in DIGITS for n in ("001", "002")
    }
    for path in pictures.values():
        with Image.open(path) as picture:
            assert (picture.size, picture.mode) == ((16, 16), "RGB")


class Page(HTMLParser):
    """What a page loads, and its text."""

    def __init__(self, text):
        super().__init__()
        self.loads, self.text = [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.loads += [value for name, value in attrs if name in ("src", "href", "srcset", "data", "poster")]

    def handle_data(self, data):
        self.text += data.replace("\N{NO-BREAK SPACE}", " ")


def test_the_report_is_one_file_with_the_pictures_and_figures_of_the_run(finished_run):
    folder, _ = finished_run
    text = (folder / "report.html").read_text()
    page, record = Page(text), results(folder)
    shown = [f"{kind}_{domain}.png" for kind in ("grid", "reverse") for domain in DOMAINS]
    assert len(page.loads) == len(shown)
    for source, name in zip(page.loads, shown):
        kind, data = source.split(",")
        assert kind == "data:image/png;base64"
        drawn, filed = (np.asarray(Image.open(file)) for file in (BytesIO(base64.b64decode(data)), folder / name))
        np.testing.assert_array_equal(drawn, filed)
    assert re.findall(r"https?://|@import|url\(", text) == []
    for domain in DOMAINS:
        assert f"{100 * record[f'judge.sample_accuracy.{domain}']:.1f} %" in page.text
    assert record["hashes"]["ema_params"] in page.text
    assert record["command"] in page.text


# --- the same command again


@pytest.mark.slow
def test_a_finished_run_is_not_trained_again_and_gives_the_same_results(copied_run):
    before = {path: path.stat().st_mtime_ns for path in (copied_run / "checkpoints").rglob("*")}
    log, record = (copied_run / "metrics.jsonl").read_bytes(), results(copied_run)
    again = run_here(train_cfg.main, *TINY_RUN, f"--out={copied_run}")
    assert again.code == 0, again.err
    assert "going on from step 8 of 8" in again.out
    assert {path: path.stat().st_mtime_ns for path in (copied_run / "checkpoints").rglob("*")} == before
    assert (copied_run / "metrics.jsonl").read_bytes() == log
    assert results(copied_run)["hashes"] == record["hashes"]
    accuracies = [name for name in record if name.startswith("judge.")]
    assert {name: results(copied_run)[name] for name in accuracies} == {name: record[name] for name in accuracies}


def interrupt(args, folder, step):
    """Start a run, send it Ctrl-C once its log shows a step, and return its answer."""
    process = start("jaxdiff.train_cfg", *args)
    log, deadline = folder / "metrics.jsonl", time.monotonic() + 200
    while not (log.exists() and f'"step": {step},' in log.read_text()) and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    return finish(process)


# Quicker, in the tests of chaos, a run goes on after signals and after damage to its checkpoints.
@pytest.mark.slow
def test_an_interrupted_run_goes_on_and_ends_like_one_that_was_not(finished_run, tmp_path):
    folder = tmp_path / "run"
    # A grid after every step takes the time in which the signal arrives; how often it is drawn changes nothing else.
    args = [*(arg for arg in TINY_RUN if not arg.startswith("--sample-every")), "--sample-every=1", f"--out={folder}"]
    stopped = interrupt(args, folder, step=1)
    assert stopped.code == 130, stopped.err
    assert "Traceback" not in stopped.err
    assert "stopping after this step; once more to leave at once" in stopped.err
    # The signal may also come in the very last step.
    before = re.search(r"\njaxdiff train_cfg: stopped and saved at step (\d) of 8; run the same command", stopped.err)
    assert before or "train_cfg: trained to the end and saved; run the same command again" in stopped.err
    step = before[1] if before else "8"
    assert int(step) in checkpoint_steps(folder)
    assert not (folder / "results.json").exists()
    resumed = run_here(train_cfg.main, *TINY_RUN, f"--out={folder}")
    assert resumed.code == 0, resumed.err
    assert f"going on from step {step} of 8" in resumed.out
    assert results(folder)["hashes"] == results(finished_run[0])["hashes"]
    once, twice = (
        [(line["step"], line["loss"]) for line in logged(run) if "loss" in line] for run in (finished_run[0], folder)
    )
    assert once == twice


@pytest.mark.slow
@pytest.mark.parametrize("number", [2, 4])
def test_several_processes_train_and_report_like_one_and_one_goes_on_where_they_stopped(
    finished_run, quick_settings, tmp_path, number
):
    folder = tmp_path / "run"
    flags = [*(flag for flag in TINY_RUN if not flag.startswith("--devices")), f"--out={folder}"]
    environment = {name.upper(): str(value) for name, value in quick_settings.items()}
    words = ["-m", "jaxdiff.train_cfg"]
    answers = [finish(process) for process in start_several(words, number, *flags, environment=environment)]
    assert [answer.code for answer in answers] == [0] * number, answers
    assert all("Written" not in answer.out for answer in answers[1:])
    assert {path.name for path in folder.iterdir()} == {path.name for path in finished_run[0].iterdir()}
    for name in ("loss", "validation_loss"):
        many, one = ([line[name] for line in logged(run) if name in line] for run in (folder, finished_run[0]))
        np.testing.assert_allclose(many, one, rtol=1e-5)
    shutil.rmtree(folder / "checkpoints" / "8")
    again = run_here(train_cfg.main, *TINY_RUN, f"--out={folder}")
    assert "going on from step 4 of 8" in again.out
    (losses, once) = ([line["loss"] for line in logged(run) if "loss" in line] for run in (folder, finished_run[0]))
    np.testing.assert_allclose(losses, once, rtol=1e-5)


def flip_a_byte(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.slow
@pytest.mark.parametrize("damage", [flip_a_byte, truncate])
def test_a_damaged_checkpoint_is_named_and_the_one_before_gives_the_same_result(finished_run, copied_run, damage):
    # The largest file is the one with the arrays.
    damage(max((copied_run / "checkpoints" / "8").rglob("*"), key=lambda path: path.stat().st_size))
    damage(max((copied_run / "judge").rglob("*"), key=lambda path: path.stat().st_size))
    (copied_run / "results.json").unlink()
    again = run_here(train_cfg.main, *TINY_RUN, f"--out={copied_run}")
    assert again.code == 0, again.err
    assert re.findall(r"(\w+): checkpoint (\d) is damaged", again.out) == [("judge", "5"), ("checkpoints", "8")]
    assert "going on from step 4 of 8" in again.out
    assert results(copied_run)["hashes"] == results(finished_run[0])["hashes"]


def test_a_finished_run_that_lost_its_log_can_still_be_reported(tmp_path, unchecked):
    params = {"kernel": np.zeros((3, 4)), "bias": np.zeros(4)}
    figures = training_figures(tmp_path, SimpleNamespace(state=SimpleNamespace(params=params)))
    assert figures == {"training.parameters": 16}
    assert loss_section(tmp_path).blocks[0].svg(narrow=False)


@pytest.mark.parametrize("devices", [1, 3, 8])
def test_the_judge_learns_from_batches_that_split_over_any_number_of_devices(tmp_path, monkeypatch, devices):
    seen = []

    def train_judge(train, num_steps, batch_size, *_):
        seen.append(batch_size)
        raise InterruptedError

    monkeypatch.setattr(judge, "train_judge", train_judge)
    with pytest.raises(InterruptedError):
        judge.prepare_judge(load_data("digits"), 1, 0, make_mesh(devices), tmp_path)
    assert seen[0] % devices == 0
    assert 128 <= seen[0] < 128 + devices


def test_another_config_is_refused_by_name(finished_run, copied_run):
    refused = run_here(train_cfg.main, *TINY_RUN, f"--out={copied_run}", "--seed=1", "--ema-decay=0.9")
    assert refused.code == 2
    assert "another config: ema_decay was 0.995, is 0.9; seed was 0, is 1. Choose" in refused.sentence
    assert results(copied_run) == results(finished_run[0])


@pytest.mark.slow
def test_a_run_that_is_started_over_keeps_nothing_of_the_old_one(finished_run, copied_run):
    (copied_run / "notes.txt").write_text("mine")
    (copied_run / "grids" / "step_0000001.png").write_text("old")
    flags = [f"--out={copied_run}", "--seed=1", "--resume=never", "--train-steps=2"]
    again = run_here(train_cfg.main, *TINY_RUN, *flags)
    assert again.code == 0, again.err
    assert "going on" not in again.out
    assert json.loads((copied_run / "config.json").read_text())["seed"] == 1
    assert [line["step"] for line in logged(copied_run) if "loss" in line] == [1, 2]
    assert not (copied_run / "grids" / "step_0000001.png").exists()
    assert (copied_run / "notes.txt").read_text() == "mine"
    hashes = [results(run)["hashes"] for run in (copied_run, finished_run[0])]
    assert hashes[0]["ema_params"] != hashes[1]["ema_params"]
    assert hashes[0]["judge"] != hashes[1]["judge"]
