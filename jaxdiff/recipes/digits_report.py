"""From samples and figures to the pictures, results.json and report.html of a conditional run."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh

from jaxdiff.io.file_names import as_file_name
from jaxdiff.io.images import write_overview
from jaxdiff.io.metrics import METRICS, read_lines
from jaxdiff.io.provenance import tree_hash, versions
from jaxdiff.io.report import Confusion, Curve, Figure, Picture, Report, Section, Table, facts_of, write_report
from jaxdiff.io.runs import Figures, as_json, data_hash, read_json, write_results
from jaxdiff.io.shards import Shards
from jaxdiff.mesh import bring_home, device_name, own_mesh, round_up
from jaxdiff.processes import barrier, is_leader
from jaxdiff.recipes.conditional import ConditionalModel
from jaxdiff.recipes.evaluation import (
    Samples,
    by_domain,
    deliver,
    domain_grid,
    draw_shards,
    judge_figures,
    judge_samples,
    reverse_strips,
)
from jaxdiff.recipes.judge import Judge, confusion_matrix
from jaxdiff.recipes.sampling import ImageSampler, make_sampler
from jaxdiff.settings import SamplingSettings

SHARDS = "shards"


def percent(share: float) -> str:
    """Format a share with one decimal."""
    return f"{100 * share:.1f} %"


def judge_section(model: ConditionalModel, samples: Samples, figures: Mapping[str, Any]) -> Section:
    """Return the judge's table and one confusion matrix a domain."""
    rows = []
    for name in ("all classes", *model.class_names):
        row = [name]
        for domain in model.domain_names:
            key = domain if name == "all classes" else f"{domain}.{name}"
            low, high = (figures[f"judge.sample_accuracy_{end}.{key}"] for end in ("low", "high"))
            row += [percent(figures[f"judge.sample_accuracy.{key}"]), f"{percent(low)} to {percent(high)}"]
        rows.append(row)
    head = ["class"] + [text for domain in model.domain_names for text in (domain, "95 % interval")]
    wanted = np.broadcast_to(np.arange(len(model.class_names))[:, None], samples.classes.shape[1:])
    matrices = [
        Confusion(
            confusion_matrix(wanted.ravel(), samples.classes[d].ravel(), len(model.class_names)),
            model.class_names,
            f"{domain}: class asked for (row) and class recognised (column), samples.",
        )
        for d, domain in enumerate(model.domain_names)
    ]
    real = ", ".join(
        f"{percent(figures[f'judge.real_accuracy.{domain}'])} of {figures[f'judge.real_images.{domain}']:,} "
        f"held-out real {domain} images"
        for domain in model.domain_names
    )
    return Section(
        "What the judge recognises",
        [
            Table(head, rows, "Share of samples recognised as the class asked for; intervals resample noises."),
            *matrices,
        ],
        f"The judge is a classifier trained on the real training images. It recognises {real}. "
        "Every sample is counted.",
    )


