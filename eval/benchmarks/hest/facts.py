"""What is published about the slides of HEST-1k that LEMON uses, and what differs from it.

Sizes, mpp and patients are from HEST_v1_1_0.csv. Its column `patient` counts anew in every study
and numbers the samples of the lung study, not its donors: who belongs together is read off
`subseries`, where VUILD96LF and VUILD96MF are the less and the more fibrotic piece of one lung.
"""

import csv
from pathlib import Path

from eval.benchmarks.hest.counts import Summary

# Slide ids of each task [LEMON].
SLIDES = {
    "bowel": ("TENX149", "TENX148", "TENX147", "TENX139", "TENX111"),
    "breast": ("NCBI783", "NCBI785", "TENX94", "TENX95", "TENX98"),
    "lung": tuple(
        f"NCBI{number}"
        for number in (*range(856, 862), *range(864, 868), 870, 873, 875, 876, *range(879, 885))
    ),
}

# Slides of one patient; of some the second one belongs to no task.
LINKED = (
    ("TENX95", "TENX97"),
    ("TENX94", "TENX96"),
    ("TENX98", "TENX99"),
    ("NCBI784", "NCBI785"),
    ("NCBI856", "NCBI857"),  # VUILD96LF, VUILD96MF
    ("NCBI858", "NCBI859"),  # VUILD91LF, VUILD91MF
    ("NCBI860", "NCBI861"),  # VUILD78LF, VUILD78MF
    ("NCBI875", "NCBI876"),  # VUHD116B, VUHD116A
    ("NCBI881", "NCBI882"),  # TILD117LF, TILD117MF
)

# Width and height in level-0 px, µm per pixel.
SIZES = {
    "TENX149": (70534, 60222, 0.2740),
    "TENX148": (75184, 48582, 0.2738),
    "TENX147": (71082, 66226, 0.2497),
    "TENX139": (21507, 40815, 0.2737),
    "TENX111": (26909, 43090, 0.2738),
    "NCBI783": (21227, 31943, 0.2740),
    "NCBI785": (30786, 24241, 0.3639),
    "TENX94": (48511, 41405, 0.2125),
    "TENX95": (48376, 53738, 0.2125),
    "TENX98": (51458, 111225, 0.2125),
    "NCBI856": (17136, 24809, 0.2125),
    "NCBI857": (19964, 24815, 0.2125),
    "NCBI858": (14306, 12484, 0.2125),
    "NCBI859": (17140, 16592, 0.2125),
    "NCBI860": (19969, 16597, 0.2125),
    "NCBI861": (17137, 16596, 0.2125),
    "NCBI864": (25624, 33047, 0.2125),
    "NCBI865": (28454, 28935, 0.2125),
    "NCBI866": (19966, 20710, 0.2125),
    "NCBI867": (28462, 33048, 0.2125),
    "NCBI870": (17135, 16593, 0.2125),
    "NCBI873": (17134, 20714, 0.2125),
    "NCBI875": (17132, 12491, 0.2125),
    "NCBI876": (14301, 16598, 0.2125),
    "NCBI879": (14312, 16598, 0.2125),
    "NCBI880": (17141, 16594, 0.2125),
    "NCBI881": (19973, 16596, 0.2125),
    "NCBI882": (17141, 20708, 0.2125),
    "NCBI883": (17145, 16597, 0.2125),
    "NCBI884": (25630, 28964, 0.2125),
}
MPP_DIGITS = 5e-4  # the table above is rounded
HOMELESS = 0.05  # share of transcripts without an outlined cell that is worth a word


def patients(slides: list[str]) -> dict[str, str]:
    """The patient of each slide: its id, or the ids of all these slides of one patient with '+'."""
    together = {name: group for group in LINKED for name in group}
    return {
        name: "+".join(sorted(set(together.get(name, (name,))) & set(slides))) for name in slides
    }


def differing(name: str, size: tuple[int, int], mpp: float, root: Path) -> list[str]:
    """Where the image size (width, height) and mpp of a slide are not the published ones."""
    width, height, published = SIZES[name]
    said = []
    if size != (width, height):
        said.append(
            f"wsis/{name}.tif is {size[0]} x {size[1]} px; published are {width} x {height} px."
        )
    if abs(mpp - published) > MPP_DIGITS:
        said.append(f"{name} has {mpp:.4f} µm per pixel; published are {published:.4f}.")
    for file in sorted(root.glob("HEST_v*.csv")):
        said += _against_index(file, name, size, mpp)
    return said


def _against_index(file: Path, name: str, size: tuple[int, int], mpp: float) -> list[str]:
    """As `differing`, against an index of HEST, which starts with a byte order mark."""
    try:
        with file.open(encoding="utf-8-sig", newline="") as stream:
            rows = [row for row in csv.DictReader(stream) if row.get("id") == name]
        if not rows:
            return [f"{file.name} does not list {name}."]
        stated = float(rows[0]["pixel_size_um_estimated"])
        sides = (int(rows[0]["fullres_px_width"]), int(rows[0]["fullres_px_height"]))
    except (OSError, ValueError, KeyError, TypeError, csv.Error) as error:
        return [f"{file.name} says nothing usable about {name} ({error!r})."]
    said = []
    if sides != size:
        said.append(
            f"{file.name} says that {name} has {sides[0]} x {sides[1]} px, the tif "
            f"{size[0]} x {size[1]} px."
        )
    if abs(stated - mpp) > MPP_DIGITS:
        said.append(
            f"{file.name} says that {name} has {stated:.4f} µm per pixel, its metadata {mpp:.4f}."
        )
    return said


def left_out(summaries: dict[str, Summary], outside: dict[str, int]) -> list[str]:
    """What of the slides does not enter the table, one sentence a reason."""
    said = []
    lost = {name: n for name, n in outside.items() if n}
    if lost:
        listed = ", ".join(f"{name} {n}" for name, n in lost.items())
        said.append(f"nuclei outside the image are left out: {listed}.")
    total = sum(summary.nuclei for summary in summaries.values())
    silent = sum(summary.silent for summary in summaries.values())
    if silent:
        said.append(f"{silent} of {total} nuclei have no counted transcript and are left out.")
    shapeless = sum(summary.shapeless for summary in summaries.values())
    if shapeless:
        said.append(f"{shapeless} outlines are empty and are left out.")
    for name, summary in summaries.items():
        if not summary.nuclear:
            said.append(
                f"{name} has no column overlaps_nucleus: all transcripts of its cells count, not "
                f"only those inside nuclei."
            )
        share = summary.homeless / (summary.homeless + summary.counted)
        if share > HOMELESS:
            said.append(
                f"{name}: {100 * share:.0f} % of the transcripts belong to cells without an "
                f"outline: transcripts and outlines may be of different versions."
            )
    return said
