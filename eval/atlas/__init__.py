"""`lemon-muse atlas`: an interactive map of embedded nuclei as a page that works offline."""

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator

from lemon_muse.config import Config

MOST = 100_000


class Atlas(Config):
    """An interactive page of embedded nuclei: map, thumbnails, classes, lasso, neighbours."""

    data: Path = Field(description="an .h5ad file of `lemon-muse embed`, or a folder of them")
    out: Path = Field(
        default=Path("atlas"), description="folder that gets index.html and what belongs to it"
    )
    title: str = Field(default="", description="title of the page; empty: made from the data")
    nuclei: int = Field(
        default=MOST,
        ge=20,
        le=MOST,
        description="most nuclei on the page; of more a share of each slide is drawn",
    )
    projection: Literal["umap", "tsne", "pca"] = Field(
        default="umap", description="2-D projection of the map; umap needs the extra 'embed'"
    )
    colour: tuple[str, ...] = Field(
        default=(),
        description="columns to colour by, separated by commas: of obs (type, slide, cluster, a "
        "number), of a table in obsm (genes) or of X; empty: those of obs",
    )
    neighbours: int = Field(
        default=12, ge=1, le=50, description="nearest nuclei shown for a clicked one"
    )
    slides: Path | None = Field(
        default=None, description="folder to look for slides in that were moved since"
    )
    side: float = Field(
        default=0.0,
        ge=0,
        le=500,
        description="side of a thumbnail in µm; 0: the window that the encoder saw",
    )
    seed: int = Field(default=0, ge=0, description="seed of the draw, the map and the clusters")

    @field_validator("colour", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        if isinstance(value, str):
            return tuple(part.strip() for part in value.split(",") if part.strip())
        return value


def run(cfg: Atlas) -> Path:
    """Write `index.html` into `cfg.out`, for many nuclei with `data/` and `sprites/` beside it.

    The page is a pure function of the file, the slides, the settings and the libraries.

    Returns:
        The path of the page.

    Raises:
        UserError: a file that is missing or holds no embedded nuclei, an unknown column, a missing
            extra. Slides that are not there are no error: their nuclei have no thumbnails.
    """
    from eval.atlas.build import build

    page = build(cfg)
    print(f"{page}: open it in a browser")
    return page
