"""Answers of zero-shot classifiers as tables, sheets of cases, results.json and report.html."""

import csv
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh

from jaxdiff.io.case_sheet import Case, case_sheet
from jaxdiff.io.heat_map import block_size, heat_map
from jaxdiff.io.images import write_overview
from jaxdiff.io.labelled_images import LabelledImages
from jaxdiff.io.report import Confusion, Figure, Picture, Report, Section, Table, facts_of, write_report
from jaxdiff.io.runs import read_json, write_results
from jaxdiff.mesh import device_name
from jaxdiff.recipes.classify import choose_cases, confused_pairs, recalls
from jaxdiff.recipes.digits_report import percent
from jaxdiff.recipes.judge import confusion_matrix
from jaxdiff.recipes.prompt_weights import CITATIONS
from jaxdiff.recipes.zeroshot import Prompts, Result

MATRIX_CLASSES = 60
"""With more classes than this the confusion matrix is drawn as a picture, without names."""
PAIRS = 12
WORST = 12
SKIPPED_LISTED = 20


def write_outputs(
    out: Path,
    results: Sequence[Result],
    images: LabelledImages,
    prompts: Prompts,
    num_cases: int,
    seed: int,
    config: Mapping[str, Any],
    mesh: Mesh,
    started: float,
) -> list[Path]:
    """Write every file of a run and return their paths.

    Args:
      out: existing folder.
      results: one for each model.
      images: what was classified.
      prompts: what stood for the classes.
      num_cases: successes, and failures, on the sheets of each model.
      seed: which cases are drawn.
      config: for the record.
      mesh: for the name of the device.
      started: `time.perf_counter()` when the command began.
    """
    titles = short_titles([result.name for result in results])
    paths, sections = [], [models_section(results, prompts, titles)]
    for result, title in zip(results, titles):
        ending = "" if len(results) == 1 else "_" + re.sub(r"[^\w.-]+", "-", title).strip("-")
        sheets = [(kind, sheet) for kind, sheet in draw_cases(result, images, num_cases, seed) if sheet is not None]
        for kind, sheet in sheets:
            paths.append(out / f"{kind}{ending}.png")
            write_overview(paths[-1], sheet)
        paths.append(write_predictions(out / f"predictions{ending}.csv", result, images))
        paths.append(write_per_class(out / f"per_class{ending}.csv", result, images))
        name = "" if len(results) == 1 else f" of {title}"
        sections += [
            Section(
                f"Cases{name}",
                [
                    Picture(sheet, f"{kind.capitalize()}, drawn by the seed. The true class has a blue bar.", wide=True)
                    for kind, sheet in sheets
                ],
            ),
            classes_section(f"Classes{name}", result, images),
        ]
    if results[0].by_template:
        sections.insert(1, templates_section(results, titles))
    if results[0].weights:
        sections.insert(1, weights_section(results, prompts, titles))
    if results[0].skipped:
        sections.append(skipped_section(results[0].skipped))
    figures = {f"{key}.{result.name}": value for result in results for key, value in result.figures.items()}
    for result in results:
        figures |= {f"template.{text}.{result.name}": accuracy for text, accuracy in result.by_template.items()}
        figures |= {f"prompt_weight.{text}.{result.name}": weight for text, weight in result.weights.items()}
    figures |= {"classes": len(images.class_names), "seconds": time.perf_counter() - started}
    hashes = {f"params.{result.name}": result.params_hash for result in results}
    record = write_results(out, figures, config, hashes, device_name(mesh))
    page = write_page(out / "report.html", results, titles, images, prompts, sections, read_json(record))
    return [*paths, record, page]


def short_titles(names: Sequence[str]) -> list[str]:
    """Return the last parts of models' names or paths, as few as tell them apart."""
    parts = [name.rstrip("/").split("/") for name in names]
    for number in range(1, max(map(len, parts)) + 1):
        titles = ["/".join(part[-number:]) for part in parts]
        if len(set(titles)) == len(titles) and all(titles):
            return titles
    return list(names)


