"""What a folder of NuCLS has that the published data has not, and the other way round."""

from collections import Counter
from itertools import chain
from pathlib import Path

from eval.benchmarks import Request
from eval.benchmarks.nucls.classes import KNOWN, MAIN_TO_SUPER, RAW_TO_MAIN, TASKS
from eval.benchmarks.nucls.files import LEMON_HALF, Files, barcode, read
from eval.benchmarks.nucls.folds import FOLDS, Folds, read_folds

# Of the release: fields, slides and hospitals; fields that each official fold tests; nuclei. The
# last two were counted on the release by others (dataset minhanhto09/NuCLS_dataset, Hugging Face).
PLACES = {"fields": 1744, "slides": 124, "hospitals": 18}
TESTED = (263, 505, 405, 294, 277)
RELEASE = {
    "tumor_any": 21296,
    "sTIL": 19192,
    "nonTIL_stromal": 10486,
    "AMBIGUOUS": 7911,
    "other_nucleus": 600,
}
# Of the early drop v4_2020-04-05, counted on its sqlite: the only counts of finer classes.
EARLY = {
    "tumor": 21071,
    "lymphocyte": 13640,
    "fibroblast": 8628,
    "unlabeled": 7526,
    "plasma_cell": 5585,
    "macrophage": 1354,
    "vascular_endothelium": 512,
    "ductal_epithelium": 498,
    "apoptotic_body": 396,
    "mitotic_figure": 229,
    "myoepithelium": 54,
    "neutrophil": 45,
    "eosinophil": 3,
}
# Of the example in CellViT++'s repository, counted on its files.
EXAMPLE_IMAGES = 15
EXAMPLE = {"tumor_any": 89, "nonTIL_stromal": 95, "sTIL": 323, "other_nucleus": 77}
# LEMON (arXiv 2603.25802), table 3, in the order of the task's classes.
LEMON = (16052, 7613, 13642)


def differences(root: Path, request: Request) -> list[str]:
    """One sentence each; nothing where the folder is the release.

    Raises:
        UserError: as `nucls_files.read` and `read_folds`.
    """
    files = read(root)
    if files.form == "detection":
        return _halves(files) + _rows(files) + _detection(files, request)
    said = _halves(files) + _rows(files) + _counts(files) + _folds(files, read_folds(root))
    if request.protocol == "paper":
        kept = Counter(
            name
            for fov in files.fovs
            for name, whole in zip(fov.names["super"], fov.inside(LEMON_HALF), strict=True)
            if whole
        )
        classes = TASKS["super"][1]
        said.append(
            f"protocol=paper keeps {', '.join(f'{kept[name]} {name}' for name in classes)}, where "
            f"LEMON counts {', '.join(map(str, LEMON))}; its filter is inferred from these counts."
        )
    return said


def _halves(files: Files) -> list[str]:
    """Files without their other half, and images without nuclei."""
    empty = [fov.path.name for fov in files.fovs if not len(fov.points)]
    return [
        f"{len(names)} {what}, the first is {names[0]}."
        for names, what in (
            (files.no_image, "csvs have no image"),
            (files.no_labels, "images have no csv"),
            (empty, "images have no nucleus"),
        )
        if names
    ]


def _rows(files: Files) -> list[str]:
    """Nuclei outside their image, class names that NuCLS lacks or that contradict each other."""
    said = []
    outside = {fov.path.name: int((~fov.inside()).sum()) for fov in files.fovs}
    if any(outside.values()):
        first = next(name for name, n in outside.items() if n)
        said.append(
            f"{sum(outside.values())} nuclei lie outside their image and are left out, the first "
            f"in {first}."
        )
    stated = [(fov, level) for fov in files.fovs for level in fov.stated]
    names = Counter(chain(*(fov.names[level] for fov, level in stated)))
    unknown = {name: n for name, n in names.items() if not any(name in k for k in KNOWN.values())}
    if unknown:
        told = ", ".join(f"'{name}' ({n} rows)" for name, n in sorted(unknown.items()))
        said.append(f"NuCLS has no class {told}; such nuclei are left out.")
    against: Counter[str] = Counter()
    for fine, coarse, to in (("raw", "main", RAW_TO_MAIN), ("main", "super", MAIN_TO_SUPER)):
        for fov in files.fovs:
            if fine in fov.stated and coarse in fov.stated:
                pairs = zip(fov.names[fine], fov.names[coarse], strict=True)
                against.update(f"{a} is {b}" for a, b in pairs if to.get(a, b) != b)
    if against:
        said.append(
            f"{sum(against.values())} nuclei contradict the published maps of classes, such as "
            f"'{next(iter(against))}'."
        )
    return said


