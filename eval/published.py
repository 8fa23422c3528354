"""Published figures of the benchmarks, as data: to stand beside ours, never in one ranking with it.

A figure is only as good as its protocol: windows, splits, probes and what is chosen on test differ
between papers and from the default here. Accuracies that papers print in percent are fractions.
"""

from dataclasses import dataclass

LEMON = "LEMON paper (newer text: arXiv 2603.25802)"
MUSE = "MUSE paper (AAAI; arXiv 2511.05170)"
CELLVIT = "CellViT++ (arXiv 2501.05269), logs in its repository"
ATYPICAL = "AMi-Br benchmark (arXiv 2506.21444), notebooks in its repository"
MITOSIS = "Benchmarking foundation models for mitotic figure classification (arXiv 2508.04441)"

# MUSE's tables name the encoder of some best figures only; the others stand under this name.
BEST = "best of the paper's table"


@dataclass(frozen=True)
class Published:
    """One figure of one paper.

    Attributes:
        benchmark, task: whose table it belongs under.
        encoder: as the paper calls it.
        probe: by our names where it is ours ('logistic', 'knn', …), else in words.
        metric: by our names; of a task 'cross:…' the plain metric is the one out of domain.
        value: in 0 … 1.
        setting: data, window and division, as far as they are stated.
        source: paper.
        digits: decimals that the paper prints (percent: two more).
    """

    benchmark: str
    task: str
    encoder: str
    probe: str
    metric: str
    value: float
    setting: str
    source: str
    digits: int = 3

    @property
    def printed(self) -> str:
        return f"{self.value:.{self.digits}f}"


def of(benchmark: str, task: str) -> list[Published]:
    """The published figures of one task, best first within probe, metric and setting.

    Args:
        task: with a plan behind it ('mitosis folds'), as in rows; only a plan 'cross:…' is another
            question.
    """
    wanted = task if " cross:" in task else task.partition(" ")[0]
    found = [p for p in PUBLISHED if (p.benchmark, p.task) == (benchmark, wanted)]
    order = {(p.probe, p.metric, p.setting): None for p in found}
    places = {key: i for i, key in enumerate(order)}
    return sorted(found, key=lambda p: (places[p.probe, p.metric, p.setting], -p.value))


def _nucls() -> list[Published]:
    crops = "3 classes, crops of 40 x 40 px, folds without stated grouping"
    out = [
        Published("nucls", "super", name, "logistic", "balanced_accuracy", value, crops, LEMON)
        for name, value in (
            ("LEMON (a1)", 0.784),
            ("LEMON (a1 + gray)", 0.779),
            ("Virchow2", 0.754),
            ("H-optimus-0", 0.751),
            ("Volta", 0.736),
            ("DINOv2-g", 0.734),
        )
    ]
    tokens = "frozen tokens in place (with context), nuclei matched to detections, its own folds"
    for task, name, metric, value in (
        ("super4", "UNI", "accuracy", 0.857),
        ("super4", "SAM-H", "accuracy", 0.812),
        ("super4", "HIPT256", "accuracy", 0.794),
        ("super4", "UNI", "auroc", 0.960),
        ("super4", "HIPT256", "auroc", 0.923),
        ("super4", "SAM-H", "auroc", 0.920),
        ("super4", "UNI", "macro_f1", 0.732),
        ("main", "UNI", "accuracy", 0.719),
        ("main", "SAM-H", "accuracy", 0.681),
        ("main", "UNI", "auroc", 0.903),
        ("main", "UNI", "macro_f1", 0.524),
    ):
        out.append(Published("nucls", task, name, "MLP", metric, value, tokens, CELLVIT))
    return out


def _atypical() -> list[Published]:
    """Atypical against normal mitotic figures: what the LEMON paper calls MIDOG++."""
    crops = "MIDOG++, crops of 40 x 40 px, folds without any metadata"
    out = [
        Published("midogpp", "atypical", name, "logistic", "balanced_accuracy", value, crops, LEMON)
        for name, value in (("LEMON", 0.746), ("Volta", 0.726), ("DINOv2-g", 0.654))
    ]
    # Other data of the same question: best linear probes, LoRA and end-to-end of the benchmark.
    for data, name, probe, metric, value in (
        ("AMi-Br", "UNI", "linear probe", "balanced_accuracy", 0.634),
        ("AtNorM-Br", "UNI2-h", "linear probe", "balanced_accuracy", 0.648),
        ("AtNorM-MD", "H-optimus-1", "linear probe", "balanced_accuracy", 0.597),
        ("AMi-Br", "Virchow2", "LoRA", "balanced_accuracy", 0.8135),
        ("AMi-Br", "UNI", "LoRA", "balanced_accuracy", 0.795),
        ("AtNorM-Br", "UNI", "LoRA", "balanced_accuracy", 0.718),
        ("AtNorM-MD", "UNI", "LoRA", "balanced_accuracy", 0.707),
        ("AtNorM-Br", "ViT-L", "end to end", "balanced_accuracy", 0.7788),
        ("AtNorM-MD", "Swin-B", "end to end", "balanced_accuracy", 0.7723),
        ("AMi-Br", "Virchow2", "LoRA", "auroc", 0.903),
        ("AtNorM-Br", "ViT-L", "end to end", "auroc", 0.871),
        ("AtNorM-MD", "Swin-B", "end to end", "auroc", 0.881),
    ):
        setting = f"{data} (other data), crops of 128 px, models of 5 folds"
        place = ("midogpp", "atypical", name, probe, metric, value)
        digits = 3 if round(value, 3) == value else 4
        out.append(Published(*place, setting, ATYPICAL, digits=digits))
    return out


