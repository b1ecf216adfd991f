"""Scores of pictures as a table, sheets of the pictures beside their scores, results.json and report.html."""

import csv
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

from jaxdiff.io.case_sheet import PICTURE, fit
from jaxdiff.io.concept_pictures import read_photograph
from jaxdiff.io.grids import GridStyle, labelled_grid
from jaxdiff.io.images import is_overview, read_png_texts, write_overview
from jaxdiff.io.provenance import tree_hash
from jaxdiff.io.report import Figure, Picture, Report, Section, Table, facts_of, write_report
from jaxdiff.io.runs import Figures, read_json, write_results
from jaxdiff.mesh import device_name
from jaxdiff.recipes.clip_features import Encoder
from jaxdiff.recipes.clip_grading import Graded
from jaxdiff.recipes.clip_scores import TEXT_WEIGHT, best_pictures

ACROSS, MOST = 5, 25
"""Pictures in a row of a group's sheet, references too, and all of its own on it."""
TITLE = "Title"
"""Keyword under which a sheet says its own name."""
MEANINGS = {
    "image_score": "100 cosine to the references, mean",
    "text_score": "exp(logit scale) cosine to the prompt, mean",
    "best.image_score": "image score of the best five",
    "best.text_score": "text score of the best five",
    "clip_i": "CLIP-I, mean cosine to the references",
    "clip_i_times_2.5": "the same, 2.5 max(cosine, 0)",
    "clip_t": "CLIP-T, mean cosine to the prompt",
    "clip_t_times_2.5": "CLIPScore, 2.5 max(cosine, 0)",
    "clip_t_with_word": "CLIP-T to the prompt with the learned word",
    "clip_t_with_word_times_2.5": "the same, 2.5 max(cosine, 0)",
    "clip_t_stripped": "CLIP-T to the prompt without the learned word",
    "clip_t_stripped_times_2.5": "the same, 2.5 max(cosine, 0)",
    "cmmd": "CMMD to the references, by the CLIP above, pairs of a picture with itself left out",
    "cmmd_with_self_pairs": "the same with those pairs, as the published code, which takes ViT-L/14 at 336 pixels",
    "all_present": "share of pictures with all concepts",
}


def write_outputs(
    out: Path, encoder: Encoder, graded: Sequence[Graded], config: Mapping[str, Any], started: float
) -> list[Path]:
    """Write every file and return their paths; `started` is `time.perf_counter()` when the command began."""
    table = write_table(out / "scores.csv", graded)
    paths, sections = [table], []
    for result in graded:
        sheet = draw_sheet(result)
        paths.append(out / f"sheet_{result.group.name}.png")
        write_overview(paths[-1], sheet, {TITLE: paths[-1].name})
        sections.append(section_of(result, sheet))
    delete_others(out, paths)
    figures: Figures = {f"{r.group.name}.{name}": value for r in graded for name, value in r.figures.items()}
    judged = [result.passed for result in graded if result.passed is not None]
    if judged:
        figures |= {"passed": sum(judged), "graded": len(judged)}
    figures["seconds"] = time.perf_counter() - started
    results = write_results(
        out, figures, config, {"params": tree_hash(encoder.model.params)}, device_name(encoder.mesh)
    )
    record = read_json(results)
    head = [Figure(f"{sum(judged)} of {len(judged)}", "prompts reach their baselines")] if judged else []
    for name in ("image_score", "text_score"):
        found = [result.figures[name] for result in graded if name in result.figures]
        if found:
            head.append(Figure(f"{np.mean(found):.1f}", MEANINGS[name]))
    report = Report(
        "CLIP scores",
        f"What {Path(encoder.name).name} makes of the pictures. Intervals are 95 %, bootstrapped over pictures.",
        head,
        sections,
        facts_of(record),
    )
    return [*paths, results, write_report(out / "report.html", report)]


def delete_others(out: Path, written: Sequence[Path]) -> None:
    """Delete sheets of earlier runs that are none of this one's, and say so; a copy under another name stays."""
    for path in sorted(out.glob("sheet_*.png")):
        if path not in written and is_overview(path) and (read_png_texts(path) or {}).get(TITLE) == path.name:
            path.unlink()
            print(f"deleted: {path}, a sheet of an earlier run with other pictures")


