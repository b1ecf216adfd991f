"""ddim_grid as a stranger uses it: the course's delivery, diffusers' pictures again, a run of digits, and refusals."""

import json
import shutil

import jax
import numpy as np
import pytest
import torch
from commands import finish, run_here, start_several
from conversion import SIZE, change_json, convert, make_twin, randomize
from course_unet import CourseUNet
from diffusers import DDIMPipeline, DDIMScheduler
from PIL import Image

from jaxdiff import ddim_grid, sample_cfg
from jaxdiff.ddim_settings import DrawingSettings
from jaxdiff.diffusion.samplers import sample
from jaxdiff.mesh import make_mesh
from jaxdiff.models.unet import PRETRAINED
from jaxdiff.recipes.drawing import make_drawing, read_or_draw_noises
from jaxdiff.recipes.pixel_model import pretrained_model
from jaxdiff.recipes.sampler_comparison import COMPARED, draw_legs
from jaxdiff.recipes.sampling import REVERSE_PROCESSES

pytestmark = pytest.mark.usefixtures("quick_commands")

QUICK = ["--devices=1", "--step-counts", "1", "2", "--reference-steps=4", "--num-steps=3", "--iterations", "1"]
MODES = ("images", "eta", "interpolate", "steps", "invert")


def draw(weights, out, *flags):
    return run_here(ddim_grid.main, f"--weights={weights}", f"--out={out}", *flags)


def picture(path):
    return np.asarray(Image.open(path)).astype(np.float64)


def results(out):
    return json.loads((out / "results.json").read_text())


@pytest.fixture(scope="module")
def noises(tmp_path_factory):
    """A folder as the course's: 00.pt, 01.pt, ... of shape (1, 3, H, W)."""
    folder = tmp_path_factory.mktemp("noise")
    torch.manual_seed(1)
    for number in range(5):
        torch.save(torch.randn(1, 3, SIZE, SIZE), folder / f"{number:02d}.pt")
    return folder


@pytest.fixture(scope="module")
def course(tmp_path_factory):
    """A tiny network of the course's layout, and its conversion to pictures of 16x16."""
    folder = tmp_path_factory.mktemp("course")
    torch.manual_seed(0)
    twin = randomize(CourseUNet((8, 16), groups=4))
    torch.save(twin.state_dict(), folder / "UNet.pt")
    tiny = {"block_out_channels": (8, 16), "attention": (True, False), "norm_num_groups": 4}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PRETRAINED, "course-face", {**PRETRAINED["course-face"], **tiny})
        assert convert(folder / "UNet.pt", folder / "weights").code == 0
    change_json(folder / "weights" / "config.json", {"image_size": SIZE})
    return twin, folder / "weights"


# --- what it draws


def course_pictures(twin, noises):
    """Sample as the course says, in torch and float64 coefficients: t = 981, 961, .. 1, eta 0, min-max pictures."""
    alphas_cumprod = torch.cumprod(1 - torch.linspace(1e-4, 2e-2, 1000, dtype=torch.float64), 0)
    pictures = {}
    for path in sorted(noises.iterdir()):
        x = torch.load(path).double()
        for t in range(981, 0, -20):
            a_t, a_s = alphas_cumprod[t], alphas_cumprod[max(t - 20, 0)]
            with torch.no_grad():
                eps = twin(x.float(), torch.tensor([t])).double()
            x_0 = (x - (1 - a_t).sqrt() * eps) / a_t.sqrt()
            x = a_s.sqrt() * x_0 + (1 - a_s).sqrt() * eps
        stretched = (x - x.min()) / (x.max() - x.min())
        pictures[path.stem] = (stretched[0].permute(1, 2, 0) * 255).numpy()
    return pictures


def test_the_courses_delivery(course, noises, tmp_path):
    twin, weights = course
    answer = draw(weights, tmp_path, f"--noise={noises}", "--preset=course", "--mode=images")
    assert answer.code == 0, answer.err
    expected = course_pictures(twin, noises)
    assert sorted(path.stem for path in tmp_path.glob("0*.png")) == sorted(expected)
    for name, pixels in expected.items():
        # Half a grey level of rounding, and the float32 of 50 steps.
        assert np.abs(picture(tmp_path / f"{name}.png") - pixels).max() < 0.6


