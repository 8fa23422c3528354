"""Read the tables of a page, as a browser would: rows of cells with their attributes."""

from dataclasses import dataclass, field
from html.parser import HTMLParser


@dataclass
class Cell:
    """One th or td: its attributes and its text."""

    tag: str
    attributes: dict[str, str]
    text: str = ""

    @property
    def key(self) -> float | str | None:
        """What the page's script sorts by."""
        if "data-v" not in self.attributes:
            return self.text.strip()
        return float(self.attributes["data-v"]) if self.attributes["data-v"] else None


@dataclass
class Row:
    """One tr, in the head of its table or not."""

    kind: str
    in_head: bool
    cells: list[Cell] = field(default_factory=list)


@dataclass
class Table:
    """One table: the headings that were open when it began, its caption and rows."""

    place: tuple[str, str, str]
    kind: str
    caption: str = ""
    rows: list[Row] = field(default_factory=list)

    @property
    def body(self) -> list[Row]:
        return [row for row in self.rows if not row.in_head]

    @property
    def head(self) -> list[Row]:
        return [row for row in self.rows if row.in_head]

    def names(self) -> list[str]:
        return [row.cells[0].text for row in self.body]


class Page(HTMLParser):
    """Collects tables, links, scripts and the content security policy."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tables: list[Table] = []
        self.scripts: list[str] = []
        self.links: list[str] = []
        self.policy = ""
        self._titles = {"h2": "", "h3": "", "h4": ""}
        self._open: list[str] = []
        self._head = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.links += [given[k] for k in ("src", "href", "srcset", "data", "action") if k in given]
        if given.get("http-equiv") == "Content-Security-Policy":
            self.policy = given["content"]
        if tag in self._titles:
            levels = list(self._titles)
            for level in levels[levels.index(tag) :]:
                self._titles[level] = ""
        if tag == "table":
            titles = self._titles
            place = (titles["h2"], titles["h3"], titles["h4"])
            self.tables.append(Table(place, given.get("class", "")))
        if tag in ("thead", "tbody", "tfoot"):
            self._head = tag == "thead"
        if tag == "tr":
            self.tables[-1].rows.append(Row(given.get("class", ""), self._head))
        if tag in ("th", "td"):
            self.tables[-1].rows[-1].cells.append(Cell(tag, given))
        if tag == "script":
            self.scripts.append("")
        if tag in ("h2", "h3", "h4", "caption", "th", "td", "script"):
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if self._open and self._open[-1] == tag:
            self._open.pop()

    def handle_data(self, data: str) -> None:
        if not self._open:
            return
        tag = self._open[-1]
        if tag in self._titles:
            self._titles[tag] += data
        elif tag == "caption":
            self.tables[-1].caption += data
        elif tag == "script":
            self.scripts[-1] += data
        else:
            self.tables[-1].rows[-1].cells[-1].text += data

    def of(self, benchmark: str, title: str = "", part: str = "") -> list[Table]:
        """The tables under headings that begin so ('NuCLS', 'super', 'Published')."""
        wanted = (benchmark, title, part)
        found = []
        for table in self.tables:
            pairs = zip(table.place, wanted, strict=True)
            if all(here.startswith(name) if name else True for here, name in pairs):
                found.append(table)
        return found


def main_table(page: Page, benchmark: str) -> Table:
    """The table of the first standing of a benchmark of the leaderboard."""
    return next(t for t in page.of(benchmark) if not t.place[2] and len(t.head) == 2)


def columns(table: Table) -> list[str]:
    """Titles of the columns in the order of a row's cells, probes before their metrics."""
    first, second = (row.cells for row in table.head)
    out = []
    rest = iter(second)
    for cell in first:
        span = int(cell.attributes.get("colspan", 0))
        out += [f"{cell.text}/{next(rest).text}" for _ in range(span)] if span else [cell.text]
    return out
