"""The task `atypical` of MIDOG++: atypical against normal mitotic figures.

Layouts, in the order in which they are looked for:

MIDOG25 (Zenodo 16044804), the training set of MIDOG 2025, track 2::

    MIDOG25_Atypical_Classification_Train_Set.csv    image_id,filename,coordinateX,coordinateY,
                                                     Tumor,Scanner,Origin,Species,
                                                     expert1,expert2,expert3,majority
    MIDOG25_Binary_Classification_Train_Set/<image_id>      crops around the figure

or, instead of the crops, the images of MIDOG++, to which filename and coordinates refer.

AMi-Br (github.com/DeepMicroscopy/AMi-Br)::

    AMI-BR.csv                                       …,slide,dataset,uid,x,y,…,majority_atypical
    patches/{normal,atypical}/<dataset>_<uid>.png    crops of 128 px

Two folders of crops, as AtNorM-Br and AtNorM-MD (github.com/DeepMicroscopy/AMi-Br_Benchmark)::

    Atypical/*.png   Normal/*.png
"""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from eval.benchmarks import Request
from eval.benchmarks.midogpp.crops import CLASSES, Rows, folder_of, once, read_crops, table_of
from eval.benchmarks.midogpp.files import (
    Found,
    number_of,
    read_csv,
    read_slides,
    right_place,
    scanner,
    species,
    tumour,
)
from eval.benchmarks.midogpp.images import (
    BREAST,
    clamp,
    describe_area,
    describe_mpp,
    find_images,
    measure,
    scanner_of,
)
from eval.benchmarks.midogpp.mitosis import PUBLISHED as FIGURES
from lemon_muse.errors import UserError

SHAPE = (
    "MIDOG25_Atypical_Classification_Train_Set.csv with its crops, AMI-BR.csv with patches/, or "
    "the folders Atypical and Normal"
)
MIDOG25 = ("image_id", "filename", "coordinateX", "coordinateY", "majority")
AMI_BR = ("slide", "dataset", "uid", "majority_atypical")
CROPS = "MIDOG25_Binary_Classification_Train_Set"
VOTES = ("expert1", "expert2", "expert3")
# Normal and atypical figures as listed. MIDOG25 lists one crop four times, see docs.
PUBLISHED = {"MIDOG25": (10191, 1748), "AMi-Br": (2888, 832)}


def find_layout(root: Path) -> tuple[str, Path] | None:
    """('MIDOG25' | 'AMi-Br', csv) or ('folders', root) or None."""
    for path in sorted(root.glob("*.csv")):
        with path.open(encoding="utf-8-sig", errors="replace") as stream:
            header = set(stream.readline().strip().split(","))
        if header.issuperset(MIDOG25):
            return "MIDOG25", path
        if header.issuperset(AMI_BR):
            return "AMi-Br", path
    # Beneath patches/ the folders are AMi-Br's, whose csv says what belongs to which slide.
    if root.name != "patches" and len(_folders(root)) == 2:
        return "folders", root
    return None


def read_atypical(root: Path, request: Request) -> Found:
    """Atypical and normal figures, none twice.

    Raises:
        UserError: the wrong folder, a damaged file, no image, an unknown resolution.
    """
    right_place(root, find_layout, shape=SHAPE)
    found = find_layout(root)
    assert found is not None
    layout, path = found
    if layout == "MIDOG25":
        return _read_midog25(root, path, request)
    return _read_ami_br(root, path, request) if layout == "AMi-Br" else _read_folders(root, request)


def _read_midog25(root: Path, path: Path, request: Request) -> Found:
    listed = read_csv(path, MIDOG25)
    labels = _labels(path, [row["majority"] for row in listed], {"NMF": 0, "AMF": 1})
    rows = Rows(
        [row["image_id"] for row in listed],
        labels,
        [row["filename"] for row in listed],
        [Path(row["filename"]).stem for row in listed],
        [scanner(row.get("Scanner", "")) for row in listed],
    )
    domain = [tumour(row.get("Tumor", "")) for row in listed]
    groups = {
        "domain": domain,
        "scanner": rows.scanner,
        "origin": [row.get("Origin", "") for row in listed],
        "species": [species(name) for name in domain],
    }
    rows.groups = {name: values for name, values in groups.items() if all(values)}
    facts = [*_compare("MIDOG25", path, labels), *_tumours(listed), *_votes(path, listed)]
    crops = folder_of([root / CROPS, root / CROPS / CROPS], rows.name)
    if crops:
        return read_crops(rows, crops, request, facts, where=str(root / CROPS))
    return _read_regions(root, path, listed, rows, request, facts)


def _read_regions(
    root: Path,
    path: Path,
    listed: list[dict[str, str]],
    rows: Rows,
    request: Request,
    facts: list[str],
) -> Found:
    """Figures at their coordinates in the images of MIDOG++."""
    slides = list(dict.fromkeys(rows.slide))
    files = find_images((root, root / "images"), slides)
    if not files:
        raise UserError(
            f"neither the crops of {path.name} (in {root / CROPS}) nor the images of MIDOG++ that "
            f"it refers to ({slides[0]} …, in {root} or {root / 'images'}) are there."
        )
    scanners = dict(zip(rows.slide, rows.scanner, strict=True))
    images = measure(files, slides=read_slides(root), scanners=scanners, given=request.image_mpp)
    try:
        xy = np.array([(float(r["coordinateX"]), float(r["coordinateY"])) for r in listed])
    except ValueError as error:
        raise UserError(f"{path} has something else than numbers ({error}).") from None
    keys = [f"{name} {x:g} {y:g}" for name, (x, y) in zip(rows.slide, xy.tolist(), strict=True)]
    keep, notes = once(keys, rows.label, keys, what="listed places")
    there = [i for i in keep if rows.slide[i] in images]
    if len(images) < len(slides):
        lacking = next(name for name in slides if name not in images)
        notes.append(
            f"{len(slides) - len(images)} of {len(slides)} images are missing, the first is "
            f"{lacking}; their {len(keep) - len(there)} figures are left out."
        )
    rows = rows.take(there)
    mine = [images[name] for name in rows.slide]
    x, y, outside = clamp(xy[there, 0], xy[there, 1], mine)
    if outside:
        notes.append(f"{outside} figures lie outside of the image and are moved onto its border.")
    facts += describe_mpp(images.values(), request.image_mpp) + describe_area(images.values())
    return Found(table_of(rows, mine, x, y), notes, facts)