def loss_section(run: Path) -> Section:
    """Return the loss curve of a run folder."""
    lines = read_lines(run / METRICS)
    logged = [(line["step"], line["loss"]) for line in lines if "loss" in line]
    steps, losses = zip(*logged) if logged else ((), ())
    width = max(1, len(losses) // 20)
    smooth = [float(np.mean(losses[max(0, i - width + 1) : i + 1])) for i in range(len(losses))]
    curves: dict[str, tuple[Sequence[float], Sequence[float]]] = {
        "training": (steps, losses),
        "training, smoothed": (steps, smooth),
    }
    checked = [(line["step"], line["validation_loss"]) for line in lines if "validation_loss" in line]
    if len(checked) > 1:
        curves["held out, EMA weights"] = [step for step, _ in checked], [loss for _, loss in checked]
    curve = Curve(curves, "Loss over training, logarithmic axis.", "step", "loss")
    return Section("Training", [curve])


def headline(model: ConditionalModel, figures: Mapping[str, Any], extra: Sequence[Figure]) -> list[Figure]:
    """Return the judge's accuracies and other headline numbers."""
    return [
        Figure(
            percent(figures[f"judge.sample_accuracy.{domain}"]),
            f"of {domain} samples recognised",
            f"{figures[f'judge.samples.{domain}']:,} samples; judge on real images: "
            f"{percent(figures[f'judge.real_accuracy.{domain}'])}",
        )
        for domain in model.domain_names
    ] + list(extra)


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` needs; the run folder holds the metrics, `out` takes the new files."""

    run: Path
    out: Path
    model: ConditionalModel
    params: Any
    judge: Judge
    sampler: ImageSampler
    sampling: SamplingSettings
    seed: int
    samples_per_class: int
    deliver: int
    mesh: Mesh


def evaluate(task: Evaluation, figures: Mapping[str, Any], config: Mapping[str, Any], started: float) -> list[Path]:
    """Sample, judge, draw and write everything down; return the paths written.

    Args:
      task: model, judge and settings.
      figures: what is known already, at least the judge's accuracy on real images.
      config: for the record.
      started: `time.perf_counter()` when the command began.
    """
    task = on_own_devices(task)
    model, out = task.model, task.out
    data = data_hash(task.run)
    shards, rate = draw_all(task)
    if not is_leader():
        return []
    images = by_domain(model, shards.read()["images"])
    samples = judge_samples(task.judge, images, task.mesh)
    grids = [domain_grid(model, images[d], name, task.sampling) for d, name in enumerate(model.domain_names)]
    strips = reverse_strips(model, task.params, task.sampling, task.seed, task.mesh)
    paths = []
    for name, grid, strip in zip(model.domain_names, grids, strips):
        for kind, picture in (("grid", grid), ("reverse", strip)):
            paths.append(out / f"{kind}_{as_file_name(name)}.png")
            write_overview(paths[-1], picture)
    if task.deliver:
        paths += deliver(out / "samples", model, images, task.deliver)
    figures = {
        **figures,
        **judge_figures(model, samples, task.seed),
        **rate,
        "seconds": time.perf_counter() - started,
    }
    for name in model.domain_names:
        print(
            f"{name}: {percent(figures[f'judge.sample_accuracy.{name}'])} of {figures[f'judge.samples.{name}']:,} "
            f"samples recognised (judge on real images: {percent(figures[f'judge.real_accuracy.{name}'])})"
        )
    hashes = {"data": data, "ema_params": tree_hash(task.params), "judge": tree_hash(task.judge.params)}
    results = write_results(out, figures, config, hashes, device_name(task.mesh))
    page = write_page(task, samples, figures, grids, strips, read_json(results))
    return [*paths, out / SHARDS, results, page]


def on_own_devices(task: Evaluation) -> Evaluation:
    """Return the same on this process's devices alone: of several, each draws its own share of the images."""
    mesh = own_mesh(task.mesh)
    if mesh is task.mesh:
        return task
    params, judge_params = bring_home((task.params, task.judge.params), task.mesh)
    return replace(
        task,
        params=params,
        judge=task.judge._replace(params=judge_params),
        sampler=make_sampler(task.model, task.sampling, mesh),
        mesh=mesh,
    )


def draw_all(task: Evaluation) -> tuple[Shards, Figures]:
    """Sample every image that is not in a file yet; return the files, and how many this process drew in a second."""
    model, at_once = task.model, round_up(task.sampling.sample_batch_size, task.mesh)

    def about() -> dict[str, Any]:
        return {
            "params": tree_hash(task.params),
            "sampling": as_json(task.sampling),
            "names": [list(model.domain_names), list(model.class_names)],
            "samples_per_class": task.samples_per_class,
            "images_of_a_file": at_once,
            "seed": task.seed,
            "versions": versions(device_name(task.mesh)),
        }

    total = len(model.domain_names) * len(model.class_names) * task.samples_per_class
    shards = Shards(task.out / SHARDS, about, -(-total // at_once))
    begun = time.perf_counter()
    drawn = draw_shards(shards, task.sampler, model, task.params, task.samples_per_class, task.seed, at_once, task.mesh)
    rate: Figures = {"sampling.images_per_second": drawn / (time.perf_counter() - begun)} if drawn else {}
    barrier()
    return shards, rate


def write_page(
    task: Evaluation,
    samples: Samples,
    figures: Mapping[str, Any],
    grids: Sequence[np.ndarray],
    strips: Sequence[np.ndarray],
    record: Mapping[str, Any],
) -> Path:
    """Write report.html; `record` is what results.json says."""
    model = task.model
    rates = [
        ("training.images_per_second", "training images a second"),
        ("sampling.images_per_second", "samples a second"),
    ]
    extra = [Figure(f"{figures[name]:,.0f}", caption) for name, caption in rates if name in figures]
    pictures = [
        Picture(grid, f"{domain}: rows are classes, columns are starting noises; the first ones, not chosen.")
        for domain, grid in zip(model.domain_names, grids)
    ]
    processes = [
        Picture(strip, f"{domain}: the noisy state, and the clean image that the network sees in it.", wide=True)
        for domain, strip in zip(model.domain_names, strips)
    ]
    report = Report(
        "Pictures on request",
        f"A diffusion model of {' and '.join(model.domain_names)}, conditioned on class and domain.",
        headline(model, figures, extra),
        [
            Section("Samples", pictures),
            Section("From noise to picture", processes),
            judge_section(model, samples, figures),
            loss_section(task.run),
        ],
        facts_of(record),
    )
    return write_report(task.out / "report.html", report)