@pytest.mark.parametrize("clip", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_the_pictures_of_diffusers_pipeline(noises, tmp_path, monkeypatch, clip):
    twin = make_twin(spread=0.03)
    settings = {"beta_start": 1e-4, "beta_end": 0.02, "set_alpha_to_one": False, "steps_offset": 1}
    scheduler = DDIMScheduler(**settings, clip_sample=clip)
    twin.save_pretrained(tmp_path / "pipe" / "unet")
    scheduler.save_pretrained(tmp_path / "pipe" / "scheduler")
    assert convert(tmp_path / "pipe", tmp_path / "weights").code == 0
    answer = draw(tmp_path / "weights", tmp_path / "out", f"--noise={noises}", "--mode=images")
    assert answer.code == 0, answer.err
    start = torch.cat([torch.load(path) for path in sorted(noises.iterdir())])
    monkeypatch.setattr("diffusers.pipelines.ddim.pipeline_ddim.randn_tensor", lambda *args, **options: start)
    pipeline = DDIMPipeline(twin, scheduler)
    pipeline.set_progress_bar_config(disable=True)
    # Else diffusers would go on with the eps from before clipping, which no longer fits the clipped image.
    options = {"use_clipped_model_output": clip}
    theirs = pipeline(batch_size=len(start), num_inference_steps=50, output_type="np", **options).images * 255
    assert theirs.std() > 20
    for number, pixels in enumerate(theirs):
        assert np.mean((picture(tmp_path / "out" / f"{number:02d}.png") - pixels) ** 2) < 0.5


def test_every_mode_of_converted_weights(course, noises, tmp_path):
    _, weights = course
    answer = draw(weights, tmp_path / "out", f"--noise={noises}", "--seed=3", *QUICK)
    assert answer.code == 0, answer.err
    out = tmp_path / "out"
    assert all(path.exists() for path in answer.written)
    assert {f"grid_{mode}.png" for mode in MODES} <= {path.name for path in answer.written}
    assert len(list((out / "eta").iterdir())) == 5 * 4
    assert len(list((out / "interpolate").iterdir())) == 3 * 11
    assert len(list((out / "steps").iterdir())) == (5 * 2 + 1) * 4
    # eta 0 is the plain picture; the ends of every way are the two noises'.
    for name in ("00", "03"):
        np.testing.assert_array_equal(picture(out / "eta" / f"eta_0_{name}.png"), picture(out / f"{name}.png"))
        assert np.abs(picture(out / "eta" / f"eta_1_{name}.png") - picture(out / f"{name}.png")).max() > 5
    for way in ("lerp", "slerp", "normal"):
        np.testing.assert_array_equal(picture(out / "interpolate" / f"{way}_0.png"), picture(out / "00.png"))
        assert np.abs(picture(out / "interpolate" / f"{way}_1.png") - picture(out / "01.png")).max() <= 1
    figures = results(out)
    size = SIZE * SIZE * 3
    x, y = (torch.load(noises / f"0{i}.pt").double().flatten() for i in (0, 1))
    assert figures["interpolate.norm_at_0.5.lerp"] == pytest.approx(float((x + y).norm() / 2), rel=1e-5)
    assert figures["interpolate.expected_norm"] == pytest.approx(np.sqrt(size - 0.5), rel=1e-5)
    page = (out / "report.html").read_text()
    for title in ("Pictures", "Eta", "Between two noises", "How many steps are enough", "There and back"):
        assert f"<h2>{title}</h2>" in page


@pytest.mark.slow
def test_noise_i_is_a_function_of_seed_and_i(course, tmp_path):
    _, weights = course
    for number in (2, 3):
        answer = draw(weights, tmp_path / str(number), f"--num-noises={number}", "--mode=images", "--num-steps=2")
        assert answer.code == 0, answer.err
    for name in ("00.png", "01.png"):
        assert (tmp_path / "2" / name).read_bytes() == (tmp_path / "3" / name).read_bytes()
    assert draw(weights, tmp_path / "4", "--seed=1", "--num-noises=1", "--mode=images", "--num-steps=2").code == 0
    assert (tmp_path / "4" / "00.png").read_bytes() != (tmp_path / "3" / "00.png").read_bytes()


@pytest.mark.slow
def test_the_steps_mode_takes_the_steps_of_sample(course):
    # One program for all samplers, against the scan of each of them.
    model = pretrained_model(course[1], "float32")
    drawing = make_drawing(model, DrawingSettings(), 0, 4, make_mesh(1))
    _, noises = read_or_draw_noises(None, 2, 0, model.image_shape)
    walk = model.walk(4, "")
    found = draw_legs(drawing, noises, COMPARED, [REVERSE_PROCESSES[name].plan(walk) for name in COMPARED])
    denoise = model.make_denoiser(model.params, ())
    keys = drawing.keys(np.arange(2))
    for name, images in zip(COMPARED, found):
        run = jax.jit(lambda x_T, name=name: sample(denoise, x_T, keys, model.schedule, walk, REVERSE_PROCESSES[name]))
        expected = np.asarray(run(noises))
        np.testing.assert_allclose(images, expected, atol=1e-3 * np.abs(expected).max())


@pytest.mark.slow
def test_a_reference_of_as_many_steps_as_compared(course, tmp_path):
    flags = ["--mode=steps", "--step-counts", "2", "4", "--reference-steps=4", "--num-noises=1"]
    assert draw(course[1], tmp_path, *flags).code == 0
    assert results(tmp_path)["steps.rmse.ddim.4"] == 0
    assert results(tmp_path)["steps.rmse.ddim.2"] > 0


# --- what it refuses


def refused(answer, sentence):
    assert answer.code == 2, answer
    assert sentence in answer.sentence, answer.sentence
    assert "Traceback" not in answer.err


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--etas", "0", "2"], "--etas must lie in [0, 1]"),
        (["--alphas", "0", "1.5"], "add --extrapolate"),
        (["--step-counts", "0"], "--step-counts must be at least 1"),
        (["--step-counts", "5", "5"], "--step-counts must rise, and differ"),
        (["--alphas", "0.5", "0.5000001"], "--alphas must rise, and differ"),
        (["--mode=eta", "--iterations", "3"], "--iterations: no effect with --mode eta"),
        (["--mode=steps", "--num-steps=3"], "--num-steps: no effect with --mode steps"),
        (["--mode=invert", "--threshold=none"], "--threshold: no effect with --mode invert"),
        (["--extrapolate"], "--extrapolate has no effect"),
        (["--mode=images", "--noise=x", "--seed=1"], "--seed: no effect with --noise"),
        (["--timesteps", "10", "10"], "--timesteps must fall strictly"),
        (["--timesteps", "10", "--num-steps=3"], "--timesteps leaves nothing to --num-steps"),
        (["--noise=x", "--num-noises=2"], "--num-noises has no effect with --noise"),
        (["--num-steps=0"], "--num-steps must be at least 1, got 0"),
        (["--guidance-scale=-1"], "--guidance-scale must be"),
        (["--mode=everything"], "everything"),
    ],
)
def test_flags_that_cannot_be(flags, sentence, tmp_path):
    refused(draw(tmp_path, tmp_path / "out", *flags), sentence)
    assert not (tmp_path / "out").exists()


