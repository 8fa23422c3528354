"""The same tissue under two laboratories: what a change of scanner and stain alone does.

Every slide is drawn for laboratory A; the test slides are drawn a second time for laboratory B:
the same nuclei in the same places, another bath (more hematoxylin, less eosin) and another scanner
(colder white, darker and paler tone, more blur and noise, no sharpening, stronger JPEG). So there
are two benchmarks with the same training and validation images: A against A, and A against B.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from lemon_muse.errors import UserError
from lemon_muse.synthetic import optics
from lemon_muse.synthetic.draw import World, patch, plan
from lemon_muse.synthetic.files import claim, write_image, write_nuclei, write_table

# Of five patients two train, one validates, two test: intervals are over the test patients.
SPLITS = ("train", "test", "val", "train", "test")
SHIFTED = "shifted"  # folder of the second benchmark, inside that of the first


@dataclass(frozen=True)
class Laboratory:
    """A scanner, and how much stronger than a slide's own its two stains are."""

    device: optics.Scanner
    hematoxylin: float
    eosin: float

    def sees(self, world: World) -> np.ndarray:
        """A world's image, uint8 [side, side, 3]; its stain vectors stay those of the slide."""
        own = world.staining
        staining = replace(
            own,
            hematoxylin=own.hematoxylin * self.hematoxylin,
            eosin=own.eosin * self.eosin,
        )
        here = replace(world, staining=staining, device=self.device)
        image = patch(here, x=0, y=0, width=world.side, height=world.side)
        return optics.jpeg(image, self.device)


A = Laboratory(
    optics.Scanner(
        white=np.array([0.965, 0.955, 0.96]),
        gamma=0.95,
        saturation=1.05,
        blur=0.28,
        sharpen=0.4,
        noise=0.004,
        quality=92,
        subsample=False,
    ),
    hematoxylin=1.0,
    eosin=1.0,
)
B = Laboratory(
    optics.Scanner(
        white=np.array([0.915, 0.925, 0.97]),
        gamma=1.2,
        saturation=0.8,
        blur=0.46,
        sharpen=0.0,
        noise=0.012,
        quality=74,
        subsample=True,
    ),
    hematoxylin=1.3,
    eosin=0.75,
)


def write_shifted(
    folder: Path,
    *,
    slides: int,
    side: int,
    mpp: float = 0.25,
    seed: int = 0,
    mitotic_rate: float = 0.03,
) -> None:
    """Write two labelled folders of images: `folder` (A only), `folder`/shifted (test under B).

    One slide a patient; of five patients two train, one validates and two test. The layout is that
    of `write_images`, and so is what happens to a call that was killed. The second folder names
    the images and nuclei of the first, and has its own images of test alone.

    Args:
        folder: made if missing.
        slides: how many, >= 5.
        side: pixels per side of each image.
        mpp: µm per pixel.
        seed: another seed gives other patients.
        mitotic_rate: share of tumour cells in mitosis, 0 to 1.

    Raises:
        UserError: fewer than five slides, an argument of `tissue` outside its range, or a folder
            that holds tissue of other arguments.
        RunError: a file cannot be written.
    """
    if slides < len(SPLITS):
        raise UserError(f"slides={slides} cannot be split by patient: give {len(SPLITS)} or more.")
    arguments = {"side": side, "mpp": mpp, "seed": seed, "mitotic_rate": mitotic_rate}
    claim(folder, {**arguments, "laboratories": 2})
    own, shifted = [], []
    for index in range(slides):
        name, split = f"slide{index:03d}", SPLITS[index % len(SPLITS)]
        image, nuclei = f"images/{name}.png", f"nuclei/{name}.geojson"
        moved = folder / SHIFTED / image if split == "test" else None
        wanted = [folder / image, folder / nuclei, *([moved] if moved else [])]
        if not all(path.is_file() for path in wanted):
            number = seed * 100_003 + index
            world = plan(number, side=side, mpp=mpp, slide=number, scanner=0,
                         mitotic_rate=mitotic_rate, glass=False)  # fmt: skip
            write_image(folder / image, A.sees(world))
            if moved:
                write_image(moved, B.sees(world))
            write_nuclei(folder / nuclei, *world.nuclei(), key=f"{seed}/{name}/{side}/{mpp}")
        facts = (f"../{nuclei}", f"{mpp:g}", split)
        patient = f"patient{index:03d}"
        own.append((name, patient, image, nuclei, f"{mpp:g}", split))
        shifted.append((name, patient, image if moved else f"../{image}", *facts))
    write_table(folder / SHIFTED / "slides.csv", shifted)
    write_table(folder / "slides.csv", own)
