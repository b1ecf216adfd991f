"""Every wrong input is answered by one clear sentence and exit code 2; --help is quick and shows every default."""

import csv
import dataclasses
import json
import os
import re
import signal
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from commands import finish, run_here, start
from PIL import Image

from jaxdiff import __main__, ddim_grid, sample_cfg, text2image, textual_inversion, train_cfg
from jaxdiff.command import parse, run_command
from jaxdiff.errors import InputError
from jaxdiff.recipes.memory import explain_want_of_memory

pytestmark = pytest.mark.usefixtures("quick_commands")


def refused(answer, *parts):
    assert answer.code == 2
    assert "Traceback" not in answer.err
    assert "error" not in answer.out
    # One sentence and its command, and nothing else.
    assert re.fullmatch(r"jaxdiff train_cfg: error: [^\n]+\n", answer.err)
    for part in parts:
        assert part in answer.sentence


def train(*flags):
    return run_here(train_cfg.main, *flags)


def fields_of(config):
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield from fields_of(value)
        else:
            yield field.name, value


# --- flags


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--train-steps=0"], "--train-steps must be at least 1, got 0"),
        (["--train-steps=-5"], "--train-steps must be at least 1, got -5"),
        (["--judge-steps=0"], "--judge-steps must be at least 1, got 0"),
        (["--num-steps=0"], "--num-steps must be at least 1, got 0"),
        (["--num-steps=2000"], "--num-steps 2000 is more than the 1000 timesteps of training"),
        (["--batch-size=12"], "--batch-size 12 does not split over 8 devices: use a multiple of 8"),
        (["--batch-size=24", "--accumulation-steps=2"], "8 devices and 2 accumulation steps: use a multiple of 16"),
        (["--devices=9"], "--devices must lie in 1..8 on this machine, got 9"),
        (["--eta=1.01"], "--eta must lie in [0, 1], got 1.01"),
        (["--eta=-0.1"], "--eta must lie in [0, 1], got -0.1"),
        (["--eta=0", "--sampler=ddpm"], "--eta has no effect with --sampler ddpm: drop it or use ddim"),
        (["--min-snr-gamma=5"], "--min-snr-gamma has no effect with --loss-weighting constant: drop it or use min_snr"),
        (
            ["--guidance-scale=1", "--guidance-interval", "0.1", "2"],
            "--guidance-interval has no effect at guidance scale 1",
        ),
        (["--joint-dropout=0"], "needs images without class and domain in training: raise --joint-dropout above 0"),
        (["--zero-terminal-snr", "--prediction-type=eps"], "use --prediction-type v or x_0"),
        (["--weight-decay=inf"], "--weight-decay must be a finite number of at least 0, got inf"),
        (["--learning-rate=nan"], "--learning-rate must be positive and finite, got nan"),
        (["--ema-decay=1"], "--ema-decay must lie in [0, 1), got 1.0"),
        (["--deliver=101"], "--deliver must lie in 0..100 (--samples-per-class), got 101"),
        (["--seed=-1"], "--seed must lie in [0, 2^32), got -1"),
        (["--image-size=0"], "--image-size must be at least 1, got 0"),
        (["--out", ""], "the value after --out is empty; is a shell variable unset?"),
        (["--data="], "the value after --data is empty; is a shell variable unset?"),
        (["--data=tfds:nope"], "--data tfds:nope: tensorflow-datasets cannot open it"),
        (["--data=tfds:mnist"], "--data tfds:mnist: not prepared in"),
    ],
)
def test_a_flag_that_cannot_be_used_is_one_sentence(tmp_path, monkeypatch, flags, sentence):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "tfds"))
    refused(train(*flags), sentence)
    assert not (tmp_path / "runs").exists()


