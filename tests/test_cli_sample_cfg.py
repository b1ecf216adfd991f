"""sample_cfg as a stranger uses it: a trained run sampled again in other ways, and refusals of one sentence."""

import json
import math
import shutil

import pytest
from commands import TINY_SAMPLING, finish, run_here, start_several

from jaxdiff import sample_cfg
from jaxdiff.io.checkpoint import DIGESTS, METRIC, write_digests
from jaxdiff.io.digits import DOMAINS
from jaxdiff.io.weight_files import file_sha256

pytestmark = pytest.mark.usefixtures("quick_commands")


def sample(run, out, *flags):
    return run_here(sample_cfg.main, f"--run={run}", f"--out={out}", "--devices=1", *TINY_SAMPLING, *flags)


def results(folder):
    return json.loads((folder / "results.json").read_text())


def delivered(folder):
    return {path.relative_to(folder): path.read_bytes() for path in (folder / "samples").rglob("*.png")}


@pytest.fixture
def copied_run(finished_run, tmp_path):
    return shutil.copytree(finished_run[0], tmp_path / "run")


# --- what it does


def test_the_settings_of_the_run_give_its_pictures_again(finished_run, tmp_path):
    run, _ = finished_run
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    # DDIM without noise is what eta 0 means.
    answer = sample(run, tmp_path, "--eta=0")
    assert answer.code == 0, answer.err
    assert "sampling step 8 of 8" in answer.out
    assert delivered(tmp_path) == delivered(run)
    assert len(delivered(run)) == 40
    again, once = results(tmp_path), results(run)
    files = [run / "checkpoints" / "8" / DIGESTS, run / "judge" / "5" / DIGESTS]
    assert again["hashes"] == once["hashes"] | {str(path): file_sha256(path) for path in files}
    judged = {name: value for name, value in once.items() if name.startswith("judge.")}
    assert {name: again[name] for name in judged} == judged
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before


def shards(folder):
    return {path.name: path.read_bytes() for path in (folder / "shards").iterdir() if path.suffix == ".safetensors"}


@pytest.mark.slow
@pytest.mark.parametrize("number", [2, 4])
def test_several_processes_share_the_images_and_write_the_bytes_of_one(finished_run, tmp_path, number):
    run, _ = finished_run
    flags = [*TINY_SAMPLING[:-1], "--sample-batch-size=10", f"--run={run}"]
    alone = run_here(sample_cfg.main, *flags, f"--out={tmp_path / 'one'}", "--devices=1")
    assert alone.code == 0, alone.err
    words = ["-m", "jaxdiff.sample_cfg"]
    answers = [finish(process) for process in start_several(words, number, *flags, f"--out={tmp_path / 'many'}")]
    assert [answer.code for answer in answers] == [0] * number, answers
    assert [len(answer.out.split("Written")) for answer in answers] == [2] + [1] * (number - 1)
    assert shards(tmp_path / "many") == shards(tmp_path / "one")
    assert len(shards(tmp_path / "one")) == 4
    assert delivered(tmp_path / "many") == delivered(tmp_path / "one")
    once, shared = results(tmp_path / "one"), results(tmp_path / "many")
    assert shared["hashes"] == once["hashes"]
    assert {name: shared[name] for name in once if name.startswith("judge.")} == {
        name: value for name, value in once.items() if name.startswith("judge.")
    }


@pytest.mark.slow
def test_only_missing_images_are_drawn_again_and_those_of_other_settings_all(finished_run, tmp_path):
    run, _ = finished_run
    assert sample(run, tmp_path, "--sample-batch-size=10").code == 0
    whole = shards(tmp_path)
    (tmp_path / "shards" / "0000002.safetensors").unlink()
    times = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "shards").iterdir()}
    assert sample(run, tmp_path, "--sample-batch-size=10").code == 0
    assert shards(tmp_path) == whole
    again = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "shards").iterdir()}
    assert {name: again[name] for name in times} == times
    assert sample(run, tmp_path, "--sample-batch-size=10", "--seed=1").code == 0
    assert shards(tmp_path).keys() == whole.keys()
    assert not set(shards(tmp_path).values()) & set(whole.values())


