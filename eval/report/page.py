"""Put the page together: the shell, the gallery's sections, and how to do it all again."""

import base64
import hashlib
import json
import shlex
from typing import Any

from eval.report import Report, html
from eval.report.css import CSS
from eval.report.gallery import Gallery
from eval.report.inputs import Row, RunFolder
from eval.report.style import Picture, class_colour
from eval.report.words import DASH, TIMES
from lemon_muse import __version__

# What an encoder costs stands in params, too, but is no setting.
_COSTS = {"gmacs", "gmacs_of", "parameters", "nuclei_per_second", "images_per_second"}
FOOTER = "The pictures lie beside this page as PNG files, the numbers as report.json."


def shell(
    title: str,
    top: str,
    sections: list[tuple[str, str, str]],
    *,
    footer: str = FOOTER,
    css: str = "",
    script: str = "",
) -> str:
    """The whole document; `sections` are (anchor, title, body).

    Args:
        script: our own; the page lets nothing else run.
    """
    links = "".join(f'<a href="#{a}">{html.esc(t)}</a>' for a, t, _ in sections)
    body = "\n".join(html.section(a, t, b) for a, t, b in sections)
    allowed, code = "", ""
    if script:
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        allowed, code = f"; script-src 'sha256-{digest}'", f"<script>{script}</script>\n"
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        # Names come from files: even if one slipped through, nothing may run or be fetched.
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; '
        f"img-src data:; style-src 'unsafe-inline'{allowed}\">\n"
        f"<title>{html.esc(title)}</title>\n<style>{CSS}{css}</style>\n</head>\n<body>\n<main>\n"
        f"{top}\n"
        f'<nav aria-label="sections">{links}</nav>\n{body}\n'
        f"<footer>Written by lemon-muse {html.esc(__version__)}. {html.esc(footer)}</footer>\n"
        f"</main>\n{code}</body>\n</html>\n"
    )


def legend(gallery: Gallery) -> str:
    """The classes and their colours."""
    names = "".join(
        f"<span>{html.swatch(class_colour(i), name)}</span>"
        for i, name in enumerate(gallery.classes)
    )
    return f'<div class="legend">{names}</div>'


def window_words(gallery: Gallery) -> str:
    """'64 x 64 px at 0.25 µm/px, 16 µm wide'."""
    side = gallery.crops.shape[1]
    if not gallery.mpp > 0:
        return f"{side} {TIMES} {side} px"
    width = side * gallery.mpp
    return f"{side} {TIMES} {side} px at {gallery.mpp:g} µm/px, {width:.3g} µm wide"


def retrieval(
    gallery: Gallery, table: list[dict[str, Any]], sheets: list[tuple[str, Picture]], *, shared: int
) -> str:
    """Sheets of query nuclei and their nearest, one a class, with a table over all queries."""
    lines = []
    for row in table:
        colour = class_colour(gallery.classes.index(row["class"]))
        lines.append(
            [
                html.swatch(colour, row["class"]),
                f"{row['queries']:,}",
                html.value_cell(f"{100 * row['same_class']:.1f} %", ""),
                f"{100 * row['chance']:.1f} %",
                f"{row['same_class'] / row['chance']:.2f}" if row["chance"] else DASH,
            ]
        )
    head = ["Class of the query", "Queries", "Same class among neighbours", "By chance", "Ratio"]
    note = "Stain, blur and crowding can make neighbours too: look for what they share."
    if shared:
        note += (
            f" {shared} patients occur both among the queries and the train nuclei, so some "
            "neighbours come from the query's own slide."
        )
    parts = [
        html.paragraph(
            "Each line starts with a nucleus of a test patient; beside it stand the train nuclei "
            "that the encoder finds most alike (cosine), nearest first. The frame is the annotated "
            "class of the nucleus in the middle. "
            f"One square is {window_words(gallery)}."
        ),
        html.beware(note),
        legend(gallery),
        html.table(head, [("", lines)]),
    ]
    for cls, picture in sheets:
        parts.append(
            html.figure(
                picture,
                f"Queries of class {cls}, drawn at random. At the end of a line: how many "
                "neighbours are of the query's class.",
            )
        )
    return "\n".join(parts)


def morphology(
    gallery: Gallery, pictures: tuple[Picture, Picture], *, shown: int, method: str,
    mixing: tuple[float, float], k: int,
) -> str:  # fmt: skip
    """The map with nuclei on it, and the same map as dots."""
    n = len(gallery.labels)
    name = {"tsne": "t-SNE", "umap": "UMAP", "pca": "principal components"}[method]
    first = (
        f"{shown:,} of {n:,} nuclei on a {name} map of the encoder's features (unit length, 50 "
        "principal components). The map is cut into cells; each shows the nucleus that lies "
        "nearest to its centre, framed in its class colour. Walk across it: neighbours should look "
        "alike, and size, chromatin and crowding should change gradually."
    )
    own, chance = mixing
    second = (
        "The same map as dots, at the same places. On the left the classes; on the right the "
        f"patients with most nuclei. Of a nucleus's {k} nearest in the full feature space, "
        f"{100 * own:.1f} % come from its own patient; {100 * chance:.1f} % would by chance."
    )
    return "\n".join(
        [
            legend(gallery),
            html.figure(
                pictures[0],
                first,
                warn="distances between far groups mean little on such "
                "a map, and a crowded cell hides all nuclei but one.",
            ),
            html.figure(
                pictures[1],
                second,
                warn="islands of one patient mean that stain or "
                "scanner, not shape, sets the nuclei apart.",
            ),
        ]
    )


