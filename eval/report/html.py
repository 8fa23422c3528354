"""Small pieces of HTML. Every text that comes from a file passes through `esc`."""

import html
import re
from collections.abc import Sequence

from eval.report.style import Picture


def esc(text: object) -> str:
    """Text as HTML shows it, safe inside elements and quoted attributes."""
    return html.escape(str(text), quote=True)


def slug(text: str) -> str:
    """A name as part of a file name or anchor: 'Tumour / epithelial' -> 'tumour-epithelial'."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") or "x"


def section(anchor: str, title: str, *content: str) -> str:
    """A section with a heading that can be linked to."""
    link = f'<a class="anchor" href="#{anchor}" aria-label="link to this section">#</a>'
    body = "\n".join(c for c in content if c)
    return f'<section id="{anchor}">\n<h2>{esc(title)} {link}</h2>\n{body}\n</section>'


def paragraph(text: str, kind: str = "") -> str:
    """A paragraph of plain text."""
    return f"<p{_class(kind)}>{esc(text)}</p>"


def missing(text: str) -> str:
    """One line for a part whose input is not there."""
    return paragraph(text, "missing")


def beware(text: str) -> str:
    """A warning of one or two sentences."""
    return f'<p><span class="beware">{esc(text)}</span></p>'


def figure(picture: Picture, caption: str, *, warn: str = "") -> str:
    """A picture with what to see in it, and what to beware of."""
    warning = f' <span class="beware">{esc(warn)}</span>' if warn else ""
    return (
        f'<figure id="fig-{esc(picture.name)}"><img src="{picture.uri}" width="{picture.width}" '
        f'height="{picture.height}" alt="{esc(picture.alt)}">'
        f"<figcaption>{esc(caption)}{warning}</figcaption></figure>"
    )


def table(
    head: Sequence[str],
    groups: Sequence[tuple[str, Sequence[Sequence[str]]]],
    *,
    text_columns: int = 1,
) -> str:
    """A table; its cells are HTML already (`esc` them).

    Args:
        head: column titles, plain text.
        groups: (title or '', rows); a title becomes a line over its rows.
        text_columns: how many columns from the left hold text; the others are numbers.
    """

    def kind(column: int) -> str:
        return "" if column < text_columns else ' class="num"'

    top = "".join(f'<th scope="col"{kind(i)}>{esc(h)}</th>' for i, h in enumerate(head))
    bodies = []
    for title, rows in groups:
        lines = []
        if title:
            lines.append(
                f'<tr class="group"><th colspan="{len(head)}" scope="rowgroup">'
                f"{esc(title)}</th></tr>"
            )
        for row in rows:
            cells = "".join(f"<td{kind(i)}>{cell}</td>" for i, cell in enumerate(row))
            lines.append(f"<tr>{cells}</tr>")
        bodies.append(f"<tbody>{''.join(lines)}</tbody>")
    body = "\n".join(bodies)
    return f'<div class="scroll"><table><thead><tr>{top}</tr></thead>\n{body}</table></div>'


def value_cell(value: str, bounds: str, *, best: bool = False) -> str:
    """A number with its interval beneath, bold where it is the best."""
    number = f"<strong>{esc(value)}</strong>" if best else esc(value)
    return f'{number}<span class="ci">{esc(bounds)}</span>' if bounds else number


def facts(pairs: Sequence[tuple[str, str]]) -> str:
    """Names and values side by side; pairs without a value are left out."""
    cells = "".join(
        f"<div><dt>{esc(name)}</dt><dd>{esc(value)}</dd></div>" for name, value in pairs if value
    )
    return f'<dl class="facts">{cells}</dl>'


def folded(title: str, content: str) -> str:
    """Content that opens on a click."""
    return f"<details><summary>{esc(title)}</summary>\n{content}\n</details>"


def code(text: str) -> str:
    """Text as typed."""
    return f"<pre><code>{esc(text)}</code></pre>"


def swatch(colour: str, name: str) -> str:
    """A class name with its colour."""
    return f'<span class="swatch" style="background:{esc(colour)}"></span>{esc(name)}'


def _class(kind: str) -> str:
    return f' class="{kind}"' if kind else ""