def _read_ami_br(root: Path, path: Path, request: Request) -> Found:
    listed = read_csv(path, AMI_BR)
    words = [row["majority_atypical"].lower() for row in listed]
    labels = _labels(path, words, {"false": 0, "true": 1, "0": 0, "1": 1})
    dataset = [row["dataset"] for row in listed]
    slides = [row["slide"] for row in listed]
    rows = Rows(
        [f"{row['dataset']}_{row['uid']}.png" for row in listed],
        labels,
        [f"{a} {b}" for a, b in zip(dataset, slides, strict=True)],
        [f"{a} {Path(b).stem}" for a, b in zip(dataset, slides, strict=True)],
        # The slides of MIDOG21 are the breast slides of MIDOG++; nothing is known of TUPAC16's.
        [
            scanner_of(number_of(b), BREAST) if a == "MIDOG21" else ""
            for a, b in zip(dataset, slides, strict=True)
        ],
        {"dataset": dataset},
    )
    crops: dict[str, Path] = {}
    kinds: dict[str, int] = {}
    for kind, folder in enumerate(_folders(root / "patches")):
        there = {path.name: path for path in sorted(folder.iterdir())}
        crops |= there
        kinds |= dict.fromkeys(there, kind)
    facts = _compare("AMi-Br", path, labels)
    other = [n for n, label in zip(rows.name, labels, strict=True) if kinds.get(n, label) != label]
    if other:
        facts.append(
            f"{len(other)} crops lie in the folder of the other class than {path.name} says, the "
            f"first is {other[0]}; the csv counts."
        )
    where = f"{root / 'patches'}, in normal and atypical"
    return read_crops(rows, crops, request, facts, where=where)


def _read_folders(root: Path, request: Request) -> Found:
    rows = Rows()
    crops: dict[str, Path] = {}
    for kind, folder in enumerate(_folders(root)):
        for path in sorted(folder.iterdir()):
            if path.suffix.lower() in (".png", ".jpg", ".jpeg", ".tif", ".tiff"):
                crops[f"{folder.name}/{path.name}"] = path
                rows.label.append(kind)
    rows.name = rows.slide = rows.patient = list(crops)
    rows.scanner = [""] * len(rows.name)
    found = read_crops(rows, crops, request, [], where=str(root))
    note = (
        f"nothing says from which slide the crops in {root} are: each is taken for a patient of "
        f"its own, so folds are random and cells of one patient may stand on both sides."
    )
    return Found(found.table, [note, *found.notes], found.facts)


def _folders(root: Path) -> list[Path]:
    """The folders of normal and of atypical figures, whatever their case; [] without both."""
    there = {path.name.lower(): path for path in root.iterdir()} if root.is_dir() else {}
    both = [there.get(name) for name in CLASSES]
    return [path for path in both if path is not None and path.is_dir()] if all(both) else []


def _labels(path: Path, words: Sequence[str], meaning: dict[str, int]) -> list[int]:
    for line, word in enumerate(words, start=2):
        if word not in meaning:
            raise UserError(
                f"{path}, line {line}, has the class '{word}'; it must be {' or '.join(meaning)}."
            )
    if len(set(words)) < 2:
        raise UserError(f"{path} has figures of one class only; fetch it again.")
    return [meaning[word] for word in words]


def _compare(name: str, path: Path, labels: Sequence[int]) -> list[str]:
    found = (len(labels) - sum(labels), sum(labels))
    if found == PUBLISHED[name]:
        return []
    return [
        f"{path.name} lists {found[0]} normal and {found[1]} atypical figures; published for "
        f"{name} are {PUBLISHED[name][0]} and {PUBLISHED[name][1]}."
    ]


def _tumours(listed: Sequence[dict[str, str]]) -> list[str]:
    """Places listed per tumour type: every mitotic figure of MIDOG++ is in the list."""
    places = {(row["filename"], row["coordinateX"], row["coordinateY"]): row for row in listed}
    found = Counter(tumour(row.get("Tumor", "")) for row in places.values())
    known = {name: mitotic for name, (mitotic, _) in FIGURES["MIDOG++"][1].items()}
    return [
        f"{name}: {found[name]} figures are listed; MIDOG++ has {known.get(name, 0)}."
        for name in sorted({*known, *found} - {""})
        if found[name] != known.get(name, 0)
    ]


def _votes(path: Path, listed: Sequence[dict[str, str]]) -> list[str]:
    """Rows whose majority is not that of the votes; a third vote is there only after a tie."""
    odd = []
    for row in listed:
        votes = [row.get(name, "") for name in VOTES]
        atypical, normal = votes.count("AMF"), votes.count("NMF")
        if atypical != normal and (row["majority"] == "AMF") != (atypical > normal):
            odd.append(row["image_id"])
    if not odd:
        return []
    return [
        f"in {len(odd)} rows of {path.name} the column majority is not what most experts said, the "
        f"first is {odd[0]}; the column counts."
    ]
