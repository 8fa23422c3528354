"""The page: settings and columns as JSON, arrays as base64, styles and scripts inline.

Browsers do not let a page opened from disk fetch its neighbours, but it may load scripts: so
arrays of large atlases lie in script files that call `put`.
"""

import base64
import html as markup
import json
from dataclasses import dataclass
from importlib import resources

import numpy as np

from eval.atlas.columns import MISSING, REST, Column, span
from eval.atlas.thumbs import ACROSS

SCRIPTS = ("data.js", "plot.js", "panels.js", "pictures.js", "app.js")


@dataclass(frozen=True)
class Page:
    """What the page shows; n nuclei in the page's order.

    Attributes:
        title, facts, notes, missing: words; notes on how the map was made, and what is missing.
        ids: n names.
        xy: float32 [n, 2], the map, y upwards.
        columns: facts of every nucleus.
        near: int32 [n, k], rows of the most alike nuclei; cosine: float32 [n, k].
        there: bool [n], whether there is a thumbnail; cell: its px; side_um: its µm.
    """

    title: str
    facts: list[tuple[str, str]]
    notes: list[str]
    missing: list[str]
    ids: list[str]
    xy: np.ndarray
    columns: list[Column]
    near: np.ndarray
    cosine: np.ndarray
    there: np.ndarray
    cell: int
    side_um: float

    def blobs(self) -> dict[str, str]:
        """Name -> JavaScript expression of what grows with n: ids, map, neighbours, columns."""
        arrays = {
            "xy": self.xy.astype("<f4"),
            "near": self.near.astype("<i4"),
            "cosine": np.round((self.cosine + 1) * 32767.5).astype("<u2"),
            "there": self.there.astype("u1"),
        }
        for number, column in enumerate(self.columns):
            kind = "<f4" if column.labels is None else "<i4"
            arrays[f"column{number}"] = column.values.astype(kind)
        texts = {name: f'"{_base64(array)}"' for name, array in arrays.items()}
        return {"ids": _json(self.ids)} | texts

    def meta(self, sheets: list[str]) -> dict[str, object]:
        """What the scripts need to know, without the arrays."""
        described: list[dict[str, object]] = []
        for column in self.columns:
            one: dict[str, object] = {"name": column.name, "menu": column.menu}
            if column.labels is None:
                one["span"] = span(column.values)
            else:
                one |= {"labels": column.labels, "shown": column.shown}
            described.append(one)
        return {
            "n": len(self.ids),
            "k": self.near.shape[1],
            "cell": self.cell,
            "across": ACROSS,
            "side": self.side_um,
            "sheets": sheets,
            "columns": described,
            "rest": REST,
            "unknown": MISSING,
        }


def script(name: str, expression: str) -> str:
    """A statement that hands one blob to the page."""
    return f'ATLAS.put("{name}",{expression});\n'


def html(page: Page, sheets: list[str], *, inline: list[str], linked: list[str]) -> str:
    """The page as one text.

    Args:
        sheets: address of every sprite sheet, '' where no cell of it is filled.
        inline: statements that stand in the page; linked: script files beside it.
    """
    facts = "".join(f"<div><dt>{_text(k)}</dt><dd>{_text(v)}</dd></div>" for k, v in page.facts)
    notes = "".join(f"<p>{_text(note)}</p>" for note in page.notes)
    notes += "".join(f'<p class="missing">{_text(note)}</p>' for note in page.missing)
    head = f"<script>\n{_asset('put.js')}ATLAS.meta = {_json(page.meta(sheets))};\n</script>\n"
    data = "".join(f"<script>{statement}</script>\n" for statement in inline)
    data += "".join(f'<script src="{address}"></script>\n' for address in linked)
    code = "\n".join(_asset(name) for name in SCRIPTS)
    parts = {
        "TITLE": _text(page.title),
        "FACTS": facts,
        "NOTES": notes,
        "STYLE": _asset("atlas.css"),
        "CODE": f"{head}{data}<script>\n{code}</script>",
    }
    # Split first, fill later: a title may well contain another part's name.
    pieces = _asset("atlas.html").split("@@")
    return "".join(parts[piece] if at % 2 else piece for at, piece in enumerate(pieces))


def _asset(name: str) -> str:
    return resources.files("eval.atlas").joinpath("assets", name).read_text(encoding="utf-8")


def _text(words: str) -> str:
    return markup.escape(words)


def _json(value: object) -> str:
    # No word of a user may close the script element.
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def _base64(array: np.ndarray) -> str:
    return base64.b64encode(np.ascontiguousarray(array).tobytes()).decode()
