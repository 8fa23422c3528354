"""`lemon-muse generate`: tissue with known nuclei, where no real data is at hand."""

from pathlib import Path
from typing import Literal

from pydantic import Field

from lemon_muse.config import Config


class Generate(Config):
    """Draw labelled H&E-like tissue as a folder of images; killed, the same words go on."""

    out: Path = Field(description="folder that is written, in the layout 'folder'")
    slides: int = Field(40, ge=3, description="slides, an image each")
    side: int = Field(1024, ge=64, description="side of an image, px")
    mpp: float = Field(0.25, gt=0, description="µm per pixel")
    seed: int = Field(0, ge=0, description="another seed gives other patients")
    scanners: Literal["mixed", "shifted"] = Field(
        "mixed",
        description="mixed: four scanners in every split; shifted: out has one scanner, and "
        "out/shifted the same but for test, which another laboratory stained and scanned",
    )


def run(cfg: Generate) -> Path:
    """Write the folder and return it.

    Raises:
        UserError: too few slides, or a folder that holds tissue of other settings.
    """
    from lemon_muse.synthetic import write_images
    from lemon_muse.synthetic.shift import SHIFTED, write_shifted

    write = write_shifted if cfg.scanners == "shifted" else write_images
    write(cfg.out, slides=cfg.slides, side=cfg.side, mpp=cfg.mpp, seed=cfg.seed)
    print(f"{cfg.slides} slides of generated tissue: {cfg.out}")
    if cfg.scanners == "shifted":
        print(f"the same, test under another scanner: {cfg.out / SHIFTED}")
    return cfg.out