def test_a_folder_of_that_name_that_holds_something_else_is_left_alone(finished_run, tmp_path):
    own = tmp_path / "shards" / "mine.txt"
    own.parent.mkdir()
    own.write_text("mine")
    answer = sample(finished_run[0], tmp_path)
    assert answer.code == 2
    assert f"{tmp_path / 'shards'}: has no about.json, so it may not be jaxdiff's to empty; remove it" in answer.err
    assert own.read_text() == "mine"


def test_everything_that_it_writes_is_listed_and_the_figures_are_finite(finished_run, tmp_path):
    answer = sample(
        finished_run[0], tmp_path / "new" / "out", "--eta=1", "--guidance-scale=3", "--seed=5", "--deliver=1"
    )
    assert answer.code == 0, answer.err
    out = tmp_path / "new" / "out"
    names = {f"{kind}_{domain}.png" for kind in ("grid", "reverse") for domain in DOMAINS}
    names |= {f"samples/{domain}" for domain in DOMAINS} | {"shards", "results.json", "report.html"}
    assert {str(path.relative_to(out)) for path in answer.written} == names
    assert all(path.exists() for path in answer.written)
    assert {str(path) for path in delivered(out)} == {f"samples/{d}/{k}_001.png" for d in DOMAINS for k in range(10)}
    record = results(out)
    given = {"eta": 1.0, "guidance_scale": 3.0, "seed": 5, "deliver": 1, "sampler": "ddim"}
    assert {name: record["config"][name] for name in given} == given
    figures = {name: value for name, value in record.items() if not isinstance(value, dict | str)}
    assert [name for name, value in figures.items() if not math.isfinite(value)] == []
    # It trains nothing, so it claims no speed of training.
    assert {"seconds", "sampling.images_per_second"} <= figures.keys()
    assert "training.images_per_second" not in figures
    assert not set(delivered(out).values()) & set(delivered(finished_run[0]).values())


@pytest.mark.slow
def test_the_best_checkpoint_is_the_one_of_lowest_loss_on_any_number_of_devices(copied_run, tmp_path):
    # The last one is made the worst, sealed as if it had been written so.
    (metric,) = (
        path for path in (copied_run / "checkpoints" / "8" / "metrics").iterdir() if METRIC in path.read_text()
    )
    metric.write_text(json.dumps({METRIC: 1e3}))
    write_digests(copied_run / "checkpoints" / "8")
    flags = ["--checkpoint=best", "--sampler=ddpm", "--devices=3", "--sample-batch-size=10"]
    answer = sample(copied_run, tmp_path / "out", *flags)
    assert answer.code == 0, answer.err
    assert "sampling step 4 of 8" in answer.out
    record = results(tmp_path / "out")
    assert record["training.step"] == 4
    assert record["versions"]["device"] == "3 x cpu"
    assert record["hashes"]["judge"] == results(copied_run)["hashes"]["judge"]
    assert record["hashes"]["ema_params"] != results(copied_run)["hashes"]["ema_params"]


@pytest.mark.slow
def test_a_smaller_delivery_leaves_no_picture_of_the_larger_one(finished_run, tmp_path):
    folder = tmp_path / "samples" / DOMAINS[0]
    folder.mkdir(parents=True)
    for name in ("0_001.png", "0_003.png", "9_1000.png", "mine.png"):
        (folder / name).write_text("old")
    answer = sample(finished_run[0], tmp_path)
    assert answer.code == 0, answer.err
    names = {f"{digit}_{n}.png" for digit in range(10) for n in ("001", "002")} | {"mine.png"}
    assert {path.name for path in folder.iterdir()} == names


# --- what it refuses