def write_table(path: Path, graded: Sequence[Graded]) -> Path:
    """Write one line a picture."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["group", "picture", "image_score", "text_score", "among_best"])
        for result in graded:
            for number, picture in enumerate(result.group.files):
                scores = [f"{values[number]:.4f}" if len(values) else "" for values in (result.image, result.text)]
                writer.writerow([result.group.name, picture, *scores, int(number in result.best)])
    return path


def draw_sheet(result: Graded) -> UInt8[np.ndarray, "h w 3"]:
    """Draw the pictures with their scores, the best first, and the first references."""
    group, scores = result.group, [values for values in (result.image, result.text) if len(values)]
    shown, _ = ranked(result)
    rows, cells, captions = [], [], []
    for start in range(0, len(shown), ACROSS):
        part = shown[start : start + ACROSS]
        rows.append(f"{start + 1} to {start + len(part)}" if len(part) > 1 else str(start + 1))
        cells += _row([square(group.files[number]) for number in part])
        captions += _row([" / ".join(f"{values[number]:.1f}" for values in scores) for number in part], "")
    for name, files in group.all_references.items():
        rows.append(name)
        cells += _row([square(file) for file in files[:ACROSS]])
        captions += [""] * ACROSS
    named = (("image score", result.image), ("text score", result.text))
    return labelled_grid(
        np.stack(cells),
        rows,
        [""] * ACROSS,
        group.prompt or group.name,
        column_axis=" / ".join(name for name, values in named if len(values)),
        style=GridStyle(cell=PICTURE),
        captions=captions,
    )


def ranked(result: Graded) -> tuple[list[int], str]:
    """Return the numbers of the first pictures of the sheet, the best first, and by what they are in this order."""
    if len(result.best):
        order = best_pictures(result.image, result.text, MOST)
        return order.tolist(), f"image score + {TEXT_WEIGHT:g} text score"
    for values, name in ((result.image, "image score"), (result.text, "text score")):
        if len(values):
            return np.argsort(-values, kind="stable")[:MOST].tolist(), name
    return list(range(len(result.group.files)))[:MOST], "name"


def _row(items: list[Any], empty: Any = None) -> list[Any]:
    empty = np.full((PICTURE, PICTURE, 3), 255, np.uint8) if empty is None else empty
    return items + [empty] * (ACROSS - len(items))


def square(file: Path) -> UInt8[np.ndarray, "h w 3"]:
    """Return the picture in the middle of a white square."""
    image = fit(read_photograph(file))
    canvas = np.full((PICTURE, PICTURE, 3), 255, np.uint8)
    top, left = (PICTURE - image.height) // 2, (PICTURE - image.width) // 2
    canvas[top : top + image.height, left : left + image.width] = np.asarray(image)
    return canvas


def section_of(result: Graded, sheet: UInt8[np.ndarray, "h w 3"]) -> Section:
    """Return the part of the page about one group."""
    figures, group = result.figures, result.group
    rows = []
    for name, value in figures.items():
        if name.endswith(("_low", "_high")) or name in ("pictures", "references", "passed"):
            continue
        interval = f"{figures[f'{name}_low']:.3f} to {figures[f'{name}_high']:.3f}" if f"{name}_low" in figures else ""
        rows.append([meaning(name), f"{value:.3f}", interval])
    files, (_, order) = len(group.files), ranked(result)
    shown = f"The first {MOST} of {files} pictures" if files > MOST else "All pictures"
    picture = Picture(sheet, f"{shown}, by {order}.", wide=True)
    note = ""
    if group.baseline is not None:
        verdict = "reach" if result.passed else "do not reach"
        note = f"The best five {verdict} the baseline of {group.baseline[0]:g} / {group.baseline[1]:g}."
    return Section(group.prompt or group.name, [picture, Table(["figure", "mean", "95 % interval"], rows)], note)


def meaning(name: str) -> str:
    """Return what a figure is, for the page."""
    if name.startswith("presence_margin."):
        return f"how much better a text with “{name.split('.', 1)[1]}” fits than one without"
    if name.startswith("present."):
        return f"share of pictures that show “{name.split('.', 1)[1]}”"
    if name in MEANINGS:
        return MEANINGS[name]
    kind, word = name.split(".", 1)
    return f"{MEANINGS[kind]}; those of “{word}” alone"