def test_a_flag_of_many_values_takes_those_of_all_its_mentions_and_another_the_last():
    flags = ["--prompt=a", "--seed", "1", "--prompt", "b", "c", "--num_steps=5", "--seed=2", "--prompt=d"]
    config = parse("jaxdiff text2image", text2image.Config, flags)
    assert config.prompt == ("a", "b", "c", "d")
    assert (config.pictures.seed, config.pictures.num_steps) == (2, 5)
    inversion = ["--concept", "<a>:x:y", "--sample_prompts=e", "--concept=<b>:x:y", "--sample-prompts", "f"]
    learned = parse("jaxdiff textual_inversion", textual_inversion.Config, inversion)
    assert learned.concept == ("<a>:x:y", "<b>:x:y")
    assert learned.training.sample_prompts == ("e", "f")
    assert parse("jaxdiff ddim_grid", ddim_grid.Config, ["--etas", "0", "--etas", "1"]).modes.etas == (0.0, 1.0)


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (
            ["--sampler=nope"],
            "invalid choice 'nope' for argument '--sampler'. Expected one of ('ddim', 'ddpm', 'euler',",
        ),
        (["--seed=x"], "Error parsing --seed: invalid literal for int()"),
        (["--nope=3"], "Unrecognized options: --nope"),
        (["--out"], "Missing value for argument '--out'."),
    ],
)
def test_a_flag_that_cannot_be_read_is_told_with_the_way_to_the_help(flags, sentence):
    answer = train(*flags)
    assert answer.code == 2
    assert answer.out == ""
    assert sentence in answer.sentence
    assert "jaxdiff train_cfg --help" in answer.sentence
    assert "Traceback" not in answer.err


# --- data