def refused(answer, sentence):
    assert answer.code == 2
    assert answer.out == ""
    assert answer.sentence.startswith("jaxdiff sample_cfg: error: ")
    assert sentence in answer.sentence
    assert "Traceback" not in answer.err
    assert answer.err.count("\n") == 1


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--eta=0.5", "--sampler=ddpm"], "--eta has no effect with --sampler ddpm: drop it or use ddim"),
        (["--eta=1.5"], "--eta must lie in [0, 1], got 1.5"),
        (
            ["--guidance-interval", "0.1", "1", "--guidance-scale=1"],
            "--guidance-interval has no effect at guidance scale 1",
        ),
        (["--guidance-interval", "2", "1"], "--guidance-interval needs 0 <= LOW < HIGH"),
        (["--guidance-scale=nan"], "--guidance-scale must be a finite number of at least 0, got nan"),
        (["--deliver=3"], "--deliver must lie in 0..2 (--samples-per-class), got 3"),
        (["--num-steps=1001"], "--num-steps 1001 is more than the 1000 timesteps of training"),
        (["--num-steps=0"], "--num-steps must be at least 1, got 0"),
        (["--samples-per-class=0"], "--samples-per-class must be at least 1, got 0"),
        (["--devices=9"], "--devices must lie in 1..8 on this machine, got 9"),
        (["--guidance-scale=2", "--domain-guidance-scale=3", "--seed=-1"], "--seed must lie in [0, 2^32), got -1"),
        (["--out="], "the value after --out is empty"),
    ],
)
def test_a_flag_that_cannot_be_used_is_one_sentence(finished_run, tmp_path, flags, sentence):
    refused(sample(finished_run[0], tmp_path, *flags), sentence)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_without_a_run_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    for run in (tmp_path / "nothing", tmp_path, tmp_path / "file"):
        refused(
            sample(run, tmp_path / "out"),
            f"--run {run}: no config.json there; give the --out folder of a train_cfg run",
        )


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ('{"seed": ', "config.json: cannot be read"),
        ("[]", "config.json: cannot be read (a list instead of an object)"),
        ('{"architectures": ["GPT2"]}', "not the config of a train_cfg run"),
    ],
)
def test_a_config_that_is_none_is_one_sentence(tmp_path, text, sentence):
    (tmp_path / "config.json").write_text(text)
    refused(sample(tmp_path, tmp_path / "out"), sentence)


@pytest.mark.parametrize(
    ("file", "change", "sentence"),
    [
        ("judge.json", {"image_shape": None}, "judge.json: not the record of a judge"),
        ("judge.json", {"image_shape": [16, 16]}, "judge.json: not the record of a judge"),
        ("judge.json", {"figures": {"judge.real_accuracy.digits_m": "high"}}, "judge.json: not the record of a judge"),
        ("data.json", {"sha256": None}, "data.json: has no sha256, so it is not train_cfg's; run train_cfg again"),
    ],
)
def test_records_that_are_not_a_run_s_are_one_sentence(copied_run, tmp_path, file, change, sentence):
    path = copied_run / file
    kept = {**json.loads(path.read_text()), **change}
    path.write_text(json.dumps({name: value for name, value in kept.items() if value is not None}))
    answer = sample(copied_run, tmp_path / "out")
    refused(answer._replace(out=""), sentence)
    assert not (tmp_path / "out" / "shards").exists()


def test_a_run_without_what_sampling_needs_is_one_sentence(copied_run, tmp_path):
    def refused_now(sentence, *flags):
        answer = sample(copied_run, tmp_path / "out", *flags)
        refused(answer._replace(out=""), sentence)

    refused_now("--out", f"--out={copied_run / 'config.json'}")
    for step in ("4", "8"):
        folder = copied_run / "checkpoints" / step
        shutil.rmtree(folder / "metrics")
        write_digests(folder)
    refused_now("no checkpoint there has a loss on held-out images yet; use --checkpoint last", "--checkpoint=best")
    shutil.rmtree(copied_run / "checkpoints")
    refused_now("no checkpoint there yet; run train_cfg first")
    (copied_run / "judge.json").unlink()
    refused_now("its judge is not trained yet; run train_cfg again, to the end")
    assert not (tmp_path / "out" / "results.json").exists()