def projector(folder: str, n: int, columns: int) -> str:
    """How to open the same embedding in TensorBoard."""
    return html.paragraph(
        f"The {n:,} nuclei of the map, as {columns} principal components with their thumbnails, "
        "class, split and patient, can be turned about in TensorBoard (tab Projector):"
    ) + html.code(f"tensorboard --logdir {shlex.quote(folder)}")


def command_of(cfg: Report) -> str:
    """The words that make this report again: whatever differs from the defaults."""
    words = [f"results={','.join(cfg.results)}"]
    for key, value in cfg.model_dump().items():
        if key != "results" and value != Report.model_fields[key].default:
            words.append(f"{key}={str(value).lower() if isinstance(value, bool) else value}")
    return "lemon-muse report " + " ".join(shlex.quote(word) for word in words)


def run_facts(folder: RunFolder | None) -> list[tuple[str, str]]:
    """Day, code version and git state of the run's last start, as run.json gives them."""
    starts = folder.info.get("starts") if folder else None
    last = starts[-1] if isinstance(starts, list) and starts else {}
    if not isinstance(last, dict):
        return []
    git = str(last.get("git", "none"))
    code = f"lemon-muse {last['version']}" if last.get("version") else ""
    commit = f" ({git[:24]})" if code and git != "none" else ""
    return [("Trained", str(last.get("time", ""))[:10]), ("Trained with", code + commit)]


def _without_host(tree: Any) -> Any:
    """run.json without the machine's name: the page may travel farther than the run folder."""
    if isinstance(tree, dict):
        return {k: _without_host(v) for k, v in tree.items() if k != "host"}
    return [_without_host(v) for v in tree] if isinstance(tree, list) else tree


def _eval_command(benchmark: str, task: str, protocol: str) -> str:
    """The words that make such rows; tasks that the benchmark does not have are not words."""
    from eval.benchmarks import BENCHMARKS, find

    words = [f"benchmark={benchmark}", "root=DATA"]
    name, _, plan = task.partition(" ")
    if benchmark in BENCHMARKS and name in find(benchmark).tasks:
        words += [f"task={name}"] if len(find(benchmark).tasks) > 1 else []
        words += [f"plan={plan}"] if plan else []
    words += [f"protocol={protocol}"] if protocol == "paper" else []
    return "lemon-muse eval encoder=ENCODER " + " ".join(shlex.quote(word) for word in words)


def reproduce(command: str, rows: list[Row], folder: RunFolder | None, run: str) -> str:
    """Commands, settings and versions."""
    lines = []
    if folder is not None and folder.config:
        lines += ["# pretrain", f"lemon-muse train {shlex.quote(f'{run}/config.yaml')}"]
    lines.append("# probe: the encoder and its floors")
    for benchmark, task, protocol in dict.fromkeys((r.benchmark, r.task, r.protocol) for r in rows):
        lines.append(_eval_command(benchmark, task, protocol))
    lines += ["# this page", command]
    parts = [html.code("\n".join(lines))]
    seeds = sorted({r.seed for r in rows})
    versions = sorted({r.version for r in rows if r.version})
    seconds = sum(r for r in {(r.encoder, r.probe): r.seconds for r in rows}.values() if r == r)
    parts.append(
        html.facts(
            [
                ("Seeds of the probes", ", ".join(map(str, seeds))),
                ("Version of the data", ", ".join(versions)),
                ("Time of the probes", f"{seconds:,.0f} s" if seconds else ""),
            ]
        )
    )
    chosen = [(r.probe, {k: v for k, v in r.params.items() if k not in _COSTS}) for r in rows]
    settings = {(p, json.dumps(s, sort_keys=True, ensure_ascii=False)) for p, s in chosen}
    known = sorted(f"{probe}: {text}" for probe, text in settings if text != "{}")
    if known:
        parts.append(html.folded("Settings of the probes", html.code("\n".join(known))))
    if folder is not None and folder.config:
        import yaml

        text = yaml.safe_dump(folder.config, sort_keys=False, width=100, allow_unicode=True)
        parts.append(html.folded("Settings of the run (config.yaml)", html.code(text)))
    if folder is not None and folder.info:
        text = json.dumps(_without_host(folder.info), indent=2, ensure_ascii=False, default=str)
        parts.append(html.folded("Versions and code of the run (run.json)", html.code(text)))
    return "\n".join(parts)
