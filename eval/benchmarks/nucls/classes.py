"""Classes of NuCLS on their three levels, and what they are called in files."""

from pathlib import Path

from lemon_muse.errors import UserError

# The authors' maps (github.com/PathologyDataScience/NuCLS, configs/nucleus_style_defaults.py).
RAW_TO_MAIN = {
    "tumor": "tumor_nonMitotic",
    "mitotic_figure": "tumor_mitotic",
    "fibroblast": "nonTILnonMQ_stromal",
    "vascular_endothelium": "nonTILnonMQ_stromal",
    "macrophage": "macrophage",
    "lymphocyte": "lymphocyte",
    "plasma_cell": "plasma_cell",
    "neutrophil": "other_nucleus",
    "eosinophil": "other_nucleus",
    "myoepithelium": "other_nucleus",
    "ductal_epithelium": "other_nucleus",
    "apoptotic_body": "AMBIGUOUS",
    "unlabeled": "AMBIGUOUS",
}
MAIN_TO_SUPER = {
    "tumor_nonMitotic": "tumor_any",
    "tumor_mitotic": "tumor_any",
    "nonTILnonMQ_stromal": "nonTIL_stromal",
    "macrophage": "nonTIL_stromal",
    "lymphocyte": "sTIL",
    "plasma_cell": "sTIL",
    "other_nucleus": "other_nucleus",
    "AMBIGUOUS": "AMBIGUOUS",
}
KNOWN = {
    "raw": set(RAW_TO_MAIN),
    "main": set(MAIN_TO_SUPER),
    "super": set(MAIN_TO_SUPER.values()),
}
COLUMNS = {level: f"{level}_classification" for level in KNOWN}
# Task: level and classes; what a level has beside them is left out.
TASKS: dict[str, tuple[str, tuple[str, ...]]] = {
    "super": ("super", ("tumor_any", "nonTIL_stromal", "sTIL")),
    "super4": ("super", ("tumor_any", "nonTIL_stromal", "sTIL", "other_nucleus")),
    "main": ("main", tuple(n for n in MAIN_TO_SUPER if n not in ("other_nucleus", "AMBIGUOUS"))),
    "raw": ("raw", tuple(n for n in RAW_TO_MAIN if n != "unlabeled")),
}
# The level of a label map, and its names by number.
LabelMap = tuple[str, dict[int, str]]


def cleaned(name: str) -> str:
    """Without the prefix of corrected labels; one spelling of the class 'other'."""
    name = name.strip().removeprefix("correction_")
    return "other_nucleus" if name == "other" else name


def coarser(told: dict[str, list[str]]) -> dict[str, list[str]]:
    """All levels that follow; what a file states itself is kept."""
    names = dict(told)
    for fine, coarse, to in (("raw", "main", RAW_TO_MAIN), ("main", "super", MAIN_TO_SUPER)):
        if coarse not in names and fine in names:
            names[coarse] = [to.get(name, name) for name in names[fine]]
    return names


def label_names(root: Path) -> LabelMap:
    """The level of label_map.yaml, 'super', 'main' or 'raw', and its names by number."""
    import yaml

    path = root / "label_map.yaml"
    if not path.is_file():
        raise UserError(f"{path} is missing; it says which class a number is (0: tumor_any, …).")
    try:
        read = yaml.safe_load(path.read_text(encoding="utf-8-sig"))
        names = {int(number): cleaned(str(name)) for number, name in read.items()}
    except (yaml.YAMLError, AttributeError, ValueError, UnicodeDecodeError):
        raise UserError(f"{path} is no map of a number to a class name a line.") from None
    for level in ("super", "main", "raw"):
        if set(names.values()) <= KNOWN[level]:
            return level, names
    wrong = sorted(set(names.values()) - KNOWN["raw"] - KNOWN["main"] - KNOWN["super"])
    raise UserError(
        f"the names of {path} are of no level of NuCLS ({', '.join(wrong) or 'levels are mixed'}); "
        f"use the published ones, such as {', '.join(sorted(KNOWN['super']))}."
    )