def test_things_that_do_not_fit_the_model(course, noises, finished_run, tmp_path):
    _, weights = course
    run, _ = finished_run
    out = tmp_path / "out"
    refused(draw(tmp_path / "none", out), "python -m jaxdiff.train_cfg")
    refused(draw(tmp_path / "none", out), "python -m weights_convert ddpm")
    refused(draw(weights, out, "--domain=faces"), "has no conditions")
    refused(draw(weights, out, "--guidance-scale=2"), "has no conditions")
    refused(draw(run, out, "--domain=faces"), "--domain faces: the run in")
    refused(draw(weights, out, "--timesteps", "1000", "5"), "--timesteps must lie in 1..999, got (1000, 5)")
    refused(draw(weights, out, "--num-steps=1001"), "--num-steps 1001: num_steps must lie in 1..1000")
    refused(draw(weights, out, "--step-counts", "2000"), "--step-counts 2000: num_steps must lie in 1..1000")
    refused(draw(weights, out, "--mode=interpolate", "--num-noises=1"), "needs two noises")
    refused(draw(weights, out, f"--noise={tmp_path / 'none'}"), "no such folder")
    other = shutil.copytree(noises, tmp_path / "noises")
    torch.save(torch.zeros(1, 3, 8, 8), other / "02.pt")
    refused(draw(weights, out, f"--noise={other}"), "02.pt: has the shape (1, 3, 8, 8)")


