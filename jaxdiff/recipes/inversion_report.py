"""From learned rows to the files of textual_inversion: the words, pictures, results.json and report.html."""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxdiff.io.adapters import Adapter, Deltas, of_all, of_words, write_adapter
from jaxdiff.io.images import write_overview
from jaxdiff.io.learned_embeddings import Learned, write_learned, write_learned_apart
from jaxdiff.io.metrics import METRICS, read_lines
from jaxdiff.io.provenance import tree_hash
from jaxdiff.io.report import Curve, Figure, Picture, Report, Section, Table, facts_of, write_report
from jaxdiff.io.runs import Figures, read_json, write_results
from jaxdiff.mesh import device_name, own_copy
from jaxdiff.recipes.custom_diffusion import DIFFUSERS_FILE, split_trained, write_for_diffusers
from jaxdiff.recipes.inversion_parts import InversionParts, prompts_of
from jaxdiff.recipes.inversion_pictures import draw_pictures, make_grid
from jaxdiff.recipes.inversion_training import Outcome
from jaxdiff.recipes.learned_words import TABLE, get_leaf
from jaxdiff.recipes.text_to_image_report import shrink, strip
from jaxdiff.textual_inversion_settings import InversionSettings

WORDS, ADAPTER = "learned_embeds.safetensors", "adapter.safetensors"
SMOOTHED = 10
"""Logged losses that the smooth line averages."""


def write_outputs(
    out: Path,
    parts: InversionParts,
    outcome: Outcome,
    training: InversionSettings,
    config: Mapping[str, Any],
    started: float,
) -> list[Path]:
    """Draw with the learned words, write everything, and return the paths."""
    rows, deltas = split_trained(outcome.trained, parts.words)
    words = [] if of_words(deltas) else write_words(out, rows)
    adapters = write_adapters(out, parts, rows, deltas, training) if deltas else []
    prompts = prompts_of(parts, training)
    pictures = draw_pictures(parts, training, outcome.trained)
    write_overview(out / "grid.png", make_grid(pictures, prompts, "With the learned words"))
    lines = read_lines(out / METRICS)
    figures = figures_of(parts, rows, deltas, lines)
    figures["saved.step"] = outcome.step
    if parts.score is not None:
        score = parts.score(pictures) if outcome.score is None else outcome.score
        figures["saved.image_score"] = score
        if outcome.score is None:
            lines.append({"step": outcome.step, "image_score": score})
    figures["seconds"] = time.perf_counter() - started
    hashes = {
        "params": tree_hash(own_copy(parts.frozen)),
        "rows": tree_hash(rows),
        **({"matrices": tree_hash(deltas)} if deltas else {}),
    }
    results = write_results(out, figures, config, hashes, device_name(parts.mesh))
    record = read_json(results)
    which = ""
    if training.patience is not None:
        which = f" What had been learned by step {outcome.step:,}, whose pictures scored best, is what is saved."
    sections = [
        Section("Pictures with the learned words", [
            Picture(make_grid(pictures, prompts, "With the learned words"),
                    "Rows are texts, columns starting noises; none left out.", wide=True)
        ]),
        *(
            Section(f"What {concept.word} was learned from", [
                Picture(strip(np.stack([shrink(picture) for picture in found[:8]])),
                        f"{len(found)} pictures, cut to squares.", wide=True)
            ])
            for concept, found in zip(parts.concepts, parts.data.originals)
        ),
        Section("Training", training_blocks(lines, rows, figures, training.adapter_rank),
                "The loss of a step says little: most of it depends on the timesteps drawn. That by timestep is taken "
                "of the same texts, pictures and noise every time." + which),
    ]  # fmt: skip
    note = f" {parts.drawing.note}".rstrip()
    report = Report(
        "Textual inversion",
        f"New words{' and matrices' if deltas else ''} for a model that stays as it is otherwise, from a few pictures "
        f"each (arXiv {'2510.04668' if of_words(deltas) else '2212.04488' if deltas else '2208.01618'}).{note}",
        [
            Figure(str(len(rows)), "words learned"),
            Figure(f"{figures['steps']:,}", "steps"),
            *([Figure(f"{outcome.step:,}", "step that is saved")] if training.patience is not None else []),
        ],
        sections,
        facts_of(record),
    )
    grids = [out / "grids"] if (out / "grids").exists() else []
    return [*words, *adapters, out / "grid.png", *grids, results, write_report(out / "report.html", report)]


def write_words(out: Path, rows: Learned) -> list[Path]:
    """Write all words together and, where there are several, each by itself."""
    write_learned(out / WORDS, rows)
    return [out / WORDS, *(write_learned_apart(out / WORDS, rows) if len(rows) > 1 else [])]


