"""What a trained conditional model can do: samples of every class and domain, judged, drawn and delivered.

Image n of every class and domain starts from the same noise n, so a column of a grid shows one noise under ten
classes. All samples are judged: none is left out, none is drawn again.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Int, UInt8

from jaxdiff.diffusion.samplers import image_keys
from jaxdiff.io.file_names import as_file_name
from jaxdiff.io.grids import GridStyle, labelled_grid
from jaxdiff.io.images import to_uint8, write_png
from jaxdiff.io.progress import progress_bar
from jaxdiff.io.runs import Figures
from jaxdiff.io.shards import Shards
from jaxdiff.mesh import put_whole, round_up
from jaxdiff.recipes.conditional import Condition, ConditionalModel
from jaxdiff.recipes.judge import Judge, bootstrap_interval, recognise
from jaxdiff.recipes.sampling import ImageSampler, make_sampler, reverse_process, sample_pixels
from jaxdiff.recipes.training import Stream, stream_key
from jaxdiff.settings import SamplingSettings

GRID_COLUMNS = 10
SNAPSHOTS = 6


@dataclass(frozen=True)
class Samples:
    """Images of every domain, class and noise, and what the judge says of them."""

    images: UInt8[np.ndarray, "D K M H W C"]
    classes: Int[np.ndarray, "D K M"]
    domains: Int[np.ndarray, "D K M"]


def draw_samples(
    sampler: ImageSampler,
    model: ConditionalModel,
    params: Any,
    per_class: int,
    seed: int,
    batch_size: int,
    mesh: Mesh,
) -> UInt8[np.ndarray, "D K M H W C"]:
    """Sample `per_class` images of each class in each domain, at least `batch_size` at once."""
    domains, classes, noises = image_numbers(model, per_class)
    at_once = round_up(batch_size, mesh)
    parts = []
    with progress_bar(len(noises), "sampling", "image", leave=False) as bar:
        for part in sample_pixels(sampler, params, seed, noises, Condition(classes, domains), at_once, mesh):
            parts.append(part)
            bar.update(len(part))
    return by_domain(model, np.concatenate(parts))


def image_numbers(model: ConditionalModel, per_class: int) -> list[Int[np.ndarray, "N"]]:
    """Return domain, class and noise of every image, domain after domain, class after class."""
    shape = len(model.domain_names), len(model.class_names), per_class
    return [axis.ravel().astype(np.int32) for axis in np.indices(shape)]


def by_domain(model: ConditionalModel, images: UInt8[np.ndarray, "N H W C"]) -> UInt8[np.ndarray, "D K M H W C"]:
    """Order images that stand in the order of `image_numbers` by domain, class and noise."""
    return images.reshape(len(model.domain_names), len(model.class_names), -1, *model.image_shape)


def draw_shards(
    shards: Shards,
    sampler: ImageSampler,
    model: ConditionalModel,
    params: Any,
    per_class: int,
    seed: int,
    at_once: int,
    mesh: Mesh,
) -> int:
    """Sample into files of `at_once` images those that are missing and this process's to draw; return how many."""
    domains, classes, noises = image_numbers(model, per_class)
    drawn = 0
    with progress_bar(len(noises), "sampling", "image", leave=False) as bar:
        for number in shards.missing():
            part = slice(number * at_once, (number + 1) * at_once)
            condition = Condition(classes[part], domains[part])
            (images,) = sample_pixels(sampler, params, seed, noises[part], condition, at_once, mesh)
            shards.write(number, {"images": images})
            drawn += len(images)
            bar.update(len(images))
    return drawn


def judge_samples(judge: Judge, images: UInt8[np.ndarray, "D K M H W C"], mesh: Mesh) -> Samples:
    """Have the judge name the class and the domain of every sample."""
    verdict = recognise(judge, images.reshape(-1, *images.shape[3:]), mesh)
    return Samples(images, verdict.classes.reshape(images.shape[:3]), verdict.domains.reshape(images.shape[:3]))


