"""Plausible input for the report's tests: result rows, predictions, a gallery and a run folder."""

import json
import re
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.metrics import balanced_accuracy_score, f1_score, roc_auc_score

from eval.report.gallery import write_gallery

CLASSES = ("lymphocyte", "tumour / epithelial", "stromal")
ENCODER = "vit_tiny<b>&brca"
PROBES = {"knn": 0.62, "logistic": 0.70, "linear": 0.67}
FLOORS = {"floor:majority": 0.0, "floor:colour@40px0.25": 0.5, "floor:histogram@40px0.25": 0.6,
          "floor:pixel_pca@40px0.25": 0.55, "random:vit_tiny": 0.45}  # fmt: skip
NUCLEI = 300


def crops_of(shared: Path | None, n: int, side: int = 64) -> tuple[np.ndarray, np.ndarray]:
    """Real crops and labels where the data is there, else discs that differ by class."""
    rng = np.random.default_rng(1)
    root = shared / "brca-m2c" if shared else None
    crops, labels = [], []
    if root and root.is_dir():
        for image_path in sorted((root / "images").glob("*.png"))[: max(15, n // 40)]:
            image = np.asarray(Image.open(image_path).convert("RGB").resize((1000, 1000)))
            label_path = next((root / "labels").glob(f"{image_path.stem}*.txt"), None)
            points = (
                np.loadtxt(label_path, dtype=int, ndmin=2) if label_path else np.zeros((0, 3), int)
            )
            for y, x, cls in rng.permutation(points)[: max(40, n // 40)]:
                left, top = 2 * x - side // 2, 2 * y - side // 2
                if 0 <= left < 1000 - side and 0 <= top < 1000 - side:
                    crops.append(image[top : top + side, left : left + side])
                    labels.append(cls - 1)
    if len(crops) < n:
        labels = rng.integers(0, 3, n).tolist()
        yy, xx = np.mgrid[:side, :side] - side / 2
        for cls in labels:
            crop = rng.normal((225, 170, 205), 8, (side, side, 3))
            crop[(xx**2 + (yy * (1 + cls)) ** 2) < (6 + 6 * cls) ** 2] = (90, 50, 140)
            crops.append(crop.clip(0, 255).astype(np.uint8))
    order = rng.permutation(len(crops))[:n]
    return np.stack([crops[i] for i in order]), np.array([labels[i] for i in order])


def row_of(labels: np.ndarray, predicted: np.ndarray, scores: np.ndarray) -> dict[str, float]:
    """The metrics by scikit-learn, for a results file that fits its predictions."""
    each = f1_score(labels, predicted, average=None, labels=range(3), zero_division=0)
    return {
        "balanced_accuracy": float(balanced_accuracy_score(labels, predicted)),
        "macro_f1": float(each.mean()),
        "accuracy": float((labels == predicted).mean()),
        "auroc": float(roc_auc_score(labels, scores, multi_class="ovr")),
        **{f"f1/{name}": float(value) for name, value in zip(CLASSES, each, strict=True)},
    }


def write_results(folder: Path, *, encoder: str = ENCODER, lift: float = 0.0) -> None:
    """results.jsonl and predictions of an encoder and the floors, on 16 patients."""
    (folder / "predictions").mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(7)
    n = 1200
    labels = rng.choice(3, n, p=[0.15, 0.6, 0.25])
    patient = np.array([f"P{i:02d}" for i in rng.integers(0, 16, n)])
    x, y = rng.uniform(0, 500, (2, n))
    lines = []
    for name, strength in {encoder: 0.0, **FLOORS}.items():
        for probe, own in PROBES.items():
            right = own + lift if name == encoder else strength
            chance = rng.choice(3, n, p=[0.15, 0.6, 0.25])
            predicted = np.where(rng.random(n) < right, labels, chance)
            if name == "floor:majority":
                predicted = np.ones(n, int)
            scores = np.eye(3)[predicted] * 0.7 + 0.1
            stem = re.sub("[:/]", "_", f"{name}-{probe}")
            np.savez(folder / "predictions" / f"{stem}.npz", labels=labels, predicted=predicted,
                     scores=scores, patient=patient, slide=patient, x=x, y=y,
                     image=patient, classes=np.array(CLASSES))  # fmt: skip
            for metric, value in row_of(labels, predicted, scores).items():
                lines.append({
                    "benchmark": "brcam2c", "task": "type", "encoder": name,
                    "encoder_hash": "0123456789abcdef", "protocol": "grouped", "probe": probe,
                    "split": "test", "metric": metric, "value": value, "ci_low": value - 0.04,
                    "ci_high": value + 0.035, "n": n, "seed": 0, "seconds": 1.5,
                    "version": "0.1.0", "params": {"k": 20} if probe == "knn" else {},
                })  # fmt: skip
    (folder / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def write_run(folder: Path, steps: int = 600) -> None:
    """A run folder whose loss falls and whose log has gaps."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(3)
    lines = []
    for step in range(0, steps, 2):
        t = step / steps
        line = {"step": step, "loss": 5.5 - 1.9 * (1 - np.exp(-4 * t)) + rng.normal(0, 0.05),
                "chance": 5.545, "lr": 1e-3 * min(1, 10 * t) * (1 + np.cos(np.pi * t)) / 2,
                "momentum": 0.98 + 0.02 * t, "crops_per_s": rng.normal(900, 30),
                "data_wait": abs(rng.normal(0.01, 0.004))}  # fmt: skip
        if step % 10 == 0:
            line |= {"feature_std": 0.03 + 0.02 * t, "effective_rank": 20 + 60 * t,
                     "uniformity": -1.5 - 1.5 * t}  # fmt: skip
        if step % 100 == 0:
            line |= {"probe/knn_balanced_accuracy": 0.45 + 0.14 * t + rng.normal(0, 0.01),
                     "probe/knn_macro_f1": 0.42 + 0.15 * t}  # fmt: skip
        lines.append(json.dumps(line))
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "config.yaml").write_text("method:\n  name: moco_v3\nbatch: 256\nsteps: 600\n")
    start = {
        "time": "2026-01-02T03:04:05+00:00",
        "version": "0.1.0",
        "git": "abc123",
        "host": "box",
    }
    info = {"starts": [start]}
    (folder / "run.json").write_text(json.dumps(info))


def write_nuclei(path: Path, shared: Path | None, n: int = NUCLEI, encoder: str = ENCODER) -> None:
    """A gallery whose features follow class and colour of the crop, and a bit the patient."""
    crops, labels = crops_of(shared, n)
    n = len(crops)
    rng = np.random.default_rng(5)
    middle = crops[:, 16:48, 16:48].astype(float)
    seen = np.stack([middle.mean((1, 2, 3)), middle.std((1, 2, 3)), (middle < 120).mean((1, 2, 3)),
                     middle[..., 0].mean((1, 2)), middle[..., 2].std((1, 2))], 1)  # fmt: skip
    seen = (seen - seen.mean(0)) / seen.std(0)
    people = rng.integers(0, 20, n)
    split = np.where(people < 14, "train", "test")
    features = np.concatenate(
        [np.eye(3)[labels] * 0.8, seen, rng.normal(0, 0.5, (20, 4))[people]], 1
    )
    features = features @ rng.normal(0, 1, (12, 96)) + rng.normal(0, 0.3, (n, 96))
    write_gallery(path, features=features, crops=crops, labels=labels, classes=CLASSES, split=split,
                  patient=np.array([f"P{p:02d}" for p in people]), encoder=encoder,
                  encoder_hash="0123456789abcdef", mpp=0.25)  # fmt: skip


def write_all(folder: Path) -> None:
    """Results, predictions and a gallery in `folder`, a run in folder/run."""
    write_results(folder)
    shared = Path(__file__).resolve().parents[3] / "shared" / "data"
    write_nuclei(folder / "gallery.npz", shared if shared.is_dir() else None)
    write_run(folder / "run")
