"""List the slides of folders or of a table: size, mpp, patient, checksum, and what is wrong.

The manifest is a plain csv, one row a slide, and every later job starts from it. A slide that
cannot be read, states no mpp or stands there twice is listed with the reason and stops no other.
"""

import hashlib
import re
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from pydantic import Field, field_validator

from data_prep.manifest_file import COLUMNS, as_csv, older_rows, read_csv, read_number
from data_prep.pool import in_processes
from lemon_muse.config import Config
from lemon_muse.data.files import write_atomic
from lemon_muse.data.slides import choose_mpp, read_facts
from lemon_muse.errors import UserError

GIVEN = ("slide", "patient", "mpp", "organ", "scanner")  # columns that a table may have
ENDINGS = (
    ".svs", ".ndpi", ".mrxs", ".tif", ".tiff", ".scn", ".bif", ".vms", ".vmu", ".svslide", ".czi",
    ".qptiff", ".png", ".jpg", ".jpeg",
)  # fmt: skip
TCGA = r"(?i)(TCGA-[A-Z0-9]{2}-[A-Z0-9]{4})"
ENDS_BYTES = 2**20
SAVE_EVERY = 30.0  # seconds between the notes that a killed job goes on from


def one_group(pattern: str) -> str:
    """The pattern, if it is a regular expression with exactly one group; ValueError otherwise."""
    try:
        groups = re.compile(pattern).groups
    except re.error as error:
        raise ValueError(f"not a regular expression ({error})") from None
    if groups != 1:
        raise ValueError(f"it needs exactly one group in parentheses, not {groups}")
    return pattern


class Manifest(Config):
    """A table of slides: `lemon-muse prep manifest data=FOLDER_OR_CSV[,…] out=M.csv`."""

    data: str | list[str] = Field(
        description="folders (walked) and csv files (column path; slide, patient, mpp, organ, "
        "scanner where known), separated by commas"
    )
    out: Path = Field(description="the csv to write; unchanged slides of an older one are kept")
    mpp: float | None = Field(
        None, ge=0.05, le=10, description="µm per level-0 px of all slides that state none"
    )
    patient: str = Field(
        TCGA,
        description="regular expression with one group, searched in the file name, for slides "
        "whose patient no table gives",
    )
    organ: str = Field("", description="organ of all slides for which no table gives one")
    workers: int = Field(2, ge=0, description="processes that open slides; 0: this one")

    _one_group = field_validator("patient")(one_group)


def run(cfg: Manifest) -> Path:
    """Write the manifest and return its path.

    Raises:
        UserError: no slide was found, or none can be read (the csv then says why for each).
    """
    from tqdm import tqdm

    found = _sources(cfg)
    if not found:
        raise UserError(f"data={cfg.data} has no slide; known endings are {' '.join(ENDINGS)}.")
    cfg.out.parent.mkdir(parents=True, exist_ok=True)
    note = cfg.out.with_name(f"{cfg.out.name}.partial")
    known = older_rows(cfg.out) | older_rows(note)
    done: dict[str, dict[str, str]] = {}
    saved = time.monotonic()
    stale = []
    for path in found:
        old = known.get(path)
        if (
            old
            and old["status"] != "unreadable"
            and _stamp(Path(path)) == (old["bytes"], old["mtime_ns"])
        ):
            done[path] = old
        else:
            stale.append(path)
    with tqdm(total=len(found), initial=len(done), unit="slide", disable=None) as bar:
        for path, facts, problem in in_processes(inspect, stale, workers=cfg.workers):
            done[path] = facts or {"status": "unreadable", "reason": problem}
            bar.update()
            if time.monotonic() - saved > SAVE_EVERY:
                rows = [_row(cfg, p, found[p], done[p]) for p in found if p in done]
                write_atomic(note, as_csv(rows))
                saved = time.monotonic()
    rows = [_row(cfg, path, given, done[path]) for path, given in found.items()]
    _mark_twins(rows)
    write_atomic(cfg.out, as_csv(rows))
    note.unlink(missing_ok=True)
    _tell(cfg, rows, kept=len(found) - len(stale))
    return cfg.out


def inspect(name: str) -> dict[str, str]:
    """The columns of a row that the file alone decides."""
    path = Path(name)
    stamp = _stamp(path)
    facts = read_facts(path)
    width, height = facts.sizes[0]
    return {
        "width": str(width),
        "height": str(height),
        "levels": str(len(facts.sizes)),
        "file_mpp": "" if facts.mpp is None else f"{facts.mpp:.6g}",
        "vendor": facts.vendor,
        "scanner": facts.scanner,
        "bytes": stamp[0],
        "mtime_ns": stamp[1],
        "checksum": checksum(path),
        "status": "ok",
        "reason": "",
    }


def checksum(path: Path) -> str:
    """blake2b of the file's size and its first and last MiB: enough to notice another file, fast.

    A bit that flips in the middle of a slide is not seen.
    """
    digest = hashlib.blake2b(digest_size=16)
    size = path.stat().st_size
    digest.update(str(size).encode())
    table = path.with_suffix("") / "Slidedat.ini"
    if table.is_file():  # the .mrxs file itself is but a small picture
        digest.update(table.read_bytes())
    with path.open("rb") as file:
        digest.update(file.read(ENDS_BYTES))
        if size > ENDS_BYTES:
            file.seek(max(ENDS_BYTES, size - ENDS_BYTES))
            digest.update(file.read(ENDS_BYTES))
    return digest.hexdigest()