def _counts(files: Files) -> list[str]:
    """Places and classes against the release and the early drop."""
    said = []
    codes = [barcode(fov.path.stem) or ("", "", "") for fov in files.fovs]
    places = {
        "fields": len(codes),
        "slides": len({code[0] for code in codes}),
        "hospitals": len({code[2] for code in codes}),
    }
    if places != PLACES:
        said.append(f"there are {_listed(places, PLACES)}; published are {_listed(PLACES)}.")
    raw = Counter(chain(*(fov.names.get("raw", []) for fov in files.fovs)))
    coarse = Counter(chain(*(fov.names["super"] for fov in files.fovs)))
    if all(raw[name] == n for name, n in EARLY.items()):
        said.append(
            f"the nuclei are those of the early drop of 2020-04-05, {sum(EARLY.values())} in all, "
            f"and not of the release, {sum(RELEASE.values())}."
        )
    elif any(coarse[name] != n for name, n in RELEASE.items()):
        said.append(f"there are {_listed(coarse, RELEASE)}; published are {_listed(RELEASE)}.")
    other = [fov.path.name for fov in files.fovs if not fov.path.name.startswith("TCGA")]
    if other:
        said.append(
            f"{len(other)} images have a prefix before the barcode, the first is {other[0]}: they "
            f"are of the multi-rater release, whose rows repeat nuclei."
        )
    return said


def _folds(files: Files, folds: Folds) -> list[str]:
    if folds.missing:
        return [
            f"the official folds lack {', '.join(folds.missing)}, so that the default folds are "
            f"made from the hospitals."
        ]
    said = []
    codes = [code for code in (barcode(fov.path.stem) for fov in files.fovs) if code]
    here = {code[0] for code in codes}
    tests = Counter(folds.tested.get(code[0], 0) for code in codes)
    tested = tuple(tests[k] for k in range(1, FOLDS + 1))
    if tested != TESTED:
        said.append(
            f"the official folds test {', '.join(map(str, tested))} fields; published are "
            f"{', '.join(map(str, TESTED))}."
        )
    for names, what in (
        (sorted(here - folds.tested.keys()), "slides are in no official fold and are left out"),
        (sorted(folds.tested.keys() - here), "slides of the official folds have no image"),
        (folds.untrained, "slides are lacking in train lists, and are trained on all the same"),
    ):
        if names:
            said.append(f"{len(names)} {what}, the first is {names[0]}.")
    homes: dict[str, set[int]] = {}
    for slide, k in folds.tested.items():
        homes.setdefault(slide.split("-")[1], set()).add(k)
    split = sorted(hospital for hospital, found in homes.items() if len(found) > 1)
    if split:
        said.append(f"{len(split)} hospitals are tested in more than one fold: {', '.join(split)}.")
    return said


def _detection(files: Files, request: Request) -> list[str]:
    said = []
    if request.image_mpp is None:
        said.append("the files do not state the µm per pixel: pass image_mpp=.")
    if not all(barcode(fov.path.stem) for fov in files.fovs):
        said.append(
            "the patients are unknown, so that each image counts as one, and the same patient may "
            "be in train and test."
        )
    homes: dict[str, set[str]] = {}
    for fov in files.fovs:
        code = barcode(fov.path.stem)
        homes.setdefault(code[1] if code else str(fov.path), set()).add(fov.split)
    shared = sorted(patient for patient, splits in homes.items() if len(splits) > 1)
    if shared:
        said.append(
            f"{len(shared)} patients are in train and test, the first is {shared[0]}, so that the "
            f"default folds are made from the hospitals."
        )
    counts = Counter(chain(*(fov.names["super"] for fov in files.fovs)))
    images = {split: sum(fov.split == split for fov in files.fovs) for split in ("train", "test")}
    if len(files.fovs) != EXAMPLE_IMAGES or any(counts[name] != n for name, n in EXAMPLE.items()):
        said.append(
            f"there are {images['train']} train and {images['test']} test images with "
            f"{_listed(counts, EXAMPLE)}; the published example has {EXAMPLE_IMAGES} with "
            f"{_listed(EXAMPLE)}, and of the whole set nothing is published."
        )
    share = counts["other_nucleus"] / max(1, sum(counts.values()))
    if share > 0.05 and not counts["AMBIGUOUS"]:
        # The example's own notebook calls the label so.
        said.append(
            f"{share:.0%} of the nuclei are called other_nucleus, in the release 1 %, where 13 % "
            f"are AMBIGUOUS: the label probably means those, and super4 has no meaning here."
        )
    return said


def _listed(counts: dict[str, int], names: dict[str, int] | None = None) -> str:
    return ", ".join(f"{counts.get(name, 0)} {name}" for name in names or counts)