def draw_cases(result: Result, images: LabelledImages, number: int, seed: int) -> list[tuple[str, np.ndarray | None]]:
    """Return a sheet of successes and one of failures; None where there are none."""
    sheets: list[tuple[str, np.ndarray | None]] = []
    for kind, chosen in zip(("successes", "failures"), choose_cases(result.answers, number, seed)):
        cases = []
        for place in chosen:
            pixels = images.load(int(result.kept[place]))
            if isinstance(pixels, str):
                # It was readable a moment ago.
                continue
            top, label = result.answers.top[place], int(result.answers.labels[place])
            names = [images.class_names[number] for number in top]
            right = int(np.argmax(top == label)) if label in top else -1
            title = f"{images.class_names[label]}   ({images.names[int(result.kept[place])]})"
            cases.append(Case(pixels, title, names, result.answers.probabilities[place].tolist(), right))
        sheets.append((kind, case_sheet(cases, f"{len(cases)} {kind}") if cases else None))
    return sheets


def write_predictions(path: Path, result: Result, images: LabelledImages) -> Path:
    """Write one row a picture: its class, whether it was recognised, and the most probable classes."""
    answers, names = result.answers, images.class_names
    ranks = range(1, answers.top.shape[1] + 1)
    with path.open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(
            ["image", "label", "correct", *(f"{what}_{n}" for n in ranks for what in ("name", "probability"))]
        )
        for place, number in enumerate(result.kept):
            best = zip(answers.top[place], answers.probabilities[place])
            cells = [cell for top, probability in best for cell in (names[top], f"{probability:.6f}")]
            label = names[int(answers.labels[place])]
            rows.writerow([images.names[number], label, int(answers.correct[place]), *cells])
    return path


def write_per_class(path: Path, result: Result, images: LabelledImages) -> Path:
    """Write one row a class: pictures, how many of them are recognised, and what they are taken for most often."""
    counts = confusion_matrix(result.answers.labels, result.answers.top[:, 0], len(images.class_names))
    with path.open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(["class", "name", "images", "recognised", "recall", "predicted", "precision", "most_taken_for"])
        for number, name in enumerate(images.class_names):
            total, right, predicted = counts[number].sum(), counts[number, number], counts[:, number].sum()
            errors = counts[number].copy()
            errors[number] = 0
            taken = images.class_names[int(errors.argmax())] if errors.any() else ""
            recall = f"{right / total:.4f}" if total else ""
            precision = f"{right / predicted:.4f}" if predicted else ""
            rows.writerow([number, name, total, right, recall, predicted, precision, taken])
    return path


def models_section(results: Sequence[Result], prompts: Prompts, titles: Sequence[str]) -> Section:
    """Return the table of all models, and what equal weights give where the prompts are weighted."""
    rows = []
    for result, title in zip(results, titles):
        figures = result.figures
        rows.append(
            [
                title,
                percent(figures["top1"]),
                f"{percent(figures['top1_low'])} to {percent(figures['top1_high'])}",
                percent(figures["top5"]),
                percent(figures["mean_per_class_recall"]),
                percent(figures["calibration_error"]),
                percent(figures["mean_confidence"]),
                f"{figures['images_per_second']:,.0f}" if "images_per_second" in figures else "-",
            ]
        )
    head = [
        "model",
        "top-1",
        "95 % interval",
        "top-5",
        "mean recall",
        "calibration error",
        "mean confidence",
    ]
    caption = (
        "The interval is a bootstrap over pictures. Mean recall counts every class alike. Calibration error is the "
        "mean gap between confidence and accuracy over 15 bins."
    )
    note = ""
    if prompts.weighting != "equal":
        equal = [percent(result.figures["top1_equal_weights"]) for result in results]
        plain = ", ".join(f"{accuracy} with {title}" for accuracy, title in zip(equal, titles))
        note = f"Prompts weighted by {CITATIONS[prompts.weighting]}. Equal weights give a top-1 accuracy of {plain}."
    return Section("Accuracy", [Table([*head, "images/s"], rows, caption)], note)


def templates_section(results: Sequence[Result], titles: Sequence[str]) -> Section:
    """Return the accuracy of every template alone, best first by the first model."""
    order = sorted(results[0].by_template, key=lambda text: -results[0].by_template[text])
    rows = [["all of them together", *(percent(result.figures["top1"]) for result in results)]]
    rows += [[text, *(percent(result.by_template[text]) for result in results)] for text in order]
    caption = "Top-1 accuracy with each template alone. The best of many templates on these pictures flatters itself."
    return Section("Templates", [Table(["template", *titles], rows, caption)])