def _sources(cfg: Manifest) -> dict[str, dict[str, str]]:
    """Path of every slide -> what a table says about it; folders are walked, each file once."""
    words = [cfg.data] if isinstance(cfg.data, str) and Path(cfg.data).exists() else cfg.data
    if isinstance(words, str):
        words = [word.strip() for word in words.split(",") if word.strip()]
    found: dict[str, dict[str, str]] = {}
    for word in words:
        place = _steady(Path(word))
        if place.is_dir():
            for path in sorted(place.rglob("*")):
                hidden = any(part.startswith(".") for part in path.relative_to(place).parts)
                drawn = (path.parent / "check.json").is_file()  # the pictures of prep check
                if path.suffix.lower() in ENDINGS and path.is_file() and not (hidden or drawn):
                    found.setdefault(str(path), {})
        elif place.suffix.lower() == ".csv":
            for row in read_csv(place):
                if not row.get("path"):
                    raise UserError(f"{place} needs a column 'path', filled in every row.")
                path = _steady(place.parent / row["path"])  # an absolute one stays what it is
                given = {key: row[key] for key in GIVEN if row.get(key)}
                read_number(given.get("mpp"), place)
                found[str(path)] = found.get(str(path), {}) | given
        elif place.is_file():
            found.setdefault(str(place), {})
        else:
            raise UserError(f"data={word} is not there; give a folder, a csv or a slide.")
    return found


def _steady(path: Path) -> Path:
    """Absolute, folders resolved; the last name is kept, since links name slides in many places."""
    return path.resolve() if path.is_dir() else path.parent.resolve() / path.name


def _stamp(path: Path) -> tuple[str, str]:
    """Size and time of change; empty where the file is gone."""
    try:
        about = path.stat()
    except OSError:
        return "", ""
    return str(about.st_size), str(about.st_mtime_ns)


def _row(cfg: Manifest, name: str, given: dict[str, str], facts: dict[str, str]) -> dict[str, str]:
    """One row: the file's columns, and those that words and tables decide."""
    path = Path(name)
    size, mtime = _stamp(path)
    row: dict[str, str] = dict.fromkeys(COLUMNS, "") | {"bytes": size, "mtime_ns": mtime}
    row |= {k: v for k, v in facts.items() if k in COLUMNS}
    match = re.search(cfg.patient, path.name)
    guess = (match[1] or "") if match else ""
    row |= {
        "slide": given.get("slide") or path.stem,
        "path": name,
        "patient": given.get("patient") or (guess.upper() if cfg.patient == TCGA else guess),
        "organ": given.get("organ") or cfg.organ,
        "scanner": given.get("scanner") or row["scanner"],
        "mpp": "",
        "mpp_source": "",
    }
    if row["status"] == "unreadable":
        return row
    row |= {"status": "ok", "reason": ""}
    stated = read_number(row["file_mpp"], cfg.out)
    try:
        value, source = _mpp(cfg, path, stated, read_number(given.get("mpp"), path))
        row |= {"mpp": f"{value:.6g}", "mpp_source": source}
    except UserError as error:
        row |= {"status": "no mpp", "reason": str(error)}
    return row


def _mpp(
    cfg: Manifest, path: Path, stated: float | None, column: float | None
) -> tuple[float, str]:
    """A table's value goes first, then the file's, then the word for all that have none."""
    if column is not None:
        return choose_mpp(path, stated, column)
    try:
        return choose_mpp(path, stated, None)
    except UserError:
        if cfg.mpp is None:
            raise
        return choose_mpp(path, None, cfg.mpp)


def _mark_twins(rows: Iterable[dict[str, str]]) -> None:
    """A name or a content that stands there twice would put nuclei into a set twice."""
    names: dict[str, str] = {}
    contents: dict[str, str] = {}
    for row in rows:
        if row["status"] == "unreadable":
            continue
        same = contents.setdefault(row["checksum"], row["path"])
        namesake = names.setdefault(row["slide"], row["path"])
        if same != row["path"]:
            row |= {"status": "duplicate", "reason": f"the same file as {same}; leave one out."}
        elif namesake != row["path"]:
            reason = f"{namesake} has the same name; name both in a csv with a column 'slide'."
            row |= {"status": "duplicate", "reason": reason}


def _tell(cfg: Manifest, rows: list[dict[str, str]], *, kept: int) -> None:
    counts = Counter(row["status"] for row in rows)
    good = [row for row in rows if row["status"] == "ok"]
    patients = {row["patient"] for row in good if row["patient"]}
    lost = sum(not row["patient"] for row in good)
    print(
        f"{cfg.out}: {len(rows)} slides: "
        + ", ".join(f"{n} {status}" for status, n in counts.most_common())
        + f"; {len(patients)} patients"
        + (f", {lost} slides without one (give patient=)" if lost else "")
        + (f"; {kept} unchanged since the last run" if kept else "")
    )
    for row in [r for r in rows if r["status"] != "ok"][:5]:
        print(f"  {row['status']}: {row['reason']}")
    if all(row["status"] == "unreadable" for row in rows):
        raise UserError(f"none of the {len(rows)} slides can be read: {rows[0]['reason']}")
