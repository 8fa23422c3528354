"""The task `mitosis` of MIDOG++: mitotic figures against imposters, from lists and large images."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from eval.benchmarks import Request
from eval.benchmarks.midogpp.files import (
    SLIDES,
    Found,
    NucleusList,
    find_list,
    number_of,
    read_list,
    read_slides,
    right_place,
    species,
)
from eval.benchmarks.midogpp.images import (
    Image,
    clamp,
    compare_sizes,
    describe_area,
    describe_mpp,
    find_images,
    measure,
    scanner_of,
)
from lemon_muse.data.table import Table
from lemon_muse.errors import UserError

Slides = dict[int, dict[str, str]] | None

CLASSES = ("imposter", "mitotic figure")
SHAPE = "MIDOG++.json (or MIDOGpp.json, MIDOGpp.csv) and the images, 001.tiff to 553.tiff"
# Labelled images, then mitotic figures and imposters of every tumour type, counted on the lists.
PUBLISHED = {
    "MIDOG++": (
        503,
        {
            "canine cutaneous mast cell tumor": (2327, 1366),
            "canine lung cancer": (855, 951),
            "canine lymphosarcoma": (3959, 4257),
            "canine soft tissue sarcoma": (1286, 2375),
            "human breast cancer": (1721, 2714),
            "human melanoma": (1150, 925),
            "human neuroendocrine tumor": (639, 1761),
        },
    ),
    "MIDOG 2022": (
        354,
        {
            "canine cutaneous mast cell tumor": (2327, 1366),
            "canine lung cancer": (855, 952),
            "canine lymphosarcoma": (3959, 4257),
            "human breast cancer": (1721, 2714),
            "human neuroendocrine tumor": (639, 1762),
        },
    ),
}
# Images, mitotic figures and imposters of the split in datasets_xvalidation.csv.
PUBLISHED_SPLIT = {"train": (392, 9470, 11433), "test": (111, 2467, 2916)}


def read_mitosis(root: Path, request: Request) -> Found:
    """Mitotic figures and imposters; images without any label give no rows.

    Raises:
        UserError: as `MidogPP.load`.
    """
    right_place(root, find_list, shape=SHAPE)
    path = find_list(root)
    assert path is not None
    listed, slides = read_list(path), read_slides(root)
    labelled = list(dict.fromkeys(listed.image.tolist()))
    if slides is not None:
        _check_numbers(listed, slides, labelled)
    places = (root, root / "images", path.parent)
    files = find_images(places, labelled)
    notes = _missing(labelled, files, listed, root)
    scanners = {name: _scanner(name, listed, slides) for name in labelled}
    images = measure(files, slides=slides, scanners=scanners, given=request.image_mpp)
    notes += compare_sizes(images, listed.sizes, path)
    table, outside = _table(listed, images, scanners, slides)
    if outside:
        notes.append(
            f"{outside} nuclei have their centre up to 25 px outside of the image; they are moved "
            f"onto its border."
        )
    facts = [*_compare(listed, slides), *describe_mpp(images.values(), request.image_mpp)]
    facts += describe_area(images.values())
    bare = sorted(set(listed.domain) - set(labelled))
    if bare:
        facts.append(
            f"{len(bare)} images ({bare[0]} to {bare[-1]}) carry no label at all; they are not "
            f"taken for images without mitoses and give no nuclei."
        )
    return Found(table, notes, facts)


def _scanner(name: str, listed: NucleusList, slides: Slides) -> str:
    number = number_of(name)
    if slides is not None and number in slides:
        return slides[number]["Scanner"]
    return scanner_of(number, listed.domain[name])


def _check_numbers(
    listed: NucleusList, slides: dict[int, dict[str, str]], labelled: Sequence[str]
) -> None:
    """Refuse a table of slides that numbers them otherwise: MIDOG 2022 and MIDOG++ do."""
    for name in labelled:
        number, domain = number_of(name), listed.domain[name]
        if number is None or number not in slides:
            raise UserError(f"{SLIDES} lacks the slide {name} of {listed.path}; fetch both again.")
        if domain and slides[number]["Tumor"] != domain:
            raise UserError(
                f"{SLIDES} and {listed.path.name} are of different data sets: slide {number} is "
                f"{slides[number]['Tumor']} in the one and {domain} in the other; MIDOG 2022 has "
                f"other numbers than MIDOG++, so take {SLIDES} away or use the list of MIDOG++."
            )


def _missing(
    labelled: Sequence[str], files: dict[str, Path], listed: NucleusList, root: Path
) -> list[str]:
    lacking = [name for name in labelled if name not in files]
    if len(lacking) == len(labelled):
        raise UserError(
            f"none of the {len(labelled)} labelled images of {listed.path.name} is in {root} or "
            f"{root / 'images'}; the first is {lacking[0]}: put the images there."
        )
    if not lacking:
        return []
    nuclei = int(np.isin(listed.image, lacking).sum())
    return [
        f"{len(lacking)} of {len(labelled)} labelled images are missing, the first is "
        f"{lacking[0]}; their {nuclei} nuclei are left out."
    ]


def _table(
    listed: NucleusList,
    images: dict[str, Image],
    scanners: dict[str, str],
    slides: Slides,
) -> tuple[Table, int]:
    rows = np.flatnonzero(np.isin(listed.image, list(images)))
    names, code = np.unique(listed.image[rows], return_inverse=True)
    found = [images[name] for name in names.tolist()]
    x, y, outside = clamp(listed.x[rows], listed.y[rows], [found[i] for i in code.tolist()])

    def column(values: list[str]) -> np.ndarray:
        return np.array(values, str)[code]

    table = [(slides or {}).get(number_of(name) or 0, {}) for name in names.tolist()]
    domain = [listed.domain[name] for name in names.tolist()]
    groups = {
        "domain": domain,
        "scanner": [scanners[name] for name in names.tolist()],
        "origin": [row.get("Origin", "") for row in table],
        "species": [species(name) for name in domain],
    }
    return Table(
        image=column([str(image.path) for image in found]),
        x=x,
        y=y,
        mpp=np.array([image.mpp for image in found])[code],
        label=listed.label[rows],
        # One image is one case, as far as the publication says.
        patient=column([Path(name).stem for name in names.tolist()]),
        slide=column(names.tolist()),
        split=column([row.get("Dataset", "all") for row in table]),
        classes=CLASSES,
        groups={name: column(values) for name, values in groups.items() if all(values)},
    ), outside


def _compare(listed: NucleusList, slides: Slides) -> list[str]:
    """Counts of the list against the published ones."""
    set_name = "MIDOG 2022" if "2022" in listed.path.name else "MIDOG++"
    images, published = PUBLISHED[set_name]
    labelled = set(listed.image.tolist())
    said = []
    if len(labelled) != images:
        said.append(
            f"{listed.path.name} labels {len(labelled)} images; {set_name} has {images} of them."
        )
    domain = np.array([listed.domain[name] for name in listed.image.tolist()], str)
    for name in sorted({*published, *domain.tolist()} if all(domain.tolist()) else ()):
        mitotic, imposters = _counts(listed.label[domain == name])
        known = published.get(name, (0, 0))
        if (mitotic, imposters) != known:
            said.append(
                f"{name}: {mitotic} mitotic figures and {imposters} imposters are listed; "
                f"published are {known[0]} and {known[1]}."
            )
    if not all(domain.tolist()):
        (mitotic, imposters), (known_m, known_i) = (
            _counts(listed.label),
            map(sum, zip(*published.values(), strict=True)),
        )
        said.append(
            f"{listed.path.name} names no tumour types: {mitotic} mitotic figures and {imposters} "
            f"imposters are listed; published are {known_m} and {known_i}."
        )
    for split, (count, known_m, known_i) in PUBLISHED_SPLIT.items() if slides else ():
        names = [n for n in labelled if (slides or {})[number_of(n) or 0]["Dataset"] == split]
        mitotic, imposters = _counts(listed.label[np.isin(listed.image, names)])
        if (len(names), mitotic, imposters) != (count, known_m, known_i):
            said.append(
                f"{split} has {len(names)} images with {mitotic} mitotic figures and {imposters} "
                f"imposters; published are {count} with {known_m} and {known_i}."
            )
    return said


def _counts(label: np.ndarray) -> tuple[int, int]:
    return int((label == 1).sum()), int((label == 0).sum())