def _mitosis() -> list[Published]:
    """Mitotic figure against imposter. The paper's linear-probe rows of MIDOG 2022 repeat those of
    another data set, so they are left out."""
    random = "MIDOG 2022, 224 px crops, random annotations as test: slides on both sides"
    metrics = ("balanced_accuracy", "weighted_f1", "auroc")
    out = []
    for name, values in {
        "Phikon": (0.74, 0.75, 0.82),
        "UNI": (0.77, 0.77, 0.85),
        "Virchow": (0.77, 0.78, 0.86),
        "Virchow2": (0.79, 0.80, 0.88),
        "GigaPath": (0.78, 0.78, 0.86),
        "H-optimus-0": (0.80, 0.81, 0.89),
    }.items():
        for metric, value in zip(metrics, values, strict=True):
            place = ("midogpp", "mitosis", name, "LoRA", metric, value)
            out.append(Published(*place, random, MITOSIS, digits=2))
    crossed = "MIDOG 2022, trained on one tumour type; 20 % of its annotations held out at random"
    for name, probe, inside, outside in (
        ("ResNet50", "end to end", 0.87, 0.74),
        ("ViT-B", "end to end", 0.83, 0.75),
        ("Phikon", "uni", 0.76, 0.61),
        ("UNI", "uni", 0.76, 0.64),
        ("H-optimus-0", "uni", 0.79, 0.66),
        ("Phikon", "LoRA", 0.81, 0.76),
        ("UNI", "LoRA", 0.86, 0.80),
        ("Virchow", "LoRA", 0.86, 0.82),
        ("Virchow2", "LoRA", 0.89, 0.87),
        ("GigaPath", "LoRA", 0.89, 0.85),
        ("H-optimus-0", "LoRA", 0.90, 0.88),
    ):
        for metric, value in (("auroc", outside), ("auroc/in_domain", inside)):
            place = ("midogpp", "mitosis cross:domain", name, probe, metric, value)
            out.append(Published(*place, crossed, MITOSIS, digits=2))
    for metric, value in (("balanced_accuracy", 0.80), ("balanced_accuracy/in_domain", 0.82)):
        place = ("midogpp", "mitosis cross:domain", "H-optimus-0", "LoRA", metric, value)
        out.append(Published(*place, crossed, MITOSIS, digits=2))
    return out


def _muse() -> list[Published]:
    """Accuracies of MUSE's evaluation: official splits, k of KNN chosen on test, one run."""
    fine, coarse = "40x (0.25 µm/px)", "20x (0.5 µm/px)"
    tables = {
        ("brcam2c", "class"): (
            ("LFoV-MUSE-R50", "knn", coarse, 0.8953),
            ("LFoV-MUSE-B", "knn", fine, 0.8893),
            (BEST, "linear", coarse, 0.9018),
            ("UNI", "linear", coarse, 0.8699),
            (BEST, "linear", fine, 0.9018),
            ("UNI", "linear", fine, 0.8864),
            (BEST, "finetune", coarse, 0.8929),
            (BEST, "finetune", fine, 0.9026),
        ),
        ("ocelot", "class"): (
            ("CONCH", "knn", coarse, 0.8808),
            ("CONCH", "knn", fine, 0.8600),
            ("GigaPath", "linear", coarse, 0.8750),
            ("LFoV-MUSE-S", "linear", fine, 0.8657),
            ("GigaPath", "finetune", coarse, 0.8813),
            ("LFoV-MUSE-B", "finetune", coarse, 0.8705),
            ("LFoV-MUSE-S", "finetune", fine, 0.8801),
            ("LFoV-MUSE-B", "finetune", fine, 0.8787),
        ),
        ("puma", "muse"): (
            ("UNI", "knn", coarse, 0.8221),
            ("LFoV-MUSE-R50", "knn", coarse, 0.8221),
            ("LFoV-MUSE-B", "knn", fine, 0.8316),
            (BEST, "linear", coarse, 0.8436),
            ("CONCH", "linear", coarse, 0.8202),
            (BEST, "linear", fine, 0.8512),
            ("CONCH", "linear", fine, 0.8366),
            (BEST, "finetune", coarse, 0.8484),
            ("LFoV-MUSE-B", "finetune", fine, 0.8574),
        ),
    }
    return [
        Published(*place, name, probe, "accuracy", value, setting, MUSE, digits=4)
        for place, rows in tables.items()
        for name, probe, setting, value in rows
    ]


def _hest() -> list[Published]:
    setting = "crops of 40 x 40 px, 50 genes, 10,000 nuclei a slide, leave-one-slide-out"
    figures = {
        "bowel": (("LEMON (gmm1)", 0.164), ("LEMON (default)", 0.160)),
        "breast": (("DINOv2-g", 0.164), ("LEMON (default)", 0.156)),
        "lung": (("LEMON (a1)", 0.133), ("LEMON (default)", 0.128)),
    }
    return [
        Published("hest", task, name, "ridge", "pearson", value, setting, LEMON)
        for task, rows in figures.items()
        for name, value in rows
    ]


PUBLISHED: tuple[Published, ...] = (
    *_nucls(),
    *_mitosis(),
    *_atypical(),
    *_muse(),
    *_hest(),
)