def write_pictures(folder, names, size=(8, 8)):
    folder.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(names):
        pixels = np.random.default_rng(number).integers(0, 256, (*size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / name)


def write_domain(folder, number=12, header=("image_name", "label"), size=(8, 8)):
    """Write a domain of two classes in the layout with a csv."""
    names = [f"{n:03d}.png" for n in range(number)]
    write_pictures(folder / "data", names, size)
    with (folder / "train.csv").open("w", newline="") as file:
        csv.writer(file).writerows([header, *((name, n % 2) for n, name in enumerate(names))])


def append_row(folder, row):
    with (folder / "train.csv").open("a") as file:
        file.write(row + "\n")


def cut_short(path):
    path.write_bytes(path.read_bytes()[:-30])


def write_bomb(path):
    """Write a PNG of a few hundred bytes that claims 5000 x 5000 pixels."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    head = struct.pack(">IIBBBBB", 5000, 5000, 8, 2, 0, 0, 0)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")
    )


def missing(data):
    return "no such folder; give `digits`, a folder of domains, or tfds:NAME"


def empty(data):
    data.mkdir()
    return "no folders there; it should hold DOMAIN/train.csv"


def without_column(data):
    write_domain(data / "ink", header=("image_name", "class"))
    return "train.csv: no column 'label'; its first line must be image_name,label"


def row_without_file(data):
    write_domain(data / "ink")
    append_row(data / "ink", "999.png,1")
    return "train.csv, line 14: '999.png' is not in"


def label_no_integer(data):
    write_domain(data / "ink")
    append_row(data / "ink", "000.png,cat")
    return "train.csv, line 14: label 'cat' is not an integer in 0..9999"


def label_out_of_range(data):
    write_domain(data / "ink")
    append_row(data / "ink", "000.png,7")
    return "label 7 of "


def mixed_sizes(data):
    write_domain(data / "ink")
    write_pictures(data / "ink" / "data", ["003.png"], size=(8, 9))
    return "is 9x8 pixels but "


def one_truncated_of_few(data):
    write_domain(data / "ink")
    cut_short(data / "ink" / "data" / "005.png")
    return "1 of 12 pictures cannot be read, more than 1%; the first is "


def bomb(data):
    write_domain(data / "ink")
    write_bomb(data / "ink" / "data" / "005.png")
    return "005.png: 5000x5000 pixels, more than the 16,000,000 allowed"


def size_that_does_not_halve(data, number=12):
    write_domain(data / "ink", number, size=(7, 7))
    return "images of 7x7 pixels do not fit --preset tiny, which needs multiples of 4: resize them with --image-size"


@pytest.mark.parametrize(
    "spoil",
    [
        missing,
        empty,
        without_column,
        row_without_file,
        label_no_integer,
        label_out_of_range,
        mixed_sizes,
        one_truncated_of_few,
        bomb,
        size_that_does_not_halve,
    ],
)
def test_data_that_cannot_be_used_is_one_sentence_and_leaves_no_run_behind(tmp_path, spoil):
    sentence = spoil(tmp_path / "data")
    refused(train(f"--data={tmp_path / 'data'}", f"--out={tmp_path / 'run'}"), sentence)
    assert not (tmp_path / "run").exists()


def test_one_truncated_picture_of_many_is_skipped_and_counted(tmp_path):
    size_that_does_not_halve(tmp_path / "data", number=101)
    cut_short(tmp_path / "data" / "ink" / "data" / "005.png")
    answer = train(f"--data={tmp_path / 'data'}", f"--out={tmp_path / 'run'}")
    # Not the picture but the size of the others ends this command, before it costs time.
    refused(answer, "images of 7x7 pixels do not fit")
    assert re.search(r"skipped +1 unreadable: \S+005\.png: .*truncated", answer.out)


# --- the run folder


@pytest.mark.parametrize("resume", ["auto", "never"])
def test_a_folder_below_a_file_is_refused_before_the_data_are_read(tmp_path, resume):
    (tmp_path / "file").write_text("mine")
    answer = train(f"--out={tmp_path / 'file' / 'run'}", f"--resume={resume}")
    refused(
        answer, f"--out {tmp_path / 'file' / 'run'}: cannot be written, because {tmp_path / 'file'} is not a folder"
    )
    assert answer.out == ""
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ('{"seed": ', "config.json: cannot be read"),
        ('{"architectures": ["GPT2"]}', "config.json is not the config of a run; choose another --out"),
    ],
)
def test_a_config_that_is_none_is_one_sentence_and_stays(tmp_path, text, sentence):
    (tmp_path / "config.json").write_text(text)
    refused(train(f"--out={tmp_path}"), sentence)
    assert (tmp_path / "config.json").read_text() == text


def test_a_folder_of_another_config_is_refused_before_its_data_are_read(tmp_path):
    config = {**dict(fields_of(train_cfg.Config())), "learning_rate": 0.5}
    (tmp_path / "config.json").write_text(json.dumps(config, default=str))
    answer = train(f"--out={tmp_path}", "--data=/nowhere")
    refused(answer, "data was 'digits', is '/nowhere'; learning_rate was 0.5, is 0.001", "--resume never")
    assert answer.out == ""


# --- what goes wrong on the way


@dataclasses.dataclass(frozen=True)
class NoFlags:
    """Nothing to set."""


def command(run):
    return run_here(lambda args: run_command("train_cfg", NoFlags, run, args))


def test_too_little_memory_is_one_sentence():
    refused(command(lambda _: jnp.zeros(1 << 46)), "out of memory, use a smaller batch size (RESOURCE_EXHAUSTED")
    refused(command(lambda _: np.empty(1 << 58)), "out of memory, use a smaller batch size (Unable to allocate")


def test_too_little_memory_for_pictures_says_what_it_would_take():
    sizes = {"weights": 3_440_000_000, "sampling": 10, "in all, at the most": 5_300_000_000}

    def run(_):
        with explain_want_of_memory(lambda: sizes, "lower --batch-size"):
            jnp.zeros(1 << 46)

    sentence = "a device would hold about 5.30 GB, of which the weights take 3.44 GB; lower --batch-size (--dry-run"
    refused(command(run), f"error: out of memory: {sentence}")


def test_an_argument_that_is_no_text_is_one_sentence():
    refused(train(b"--out=\xff".decode(errors="surrogateescape")), "'--out=\\udcff' is not UTF-8")


def test_a_file_error_is_one_sentence():
    refused(command(lambda _: Path("/nowhere/at/all").read_text()), "No such file or directory: '/nowhere/at/all'")


def test_our_own_mistakes_keep_their_traceback():
    with pytest.raises(ZeroDivisionError):
        command(lambda _: 1 // 0)


def test_a_traceback_can_be_asked_for(monkeypatch):
    monkeypatch.setenv("JAXDIFF_TRACEBACK", "1")
    with pytest.raises(InputError, match="out is wrong"):
        command(lambda _: (_ for _ in ()).throw(InputError("out is wrong")))


def test_ctrl_c_outside_training_says_how_to_go_on():
    answer = command(lambda _: os.kill(os.getpid(), signal.SIGINT))
    assert answer.code == 130
    assert answer.err == "\njaxdiff train_cfg: interrupted; run the same command again to go on\n"


# --- names and help


@pytest.mark.parametrize("words", [["nope"], ["nope", "--help"], ["--train-steps=3"]])
def test_an_unknown_command_is_named_and_the_known_ones_listed(monkeypatch, words):
    monkeypatch.setattr(sys, "argv", ["jaxdiff", *words])
    answer = run_here(lambda _: __main__.main())
    assert answer.code == 2
    assert answer.out == ""
    assert answer.err.startswith(f"jaxdiff: error: no command '{words[0]}'\n")
    for name in ("train_cfg", "sample_cfg"):
        assert re.search(rf"^  {name} +\w", answer.err, re.MULTILINE)


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"]])
def test_jaxdiff_alone_lists_its_commands(monkeypatch, words):
    monkeypatch.setattr(sys, "argv", ["jaxdiff", *words])
    answer = run_here(lambda _: __main__.main())
    assert (answer.code, answer.err) == (0, "")
    assert "train_cfg" in answer.out
    assert "sample_cfg" in answer.out


def test_jaxdiff_hands_its_flags_to_the_command(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["jaxdiff", "train_cfg", "--seed=-3"])
    refused(run_here(lambda _: __main__.main()), "--seed must lie in [0, 2^32), got -3")


HEAVY = ("jax", "flax", "numpy", "PIL", "sklearn", "tensorflow_datasets")
HELP = f"""
import atexit, runpy, sys
atexit.register(lambda: print([name for name in {HEAVY} if name in sys.modules], file=sys.stderr))
module, *sys.argv[1:] = sys.argv[1:]
runpy.run_module(module, run_name="__main__", alter_sys=True)
"""


@pytest.mark.parametrize(
    "words",
    [
        ["jaxdiff", "--help"],
        ["jaxdiff", "train_cfg", "--help"],
        ["jaxdiff.train_cfg", "-h"],
        ["jaxdiff.sample_cfg", "-h"],
    ],
)
def test_help_imports_nothing_heavy(words):
    done = subprocess.run([sys.executable, "-c", HELP, *words], capture_output=True, text=True)
    assert done.returncode == 0
    assert done.stdout.startswith("usage: jaxdiff")
    assert done.stderr == "[]\n"


@pytest.mark.parametrize("module", [train_cfg, sample_cfg])
def test_help_tells_every_flag_its_meaning_and_its_default(module):
    # In a process of its own, because tyro draws its frame only where it can write UTF-8.
    answer = finish(start(module.__name__, "--help", environment={"PYTHONIOENCODING": "utf-8"}))
    assert answer.code == 0
    # A flag's entry reaches from its name at the left edge to the next one's.
    entries = {}
    for entry in re.split(r"^│ (?=--)", answer.out, flags=re.MULTILINE)[1:]:
        name, *words = re.sub(r"[│╰╯─\s]+", " ", entry).split()
        entries[name.rstrip(",")] = " ".join(words)
    fields = dict(fields_of(module.Config()))
    assert len(fields) > 10
    for name, value in fields.items():
        entry = entries["--" + name.replace("_", "-")]
        assert entry.endswith(f"(default: {value})"), entry
        # What stands between its values and its default.
        meaning = re.sub(r"^(--[a-z-]+|\{.*\}|[A-Z|]+)+|\(default.*", "", entry)
        assert len(meaning.split()) >= 2, entry
