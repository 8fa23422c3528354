"""Gather the inputs, draw the pictures, write the files: the report from end to end."""

import re
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from eval.report import Report, embedding, html, page, sections
from eval.report import curves as curve_pictures
from eval.report import gallery as galleries
from eval.report import retrieval as neighbours
from eval.report.files import NUMBERS, PAGE, write
from eval.report.gallery import Gallery
from eval.report.inputs import (
    Row,
    RunFolder,
    newest,
    none_if_nan,
    read_results,
    read_run,
    repeats,
    results_files,
)
from eval.report.measured import probe_sections
from eval.report.style import Picture
from eval.report.tables import Board, boards, name_of, unique_names
from eval.report.verdict import headline
from lemon_muse import __version__
from lemon_muse.errors import UserError

Section = tuple[str, str, str]
# With more rows than this only those of the encoder in the foreground stand on the page.
MOST_ROWS = 5000


@dataclass(frozen=True)
class Material:
    """Everything that was read."""

    rows: list[Row]
    everything: list[Row]
    notes: list[str]
    boards: list[Board]
    gallery: Gallery | None
    folder: RunFolder | None
    newest_file: float


def build(cfg: Report) -> Path:
    """See `eval.report.run`."""
    material = gather(cfg)
    drawn: list[Picture] = []
    numbers: dict[str, Any] = {}
    parts = [_curves(material, drawn), *probe_sections(material.boards, drawn)]
    parts += _gallery_sections(cfg, material, drawn, numbers)
    run = str(cfg.run or "")
    again = page.reproduce(page.command_of(cfg), material.rows, material.folder, run)
    parts.append(("reproduce", "How to reproduce", again))
    parts.append(("numbers", "All numbers", _all_numbers(material)))
    board = material.boards[0]
    title = cfg.title or (board.encoders[0] if board.encoders else f"Floors of {board.benchmark}")
    top = sections.header(title, board, facts_of(material))
    pages = {PAGE: page.shell(title, top, parts)}
    if wants_leaderboard(cfg, material.rows):
        from eval.leaderboard import leaderboard

        found = leaderboard(material.boards, material.everything, command=page.command_of(cfg))
        drawn += found.pictures
        pages |= found.pages
    write(cfg.out, pages, drawn, report_json(title, material, numbers))
    target = cfg.out / PAGE
    others = "".join(f", {name}" for name in pages if name != PAGE)
    print(f"wrote {target}{others}, {NUMBERS} and {len(drawn)} pictures")
    return target


def wants_leaderboard(cfg: Report, rows: list[Row]) -> bool:
    """What `leaderboard=` means for these rows."""
    if cfg.leaderboard != "auto":
        return cfg.leaderboard
    encoders = {(r.encoder, r.encoder_hash) for r in rows if not r.is_floor}
    return len(encoders) > 1 or len({r.benchmark for r in rows}) > 1


def _all_numbers(material: Material) -> str:
    """Every row, or, where they are too many for a page, those of the first encoder."""
    notes = "".join(html.missing(note) for note in material.notes)
    rows, board = material.everything, material.boards[0]
    if len(rows) > MOST_ROWS and board.encoders:
        names = unique_names(rows)
        rows = [r for r in rows if names[r.encoder, r.encoder_hash] == board.encoders[0]]
        notes += html.missing(f"Here: the rows of {board.encoders[0]}; report.json holds all.")
    return notes + sections.all_numbers(rows)


def gather(cfg: Report) -> Material:
    """Read and check all inputs before anything is drawn."""
    files = list(dict.fromkeys(file for name in cfg.results for file in results_files(name)))
    read = [read_results(file) for file in files]
    everything = [row for rows, _ in read for row in rows]
    notes = [note for _, some in read for note in some]
    rows = newest(everything)
    replaced = len(everything) - len(rows) - repeats(everything)
    if replaced:
        notes.append(
            f"{replaced} rows were measured again later or with another seed; "
            "they stand below, but not in the tables above."
        )
    found = [f.parent / galleries.NAME for f in files if (f.parent / galleries.NAME).is_file()]
    opened = [galleries.read_gallery(p, limit=cfg.nuclei, seed=cfg.seed) for p in found]
    name, code = foreground(cfg.encoder, rows, opened)
    # Pictures of another encoder's features under this one's name would be a lie.
    mine = [g for g in opened if g.encoder in ("", name) and g.encoder_hash in ("", code)]
    gallery = mine[0] if mine else None
    table = boards(
        rows,
        foreground=name_of(rows, name, code),
        classes=gallery.classes if gallery else [],
        resamples=cfg.resamples,
        seed=cfg.seed,
    )
    # The first board is the page's verdict: it must speak of the encoder in the foreground.
    shown = name_of(rows, name, code)
    table.sort(key=lambda b: shown not in b.encoders)
    folder = read_run(cfg.run) if cfg.run else None
    modified = max(f.stat().st_mtime for f in files)
    return Material(rows, everything, notes, table, gallery, folder, modified)


def foreground(wanted: str, rows: list[Row], opened: list[Gallery]) -> tuple[str, str]:
    """Name and hash of the encoder that the page is about."""
    encoders = {(r.encoder, r.encoder_hash): None for r in rows if not r.is_floor}
    if wanted:
        hits = [e for e in encoders if wanted in (e[0], e[1])]
        if not hits:
            known = ", ".join(sorted({e[0] for e in encoders})) or "none"
            raise UserError(f"the results hold no encoder '{wanted}'; they hold: {known}.")
        return hits[-1]
    for gallery in opened:
        hits = [
            e for e in encoders if gallery.encoder == e[0] and gallery.encoder_hash in ("", e[1])
        ]
        if hits:
            return hits[-1]
    last = [(r.encoder, r.encoder_hash) for r in rows if not r.is_floor]
    return last[-1] if last else ("", "")


