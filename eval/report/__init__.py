"""`lemon-muse report`: self-contained HTML pages, their PNGs and `report.json` from results."""

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator

from lemon_muse.config import Config


class Report(Config):
    """Tables and pictures from result files: one HTML page that needs nothing else."""

    results: tuple[str, ...] = Field(
        description="results.jsonl files or folders that are searched for them, separated by commas"
    )
    run: Path | None = Field(
        default=None,
        description="run folder with metrics.jsonl, config.yaml, run.json; for the curves",
    )
    out: Path = Field(
        default=Path("report"), description="folder that gets the page and its pictures"
    )
    title: str = Field(
        default="", description="title of the page; empty: made from the encoder's name"
    )
    encoder: str = Field(
        default="",
        description="encoder in the foreground; empty: the gallery's, else the newest row's",
    )
    seed: int = Field(
        default=0, description="seed of the projection, the queries and the bootstrap"
    )
    neighbours: int = Field(
        default=10, ge=1, le=20, description="nearest crops shown for each query"
    )
    queries: int = Field(default=4, ge=1, le=20, description="query nuclei of each class")
    nuclei: int = Field(
        default=4000, ge=50, le=20000, description="most nuclei on the morphological map"
    )
    projection: Literal["tsne", "umap", "pca"] = Field(
        default="tsne", description="2-D projection of the map; umap needs the package umap-learn"
    )
    resamples: int = Field(
        default=1000,
        ge=100,
        le=100000,
        description="bootstrap draws of patients for paired differences",
    )
    projector: bool = Field(
        default=True,
        description="also write the embedding for TensorBoard's projector (out/projector)",
    )
    leaderboard: Literal["auto"] | bool = Field(
        default="auto",
        description="also write leaderboard.html, .csv and .tex over all encoders; auto: where "
        "there are two encoders or two benchmarks",
    )

    @field_validator("results", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        if isinstance(value, str):
            value = [part.strip() for part in value.split(",") if part.strip()]
        if not value:
            raise ValueError("give at least one results.jsonl or a folder that holds one")
        return value


def run(cfg: Report) -> Path:
    """Write `report.html`, `report.json`, the PNGs and the projector folder into `cfg.out`.

    Over several encoders or benchmarks also `leaderboard.html`, `.csv` and `.tex`.

    The page is a pure function of its inputs: the same files and settings give the same bytes.

    Returns:
        The path of the page.

    Raises:
        UserError: a results file that is missing, empty or malformed (names file and line), an
            encoder that the results do not hold, a damaged gallery or metrics file.
    """
    from eval.report.build import build

    return build(cfg)