def weights_section(results: Sequence[Result], prompts: Prompts, titles: Sequence[str]) -> Section:
    """Return the weight of every template, largest first by the first model."""
    order = sorted(results[0].weights, key=lambda text: -results[0].weights[text])
    rows = [[text, *(f"{result.weights[text]:.2%}".replace("%", " %") for result in results)] for text in order]
    each = "The mean over pictures, each of which has its own weights." if prompts.weighting == "autoclip" else ""
    caption = f"Found by {CITATIONS[prompts.weighting]} without labels. {each}"
    return Section("Weights", [Table(["template", *titles], rows, caption.strip())])


def classes_section(title: str, result: Result, images: LabelledImages) -> Section:
    """Return the confusion matrix, the most confused pairs and the classes of lowest recall."""
    names, answers = images.class_names, result.answers
    counts = confusion_matrix(answers.labels, answers.top[:, 0], len(names))
    caption = "True class (row) and recognised class (column), pictures."
    blocks: list[Any] = []
    if len(names) <= MATRIX_CLASSES:
        blocks.append(Confusion(counts, names, caption, rows="true class"))
    else:
        caption += " Classes by number, as in per_class.csv; darker is more of the row; blue is the diagonal."
        if block_size(len(names)) > 1:
            caption += f" A cell is {block_size(len(names))} neighbouring classes wide and high."
        blocks.append(Picture(heat_map(counts, "true class", "recognised class"), caption, wide=True))
    pairs = [[f"{names[row]} → {names[column]}", f"{n:,}"] for row, column, n in confused_pairs(counts, PAIRS)]
    if pairs:
        blocks.append(Table(["true class → taken for", "pictures"], pairs, "The most frequent errors."))
    found = recalls(answers, len(names))
    totals = counts.sum(axis=1)
    order = [number for number in np.argsort(found, kind="stable")[:WORST] if totals[number]]
    rows = [[names[n], percent(found[n]), f"{counts[n, n]:,} of {totals[n]:,}"] for n in order]
    blocks.append(Table(["class", "recall", "pictures"], rows, "The classes of lowest recall; per_class.csv has all."))
    return Section(title, blocks)


def skipped_section(skipped: Sequence[str]) -> Section:
    """Return the pictures that could not be read."""
    rows = [list(fault.rsplit(": ", 1)) for fault in skipped[:SKIPPED_LISTED]]
    caption = f"{len(skipped):,} pictures could not be read and count nowhere."
    return Section("Skipped", [Table(["picture", "why"], [(row + [""])[:2] for row in rows], caption)])


def write_page(
    path: Path,
    results: Sequence[Result],
    titles: Sequence[str],
    images: LabelledImages,
    prompts: Prompts,
    sections: Sequence[Section],
    record: Mapping[str, Any],
) -> Path:
    """Write report.html; `record` is what results.json says."""
    headline = [
        Figure(
            percent(result.figures["top1"]),
            f"top-1 accuracy of {title}",
            f"95 % interval {percent(result.figures['top1_low'])} to {percent(result.figures['top1_high'])}",
        )
        for result, title in zip(results[:3], titles)
    ]
    headline += [
        Figure(f"{results[0].figures['images']:,}", f"pictures of {len(images.class_names):,} classes"),
    ]
    if "images_per_second" in results[0].figures:
        rate = f"{results[0].figures['images_per_second']:,.0f}"
        headline.append(Figure(rate, "pictures a second and process, decoding included", titles[0]))
    texts = prompts.by_class[0]
    shown = {
        "prompts": f"{len(prompts.flat):,}, {prompts.weighting} weights",
        "prompts of the first class": " | ".join(texts[:10]),
    }
    subtitle = "Zero-shot classification: each picture gets the class whose prompts lie nearest to it."
    facts = facts_of(record, {"Prompts": shown})
    return write_report(path, Report("Pictures named by words", subtitle, headline, sections, facts))