def facts_of(material: Material) -> list[tuple[str, str]]:
    """What was measured: the line of facts beneath the verdict."""
    board = material.boards[0]
    some = list(board.cells.values())
    own = [r for r in some if board.encoders and r.encoder == board.encoders[0].split(" (")[0]]
    row = (own or some)[0]
    predicted = next(iter(board.predictions.values()), None)
    people = f", {len(np.unique(predicted.patient))} patients" if predicted else ""
    window = page.window_words(material.gallery) if material.gallery else _window(material.rows)
    data = " · ".join(p for p in (board.benchmark, board.task, board.protocol) if p)
    return [
        ("Encoder", row.encoder if own else ""),
        ("Content hash", row.encoder_hash[:16] if own else ""),
        ("Window", window),
        ("Data", data),
        ("Scored on", f"{row.n:,} {board.split or 'test'} nuclei{people}" if row.n else ""),
        ("Version of the data", board.version),
        *page.run_facts(material.folder),
        ("Results of", time.strftime("%Y-%m-%d", time.gmtime(material.newest_file))),
    ]


def _window(rows: list[Row]) -> str:
    """The window as the floors' names give it ('floor:colour@40px0.25'), where they do."""
    for row in rows:
        match = re.search(r"@(\d+)px(\d*\.?\d+)$", row.encoder)
        if match:
            return f"{match[1]} px at {match[2]} µm/px"
    return ""


def _curves(material: Material, drawn: list[Picture]) -> Section:
    picture = curve_pictures.learning_curves(material.folder) if material.folder else None
    if picture:
        drawn.append(picture)
    return ("training", "Learning curves", sections.curves(material.folder, picture))


def _gallery_sections(
    cfg: Report, material: Material, drawn: list[Picture], numbers: dict[str, Any]
) -> list[Section]:
    gallery = material.gallery
    names = ("Nearest neighbours", "Morphological map")
    if gallery is None:
        why = html.missing(
            "No gallery.npz of this encoder lies beside the results: 'lemon-muse eval' writes it."
        )
        return [("neighbours", names[0], why), ("map", names[1], why)]
    out = [("neighbours", names[0], _neighbours(cfg, gallery, drawn, numbers))]
    why = embedding.projectable(gallery)
    components = None if why else embedding.principal(gallery.features)
    if components is None:
        why = why or "all features are the same, the encoder has collapsed"
        return [*out, ("map", names[1], html.missing(f"There is no map: {why}."))]
    place = embedding.project(components, method=cfg.projection, seed=cfg.seed)
    box = embedding.to_unit_box(place)
    nuclei, shown = embedding.nuclei_map(gallery, box)
    dots = embedding.dot_maps(gallery, box)
    drawn += [nuclei, dots]
    mixing = embedding.patient_mixing(gallery, cfg.neighbours)
    numbers["map"] = {
        "projection": cfg.projection,
        "nuclei": len(box),
        "drawn": shown,
        "same_patient": mixing[0],
        "same_patient_by_chance": mixing[1],
    }
    body = page.morphology(
        gallery, (nuclei, dots), shown=shown, method=cfg.projection, mixing=mixing, k=cfg.neighbours
    )
    out.append(("map", names[1], body))
    if cfg.projector:
        from eval.report.projector import write_projector

        folder = write_projector(cfg.out / "projector", gallery, components)
        text = page.projector(str(folder), len(box), components.shape[1])
        out.append(("projector", "Projector", text))
    return out


def _neighbours(
    cfg: Report, gallery: Gallery, drawn: list[Picture], numbers: dict[str, Any]
) -> str:
    result = neighbours.retrieve(gallery, cfg.neighbours)
    if result is None:
        return html.missing(
            "The gallery holds no test nuclei or too few train nuclei to search in."
        )
    table = neighbours.by_class(gallery, result)
    numbers["retrieval"] = {
        "neighbours": cfg.neighbours,
        "classes": table,
        "patients_in_both": result.shared_patients,
    }
    each = cfg.queries if len(gallery.classes) <= 5 else min(cfg.queries, 2)
    chosen = neighbours.choose_queries(gallery, result, each=each, seed=cfg.seed)
    sheets = []
    for cls, rows in chosen.items():
        name = gallery.classes[cls]
        alt = f"Query nuclei of class {name} and the {cfg.neighbours} nearest train nuclei of each."
        file = f"neighbours-{cls + 1}-{html.slug(name)}"
        sheets.append((name, neighbours.sheet(gallery, result, rows, name=file, alt=alt)))
    drawn += [picture for _, picture in sheets]
    return page.retrieval(gallery, table, sheets, shared=result.shared_patients)


def report_json(title: str, material: Material, numbers: dict[str, Any]) -> dict[str, Any]:
    """What a program wants to know; NaN is null."""
    return {
        "title": title,
        "version": __version__,
        "verdict": headline(material.boards[0]),
        "rows": [row.as_json() for row in material.everything],
        "differences": [
            {"benchmark": b.benchmark, "task": b.task, "protocol": b.protocol}
            | {"split": b.split, "version": b.version}
            | {k: none_if_nan(v) for k, v in asdict(d).items()}
            for b in material.boards
            for d in b.differences
        ],
        **numbers,
    }