def judge_figures(model: ConditionalModel, samples: Samples, seed: int) -> Figures:
    """Return accuracies with 95 % bootstrap intervals, by domain and by class, under the names of results.json."""
    figures: Figures = {}
    wanted = np.arange(len(model.class_names))[:, None]
    for d, domain in enumerate(model.domain_names):
        correct = samples.classes[d] == wanted
        low, high = bootstrap_interval(correct.T, seed)
        figures[f"judge.sample_accuracy.{domain}"] = float(correct.mean())
        figures[f"judge.sample_accuracy_low.{domain}"] = low
        figures[f"judge.sample_accuracy_high.{domain}"] = high
        figures[f"judge.sample_domain_accuracy.{domain}"] = float((samples.domains[d] == d).mean())
        figures[f"judge.samples.{domain}"] = correct.size
        for k, name in enumerate(model.class_names):
            low, high = bootstrap_interval(correct[k][:, None], seed)
            figures[f"judge.sample_accuracy.{domain}.{name}"] = float(correct[k].mean())
            figures[f"judge.sample_accuracy_low.{domain}.{name}"] = low
            figures[f"judge.sample_accuracy_high.{domain}.{name}"] = high
    return figures


def domain_grid(
    model: ConditionalModel, images: UInt8[np.ndarray, "K M H W C"], domain: str, settings: SamplingSettings
) -> UInt8[np.ndarray, "h w 3"]:
    """Draw one domain: rows are classes, columns are noises."""
    shown = images[:, :GRID_COLUMNS]
    return labelled_grid(
        shown.reshape(-1, *shown.shape[2:]),
        model.class_names,
        [str(n + 1) for n in range(shown.shape[1])],
        f"{domain}, guidance {settings.guidance_scale:g}, {settings.num_steps} {settings.sampler.upper()} steps",
        row_axis="class",
        column_axis="noise",
    )


def reverse_strips(
    model: ConditionalModel, params: Any, settings: SamplingSettings, seed: int, mesh: Mesh
) -> list[UInt8[np.ndarray, "h w 3"]]:
    """Draw, for each domain, the reverse process of the first image of the first class: x_t and its clean image."""
    sampler = make_sampler(model, settings, mesh, trajectory=True)
    # Repeated up to a multiple of the devices, because a batch must split over them.
    domains = np.resize(np.arange(len(model.domain_names), dtype=np.int32), round_up(len(model.domain_names), mesh))
    zeros = np.zeros_like(domains)
    numbers, condition = put_whole((zeros, Condition(zeros, domains)), mesh)
    _, trajectory = sampler(params, image_keys(stream_key(seed, Stream.SAMPLES), numbers), condition)
    process, timesteps = reverse_process(settings, model.schedule)
    seen_at = np.asarray(process.plan(timesteps).seen_at)
    taken = np.unique(np.linspace(0, len(seen_at), SNAPSHOTS).round().astype(int))
    labels = [f"{n}: t={seen_at[n]:.0f}" if n < len(seen_at) else f"{n}: clean" for n in taken]
    strips = []
    for d, domain in enumerate(model.domain_names):
        x_t = np.asarray(trajectory.x_t)[:, d]
        # At the end the clean image is the state itself.
        x_0 = np.concatenate([np.asarray(trajectory.x_0)[:, d], x_t[-1:]])
        strip = labelled_grid(
            to_uint8(np.concatenate([x_t[taken], x_0[taken]])),
            ["x_t", "predicted x_0"],
            labels,
            f"Reverse process, first {model.class_names[0]} of {domain}",
            column_axis="evaluations of the network: timestep",
            style=GridStyle(cell=112, text=15),
        )
        strips.append(strip)
    return strips


def deliver(
    folder: Path, model: ConditionalModel, images: UInt8[np.ndarray, "D K M H W C"], per_class: int
) -> list[Path]:
    """Write `{domain}/{class}_{001..}.png`, the layout that the course's grader reads; return the domain folders."""
    domains = [folder / as_file_name(domain) for domain in model.domain_names]
    for d, domain in enumerate(domains):
        # An earlier, larger delivery would leave pictures of another model or guidance behind.
        for old in domain.glob("*_[0-9][0-9][0-9]*.png"):
            old.unlink()
        for k, name in enumerate(model.class_names):
            for n in range(per_class):
                write_png(domain / f"{as_file_name(name)}_{n + 1:03d}.png", images[d, k, n])
    return domains