def test_sample_cfg_points_to_ddim_grid_for_converted_weights(course, tmp_path):
    answer = run_here(sample_cfg.main, f"--run={course[1]}", f"--out={tmp_path}")
    refused(answer, "converted weights have no classes to judge; draw them with `python -m jaxdiff.ddim_grid")


def test_beyond_the_two_noises_only_when_told(course, tmp_path):
    flags = ["--mode=interpolate", "--num-steps=2", "--alphas", "-0.5", "1.5", "--extrapolate"]
    answer = draw(course[1], tmp_path / "out", *flags)
    assert answer.code == 0, answer.err
    assert (tmp_path / "out" / "interpolate" / "lerp_-0.5.png").exists()


# --- a run of train_cfg, last here, because other files' tests need the same one


def test_a_run_of_digits(finished_run, tmp_path):
    run, _ = finished_run
    same = ["--guidance-scale=2", "--num-noises=3"]
    answer = draw(run, tmp_path / "out", *QUICK, "--domain=digits_street", *same)
    assert answer.code == 0, answer.err
    assert "digits_street, step 8 of run" in (tmp_path / "out" / "report.html").read_text()
    assert sorted(path.name for path in (tmp_path / "out").glob("0*.png")) == ["00.png", "01.png", "02.png"]
    other = ["--mode=images", "--devices=1", "--num-steps=3", "--domain=digits_m"]
    assert draw(run, tmp_path / "other", *other, *same).code == 0
    assert (tmp_path / "out" / "00.png").read_bytes() != (tmp_path / "other" / "00.png").read_bytes()


def test_the_last_run_is_found(finished_run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused(run_here(ddim_grid.main), "no run of train_cfg in runs/")
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "mine").symlink_to(finished_run[0])
    answer = run_here(ddim_grid.main, "--mode=images", "--num-steps=1", "--num-noises=1", "--out=out")
    assert answer.code == 0, answer.err


@pytest.mark.slow
def test_eight_devices_draw_the_same(finished_run, tmp_path):
    for devices in (1, 8):
        flags = ["--step-counts", "1", "2", "--reference-steps=4", "--num-noises=3", "--mode=steps"]
        answer = draw(finished_run[0], tmp_path / str(devices), f"--devices={devices}", *flags)
        assert answer.code == 0, answer.err
    for path in (tmp_path / "1" / "steps").iterdir():
        assert np.abs(picture(path) - picture(tmp_path / "8" / "steps" / path.name)).max() <= 1


@pytest.mark.slow
def test_several_processes_draw_the_same(finished_run, course, tmp_path):
    # A run, whose checkpoint is restored onto all devices, and weights that every process reads.
    for name, weights in (("run", finished_run[0]), ("weights", course[1])):
        alone, two = tmp_path / f"{name}_alone", tmp_path / f"{name}_two"
        answer = draw(weights, alone, "--devices=2", *QUICK[1:], "--num-noises=3")
        assert answer.code == 0, answer.err
        flags = [f"--weights={weights}", f"--out={two}", *QUICK[1:], "--num-noises=3"]
        answers = [finish(one) for one in start_several(["-m", "jaxdiff.ddim_grid"], 2, *flags)]
        assert [answer.code for answer in answers] == [0, 0], answers
        paths = {path.relative_to(two) for path in two.rglob("*")}
        assert paths == {path.relative_to(alone) for path in alone.rglob("*")}
        for path in paths:
            if path.suffix == ".png" and not path.name.startswith("grid"):
                assert np.abs(picture(two / path) - picture(alone / path)).max() <= 1