def figures_of(
    parts: InversionParts, rows: Learned, deltas: Mapping[str, np.ndarray], lines: Sequence[Mapping[str, Any]]
) -> Figures:
    """Return how far everything moved, and the last of what was logged."""
    table = np.asarray(get_leaf(own_copy(parts.frozen), TABLE), np.float32)
    losses = [(line["step"], line["loss"]) for line in lines if "loss" in line]
    rates = [line["images_per_second"] for line in lines if "images_per_second" in line]
    figures: Figures = {"norm.vocabulary_median": float(np.median(np.linalg.norm(table, axis=1)))}
    for word, row in rows.items():
        figures[f"norm.{word}"] = float(np.linalg.norm(row, axis=1).mean())
        figures[f"moved.{word}"] = float(np.linalg.norm(row - parts.start[word], axis=1).mean())
    figures["steps"] = max((line["step"] for line in lines), default=0)
    if losses:
        figures |= {"final_loss": losses[-1][1], "images_per_second": float(np.median(rates))}
    checked = [line for line in lines if "validation_loss" in line]
    if checked:
        figures |= {f"{when}.{name}": value for when, line in (("first", checked[0]), ("last", checked[-1]))
                    for name, value in line.items() if name != "step"}  # fmt: skip
    if deltas:
        size = np.sqrt(sum(float(np.square(delta, dtype=np.float64).sum()) for delta in deltas.values()))
        figures["moved.matrices"] = float(size)
    return figures


def write_adapters(
    out: Path, parts: InversionParts, rows: Learned, deltas: Deltas, training: InversionSettings
) -> list[Path]:
    """Write words and matrices together, for text2image, and matrices for all tokens as diffusers reads them."""
    write_adapter(out / ADAPTER, Adapter(parts.base, rows, deltas), training.adapter_rank)
    if not of_all(deltas):
        return [out / ADAPTER]
    write_for_diffusers(out / DIFFUSERS_FILE, own_copy(parts.frozen), deltas)
    return [out / ADAPTER, out / DIFFUSERS_FILE]


def training_blocks(lines: Sequence[Mapping[str, Any]], rows: Learned, figures: Figures, rank: int | None) -> list[Any]:
    """Return the curves of scores and of the loss, by timestep and of each step, and how far all moved."""
    matrices = ""
    if "moved.matrices" in figures:
        kept = "whole" if rank is None else f"at rank {rank}"
        matrices = f" The matrices, kept {kept}, moved by {figures['moved.matrices']:.3f} (Frobenius norm of all)."
    losses, scores = (
        [(line["step"], line[name]) for line in lines if name in line] for name in ("loss", "image_score")
    )
    checked = [line for line in lines if "validation_loss" in line]
    blocks: list[Any] = [
        Table(
            ["word", "vectors", "mean norm", "moved by"],
            [[word, str(len(row)), f"{figures[f'norm.{word}']:.3f}", f"{figures[f'moved.{word}']:.3f}"]
             for word, row in rows.items()],
            f"The median norm of the model's own words is {figures['norm.vocabulary_median']:.3f}.{matrices}",
        )
    ]  # fmt: skip
    if len(losses) > 1:
        steps, values = ([row[i] for row in losses] for i in (0, 1))
        smooth = [float(np.mean(values[max(0, i - SMOOTHED + 1) : i + 1])) for i in range(len(values))]
        loss: dict[str, Any] = {"logged": (steps, values), f"mean of {SMOOTHED}": (steps, smooth)}
        blocks.insert(0, Curve(loss, "Loss over training, logarithmic axis.", "step", "loss"))
    if len(scores) > 1:
        score: dict[str, Any] = {"image score": ([row[0] for row in scores], [row[1] for row in scores])}
        caption = "Likeness to the concepts' own pictures, mean of 100 cosines of CLIP's embeddings."
        blocks.insert(0, Curve(score, caption, "step", "score", logarithmic=False, raw_first=False))
    if len(checked) > 1:
        by_band: dict[str, Any] = {
            "t {} to {}".format(*name.removeprefix("loss_t").split("_")): (
                [line["step"] for line in checked],
                [100 * (line[name] / checked[0][name] - 1) for line in checked],
            )
            for name in checked[0]
            if name.startswith("loss_t")
        }
        caption = "Loss of the averaged rows by timestep, from least to most noise, against that of the initialisers."
        blocks.insert(0, Curve(by_band, caption, "step", "change in %", logarithmic=False, raw_first=False))
    return blocks
