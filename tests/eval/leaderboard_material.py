"""Generated results of ten encoders on the six benchmarks, in the form in which `eval` writes them.

Class results come with predictions and every value is computed from them by scikit-learn, so that
rows, files and intervals belong together. `python -m tests.eval.leaderboard_material FOLDER`.
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.metrics import balanced_accuracy_score, f1_score

# name: (strength, GMAC, per what, parameters in millions, nuclei/s)
ENCODERS: dict[str, tuple[float, float | None, str, float, float]] = {
    "lemon_vits8": (0.66, 0.560, "nucleus", 21.4, 410.0),
    "lemon_vits8_mild": (0.64, 0.560, "nucleus", 21.4, 405.0),
    "lemon_resnet18": (0.57, 0.071, "nucleus", 11.2, 2900.0),
    "lemon_convnext_atto": (0.55, 0.022, "nucleus", 3.4, 4100.0),
    "muse_vits16": (0.68, 8.68, "window", 31.1, 950.0),
    "muse_vits16_cls_only": (0.60, 8.68, "window", 31.1, 940.0),
    "muse_r50@224/224px0.25": (0.65, 14.9, "window", 86.4, 520.0),
    "timm_resnet50": (0.52, 4.13, "nucleus", 23.5, 88.0),
    "uni <gated> & \"large\"_100%": (0.70, 61.6, "nucleus", 303.4, 3.1),
    "scratch_vits8": (0.36, None, "nucleus", 21.4, 400.0),
}  # fmt: skip
FLOORS = {
    "floor:majority": None, "floor:colour@40px0.25": 0.38, "floor:histogram@40px0.25": 0.46,
    "floor:pixel_pca@40px0.25": 0.42, "random:lemon_vits8": 0.34,
}  # fmt: skip
CLASSES = {
    "brcam2c": ("lymphocyte", "tumour / epithelial", "stromal"),
    "nucls": ("tumor_any", "nonTIL_stromal", "sTIL"),
    "midogpp": ("imposter", "mitotic figure"),
    "ocelot": ("background", "tumour"),
    "puma": ("tumour", "lymphocyte", "other"),
}
DOMAINS = ("canine lung", "human breast", "human melanoma", "human neuroendocrine")
GENES = ("KRT8", "CD3E", "COL1A1", "PTPRC", "EPCAM", "ACTA2")
PROBES = ("knn", "logistic", "linear")
PEOPLE = 24


class Writer:
    """Collects the rows of one results.jsonl and writes predictions beside it."""

    def __init__(self, folder: Path, benchmark: str, seed: int) -> None:
        self.folder, self.benchmark = folder, benchmark
        self.rng = np.random.default_rng(seed)
        self.lines: list[dict[str, Any]] = []
        (folder / "predictions").mkdir(parents=True, exist_ok=True)

    def row(
        self, task: str, encoder: str, probe: str, metric: str, value: float, **more: Any
    ) -> None:
        base = {
            "benchmark": self.benchmark, "task": task, "encoder": encoder,
            "encoder_hash": hash_of(encoder), "protocol": "default", "probe": probe,
            "split": "test", "metric": metric, "value": round(value, 6), "ci_low": None,
            "ci_high": None, "n": 900, "seed": 0, "seconds": 2.5, "version": "1+0a1b2c3d",
            "params": params_of(encoder),
        }  # fmt: skip
        self.lines.append({**base, **more})

    def close(self) -> None:
        text = "".join(json.dumps(line, allow_nan=False) + "\n" for line in self.lines)
        (self.folder / "results.jsonl").write_text(text, encoding="utf-8")


def hash_of(encoder: str) -> str:
    return f"{sum(encoder.encode()) * 2654435761 % 16**16:016x}"


def params_of(encoder: str) -> dict[str, float | int | str]:
    if encoder not in ENCODERS:
        return {}
    _, gmacs, unit, millions, rate = ENCODERS[encoder]
    said: dict[str, float | int | str] = {"parameters": int(millions * 1e6)}
    said |= {"nuclei_per_second": rate, "window": 40, "mpp": 0.25}
    return {**said, "gmacs": gmacs, "gmacs_of": unit} if gmacs else said


def strengths() -> dict[str, float | None]:
    return {name: facts[0] for name, facts in ENCODERS.items()} | FLOORS


def classification(
    folder: Path, benchmark: str, task: str, *, seed: int = 1, seeds: tuple[int, ...] = (0,),
    protocol: str = "default", probes: tuple[str, ...] = PROBES, by: str = "",
) -> None:  # fmt: skip
    """Rows and predictions of all encoders and floors on one classification task."""
    out = Writer(folder, benchmark, seed)
    names = CLASSES[benchmark]
    k, n = len(names), 900
    prior = np.arange(1, k + 1) / np.arange(1, k + 1).sum()
    labels = out.rng.choice(k, n, p=prior)
    patient = np.array([f"P{i:02d}" for i in out.rng.integers(0, PEOPLE, n)])
    domain = np.array(DOMAINS)[out.rng.integers(0, len(DOMAINS), n)]
    x, y = out.rng.uniform(0, 1000, (2, n))
    for encoder, strength in strengths().items():
        for at in seeds:
            for probe in probes:
                shift = {"knn": -0.04, "linear": -0.01}.get(probe, 0.0) + 0.01 * at
                right = out.rng.random(n) < ((strength or 0) + shift)
                predicted = np.where(right, labels, out.rng.choice(k, n, p=prior))
                predicted = np.full(n, k - 1) if strength is None else predicted
                if at == seeds[-1]:
                    stem = (
                        f"{encoder}-{probe}".replace(":", "_").replace("/", "_").replace(" ", "_")
                    )
                    np.savez(folder / "predictions" / f"{stem}.npz", labels=labels, x=x, y=y,
                             predicted=predicted, patient=patient, image=patient,
                             classes=np.array(names))  # fmt: skip
                extra: dict[str, Any] = {"seed": at, "protocol": protocol}
                for metric, value in scored(labels, predicted, names).items():
                    wide = 0.03 + 0.02 * (metric == "auroc")
                    out.row(task, encoder, probe, metric, value, ci_low=round(value - wide, 6),
                            ci_high=round(value + wide, 6), **extra)  # fmt: skip
                for value in DOMAINS if by else ():
                    rows = domain == value
                    found = balanced_accuracy_score(labels[rows], predicted[rows])
                    out.row(task, encoder, probe, f"balanced_accuracy/{by}={value}", found, **extra)
    out.close()


def scored(labels: np.ndarray, predicted: np.ndarray, names: tuple[str, ...]) -> dict[str, float]:
    each = f1_score(labels, predicted, average=None, labels=range(len(names)), zero_division=0)
    balanced = float(balanced_accuracy_score(labels, predicted))
    return {
        "balanced_accuracy": balanced,
        "macro_f1": float(each.mean()),
        "accuracy": float((labels == predicted).mean()),
        "auroc": min(1.0, balanced + 0.07),
        **{f"f1/{name}": float(value) for name, value in zip(names, each, strict=True)},
        "balanced_accuracy/fold_mean": balanced - 0.002,
        "balanced_accuracy/fold_sd": 0.015,
    }


def cross_domain(folder: Path) -> None:
    """MIDOG++ trained on one domain: a matrix, values in and out of domain."""
    out = Writer(folder, "midogpp", 5)
    task, probe = "mitosis cross:domain", "logistic"
    for encoder, strength in strengths().items():
        level = 0.5 + (strength or 0.0) * 0.5
        own = []
        others = []
        for a in DOMAINS:
            for b in DOMAINS:
                value = (
                    level - (0 if a == b else 0.08 * (level - 0.5) / 0.3) + out.rng.normal(0, 0.01)
                )
                value = 0.5 if strength is None else value
                (own if a == b else others).append(value)
                out.row(task, encoder, probe, f"balanced_accuracy/{a}>{b}", value)
        for metric, values in (("balanced_accuracy/in_domain", own), ("balanced_accuracy", others)):
            mean = float(np.mean(values))
            out.row(task, encoder, probe, metric, mean, ci_low=mean - 0.02, ci_high=mean + 0.02)
    out.close()


def regression(folder: Path) -> None:
    """HEST: correlations of genes on slides, with the files that `eval` writes."""
    out = Writer(folder, "hest", 9)
    slides = np.array([f"TENX{i}" for i in (111, 139, 147, 148, 149)])
    for encoder, strength in strengths().items():
        if strength is None:
            continue
        base = 0.25 * strength + np.linspace(0.06, -0.06, len(GENES))
        values = base + out.rng.normal(0, 0.012, (len(slides), len(GENES)))
        stem = f"{encoder}-ridge".replace(":", "_").replace("/", "_").replace(" ", "_")
        np.savez(folder / "predictions" / f"{stem}.npz", pearson=values, slides=slides,
                 genes=np.array(GENES))  # fmt: skip
        mean = float(values.mean())
        bounds = {"ci_low": round(mean - 0.02, 6), "ci_high": round(mean + 0.02, 6)}
        out.row("bowel", encoder, "ridge", "pearson", mean, **bounds)
        for gene, value in zip(GENES, values.mean(0), strict=True):
            out.row("bowel", encoder, "ridge", f"pearson/{gene}", float(value))
    out.close()


def robustness(folder: Path) -> None:
    """What the features hold of the hospital."""
    out = Writer(folder, "nucls", 11)
    for encoder, strength in strengths().items():
        if strength is None:
            continue
        found = {
            "purity/class": 0.4 + strength / 2,
            "purity/class/chance": 0.41,
            "purity/hospital": 0.5 - strength / 2,
            "purity/hospital/chance": 0.09,
            "index/hospital": 0.3 + 0.8 * strength,
            "stain/cosine": 0.5 + strength / 2,
        }
        for metric, value in found.items():
            out.row("super", encoder, "robustness", metric, value)
    out.close()


def write_all(folder: Path) -> None:
    """A folder a benchmark, as a sweep with one `out` each would leave them."""
    classification(folder / "brcam2c", "brcam2c", "class", seeds=(0, 1, 2))
    classification(
        folder / "brcam2c-paper", "brcam2c", "class", seed=2, protocol="paper",
        probes=("knn", "linear"),
    )  # fmt: skip
    classification(folder / "nucls", "nucls", "super", seed=3, by="hospital")
    robustness(folder / "nucls-robustness")
    classification(folder / "midogpp", "midogpp", "mitosis", seed=4, by="domain")
    cross_domain(folder / "midogpp-cross")
    classification(folder / "ocelot", "ocelot", "class", seed=6)
    classification(folder / "puma", "puma", "muse", seed=7)
    regression(folder / "hest")


if __name__ == "__main__":
    write_all(Path(sys.argv[1]))
