"""The report: its page against its inputs, its pictures against plain loops."""

import base64
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.metrics import balanced_accuracy_score, f1_score, roc_auc_score

from eval.report import Report, embedding, retrieval, run
from eval.report.gallery import Gallery, choose_rows, read_gallery, write_gallery
from eval.report.projector import thumb_side, write_projector
from lemon_muse.config import load
from lemon_muse.errors import UserError

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


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A results folder, a gallery and a run folder."""
    folder = tmp_path_factory.mktemp("inputs")
    write_results(folder)
    shared = Path(__file__).resolve().parents[3] / "shared" / "data"
    write_nuclei(folder / "gallery.npz", shared if shared.is_dir() else None)
    write_run(folder / "run")
    return folder


@pytest.fixture(scope="module")
def report(inputs: Path) -> Path:
    """The finished page."""
    return run(Report(results=(str(inputs),), run=inputs / "run", out=inputs / "out"))


class Cells(HTMLParser):
    """Collects the text of table cells, row by row, and every src and href."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.links: list[str] = []
        self.tags: list[str] = []
        self.inside = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [
            v or "" for k, v in attrs if k in ("src", "href", "srcset", "action", "data")
        ]
        if tag == "tr":
            self.rows.append([])
        if tag == "td":
            self.rows[-1].append("")
            self.inside = True

    def handle_data(self, data: str) -> None:
        if self.inside:
            self.rows[-1][-1] += data

    def handle_endtag(self, tag: str) -> None:
        if tag == "td":
            self.inside = False


def parsed(page: Path) -> Cells:
    cells = Cells()
    cells.feed(page.read_text(encoding="utf-8"))
    return cells


def test_page_holds_every_number(inputs: Path, report: Path) -> None:
    wanted = [json.loads(line) for line in (inputs / "results.jsonl").read_text().splitlines()]
    rows = parsed(report).rows
    for row in wanted:
        metric = row["metric"].replace("f1/", "F1, ")
        named = {"balanced_accuracy": "balanced accuracy", "macro_f1": "macro-F1", "auroc": "AUROC"}
        key = [f"{row['encoder']} 01234567", row["probe"], "test", named.get(metric, metric)]
        hits = [r for r in rows if r[1:5] == key]
        assert len(hits) == 1
        assert hits[0][5] == f"{row['value']:.4f}"
        assert hits[0][6] == f"[{row['ci_low']:.3f}, {row['ci_high']:.3f}]"
        assert hits[0][7:9] == ["1,200", "0"]
    text = json.loads((report.parent / "report.json").read_text())
    assert [r["value"] for r in text["rows"]] == [r["value"] for r in wanted]


def test_page_needs_nothing_else(report: Path) -> None:
    cells = parsed(report)
    assert len([x for x in cells.links if x.startswith("data:image/")]) >= 8
    assert all(x.startswith(("data:image/", "#")) for x in cells.links)
    text = report.read_text(encoding="utf-8")
    assert not re.search(r"url\(|@import", text)
    assert "script" not in cells.tags and "link" not in cells.tags
    assert report.stat().st_size < 6_000_000


def test_pictures_inline_are_the_files(report: Path) -> None:
    names = json.loads((report.parent / "report.json").read_text())["pictures"]
    inline = [x for x in parsed(report).links if x.startswith("data:")]
    assert len(names) == len(inline)
    for name, uri in zip(names, inline, strict=True):
        with Image.open(report.parent / name) as file:
            shown = Image.open(io.BytesIO(base64.b64decode(uri.split(",", 1)[1])))
            assert file.size == shown.size, name
            away = np.asarray(file.convert("RGB"), float) - np.asarray(shown.convert("RGB"), float)
            assert np.abs(away).mean() < 3, name


def test_same_input_gives_same_bytes(inputs: Path, report: Path) -> None:
    before = {p.name: p.read_bytes() for p in report.parent.iterdir() if p.is_file()}
    run(Report(results=(str(inputs),), run=inputs / "run", out=inputs / "out"))
    after = {p.name: p.read_bytes() for p in report.parent.iterdir() if p.is_file()}
    assert before == after


def test_names_are_escaped(report: Path) -> None:
    text = report.read_text(encoding="utf-8")
    assert "vit_tiny<b>" not in text
    assert "vit_tiny&lt;b&gt;&amp;brca" in text


def test_differences_are_paired(inputs: Path, report: Path) -> None:
    found = json.loads((report.parent / "report.json").read_text())["differences"]
    one = next(d for d in found if d["floor"].startswith("floor:histogram")
               and d["probe"] == "logistic" and d["metric"] == "balanced_accuracy")  # fmt: skip
    files = [np.load(inputs / "predictions" / f"{stem}-logistic.npz")
             for stem in (ENCODER, "floor_histogram@40px0.25")]  # fmt: skip
    labels, patient = files[0]["labels"], files[0]["patient"]
    rng = np.random.default_rng(11)
    names = np.unique(patient)
    draws = []
    for _ in range(300):
        rows = np.concatenate([np.flatnonzero(patient == p) for p in rng.choice(names, len(names))])
        draws.append(np.subtract(*(balanced_accuracy_score(labels[rows], f["predicted"][rows])
                                   for f in files)))  # fmt: skip
    value = np.subtract(*(balanced_accuracy_score(labels, f["predicted"]) for f in files))
    assert one["value"] == pytest.approx(value, abs=1e-9)
    assert (one["low"], one["high"]) == pytest.approx(np.percentile(draws, [2.5, 97.5]), abs=0.012)


def test_verdict_says_what_is_not_beaten(tmp_path: Path) -> None:
    write_results(tmp_path, encoder="weak", lift=-0.4)
    page = run(Report(results=(str(tmp_path),), out=tmp_path / "out")).read_text(encoding="utf-8")
    lead = re.search(r'<p class="lead">(.*?)</p>', page)
    assert lead and "does not beat" in lead[1] and "colour histogram" in lead[1]
    assert "beats every floor" not in lead[1]
    # Nothing but results: the other parts are said to be missing, and nothing is drawn for them.
    assert page.count('class="missing"') == 3
    assert not (tmp_path / "out" / "projector").exists()


def test_several_files_in_one_table(tmp_path: Path, inputs: Path) -> None:
    write_results(tmp_path / "b", encoder="second", lift=0.1)
    words = [f"results={inputs},{tmp_path / 'b' / 'results.jsonl'}", f"out={tmp_path / 'out'}",
             "projector=false", "projection=pca", "encoder=second"]  # fmt: skip
    page = run(load(Report, words))
    names = {row[0] for row in parsed(page).rows if len(row) == 7}
    assert {"second", ENCODER} <= names
    assert "<h1>second</h1>" in page.read_text(encoding="utf-8")
    # The gallery holds another encoder's features, so it is not shown under this name.
    assert not list(page.parent.glob("neighbours-*.png"))


HALF = '{"benchmark": "b", "encoder": "e", "probe": "knn", "metric": "m"'


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "there is no results file"),
        ("", "holds no rows"),
        (HALF + ', "value": 1}\n{oops\n', "line 2: not readable as JSON"),
        (HALF + ', "value": 1}\n{"benchmark": b}\n', "line 2: not readable as JSON"),
        (HALF + ', "va', "holds no rows"),
        ("\n" + HALF + "}", "line 2: the row has no 'value'"),
        (HALF + ', "value": "high"}', "line 1: 'value' is"),
        ("[1]", "line 1: a row must be"),
    ],
)
def test_bad_results(tmp_path: Path, text: str | None, words: str) -> None:
    path = tmp_path / "results.jsonl"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match=re.escape(words)) as caught:
        run(Report(results=(str(path),), out=tmp_path / "out"))
    assert str(path) in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_bad_gallery_run_and_encoder(tmp_path: Path) -> None:
    write_results(tmp_path)
    with pytest.raises(UserError, match="no encoder 'nobody'; they hold: vit_tiny"):
        run(Report(results=(str(tmp_path),), out=tmp_path / "out", encoder="nobody"))
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2}\n{"loss": 3}\n{"step": 3}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl, line 2: the line has no 'step'"):
        run(Report(results=(str(tmp_path),), out=tmp_path / "out", run=tmp_path))
    (tmp_path / "gallery.npz").write_bytes(b"not a zip")
    with pytest.raises(UserError, match="is not a gallery"):
        run(Report(results=(str(tmp_path),), out=tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_predictions_of_another_run_are_left_out(tmp_path: Path) -> None:
    write_results(tmp_path, encoder="e")
    path = tmp_path / "predictions" / "e-knn.npz"
    arrays = dict(np.load(path))
    arrays["predicted"] = (arrays["predicted"] + 1) % 3
    np.savez(path, **arrays)
    page = run(Report(results=(str(tmp_path),), out=tmp_path / "out"))
    assert "e-knn.npz belongs to another run" in page.read_text(encoding="utf-8")
    found = json.loads((page.parent / "report.json").read_text())["differences"]
    assert all((d["low"] is None) == (d["probe"] == "knn") for d in found)


def test_neighbours_equal_a_plain_loop() -> None:
    rng = np.random.default_rng(0)
    queries, base = rng.normal(0, 1, (23, 9)), rng.normal(0, 3, (71, 9))
    got = retrieval.nearest(queries, base, 10)
    for query, found in zip(queries, got, strict=True):
        cosine = [float(query @ b / np.linalg.norm(query) / np.linalg.norm(b)) for b in base]
        assert found.tolist() == sorted(range(71), key=lambda i: -cosine[i])[:10]


def test_retrieval_searches_train_only(inputs: Path) -> None:
    gallery = read_gallery(inputs / "gallery.npz")
    result = retrieval.retrieve(gallery, 10)
    assert result is not None
    assert (gallery.split[result.queries] == "test").all()
    assert (gallery.split[result.found] == "train").all()
    counts = [sum(gallery.labels[f] == gallery.labels[q] for f in fs)
              for q, fs in zip(result.queries, result.found, strict=True)]  # fmt: skip
    assert result.same.tolist() == counts
    chosen = retrieval.choose_queries(gallery, result, each=4, seed=0)
    assert all(len(rows) == 4 for rows in chosen.values())
    assert all((gallery.labels[result.queries[rows]] == cls).all() for cls, rows in chosen.items())


def test_map_never_draws_two_nuclei_in_one_place() -> None:
    box = np.random.default_rng(0).beta(2, 3, (3000, 2))
    chosen, cells = embedding.snap(box, columns=20, rows=15)
    assert len(np.unique(cells, axis=0)) == len(cells) == len(np.unique(chosen))
    occupied: dict[tuple[int, int], tuple[float, int]] = {}
    for i, (x, y) in enumerate(box):
        cell = min(19, int(x * 20)), min(14, int(y * 15))
        away = (x * 20 - cell[0] - 0.5) ** 2 + (y * 15 - cell[1] - 0.5) ** 2
        occupied[cell] = min(occupied.get(cell, (9.0, -1)), (away, i))
    assert {tuple(c): i for c, i in zip(cells.tolist(), chosen.tolist(), strict=True)} == {
        cell: i for cell, (_, i) in occupied.items()
    }


def test_components_are_those_of_scikit_learn(inputs: Path) -> None:
    from sklearn.decomposition import PCA
    from sklearn.preprocessing import normalize

    features = read_gallery(inputs / "gallery.npz").features
    got = embedding.principal(features)
    want = PCA(50, svd_solver="full").fit_transform(normalize(features))
    assert got is not None
    np.testing.assert_allclose(np.abs(got[:, :10]), np.abs(want[:, :10]), atol=1e-4)
    assert embedding.principal(np.ones((60, 8), np.float32)) is None


def test_patient_mixing_equals_a_plain_loop() -> None:
    rng = np.random.default_rng(2)
    n, k = 60, 5
    features = rng.normal(0, 1, (n, 6)).astype(np.float32)
    features[1] = features[0]  # two nuclei with the same features
    patient = rng.choice(["a", "b", "c"], n)
    gallery = Gallery(features, np.zeros((n, 4, 4, 3), np.uint8), np.zeros(n, int), ["x"],
                      np.full(n, "train"), patient, "", "", 0.25)  # fmt: skip
    got, chance = embedding.patient_mixing(gallery, k)
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    shares, pairs = [], []
    for i in range(n):
        others = sorted((j for j in range(n) if j != i), key=lambda j: -float(unit[i] @ unit[j]))
        shares.append(np.mean([patient[j] == patient[i] for j in others[:k]]))
        pairs.append(np.mean([patient[j] == patient[i] for j in others]))
    assert got == pytest.approx(np.mean(shares))
    assert chance == pytest.approx(np.mean(pairs))


def test_gallery_comes_back(tmp_path: Path) -> None:
    write_nuclei(tmp_path / "g.npz", None, n=40, encoder="e")
    gallery = read_gallery(tmp_path / "g.npz")
    assert (gallery.encoder, gallery.mpp, gallery.classes) == ("e", 0.25, list(CLASSES))
    assert gallery.features.dtype == np.float32 and gallery.crops.shape == (40, 64, 64, 3)
    split = np.array(["train"] * 5000 + ["val"] * 500 + ["test"] * 3000)
    rows = choose_rows(split, limit=4000)
    assert len(set(rows.tolist())) == 4000
    assert (split[rows] == "test").sum() == 1000 and (split[rows] == "train").sum() == 3000
    crops = np.zeros((4001, 1, 1, 3), np.uint8)
    with pytest.raises(ValueError, match="at most 4000"):
        write_gallery(
            tmp_path / "h.npz",
            features=np.zeros((4001, 2)),
            crops=crops,
            labels=np.zeros(4001),
            classes=("a",),
            split=np.full(4001, "test"),
            patient=np.full(4001, "p"),
        )


def test_projector_sprite_holds_the_nuclei(inputs: Path, report: Path, tmp_path: Path) -> None:
    folder = report.parent / "projector"
    gallery = read_gallery(inputs / "gallery.npz")
    n = len(gallery.labels)
    tensors = np.loadtxt(next(folder.rglob("tensors.tsv")))
    lines = next(folder.rglob("metadata.tsv")).read_text().splitlines()
    assert tensors.shape == (n, 50) and lines[0] == "class\tsplit\tpatient" and len(lines) == n + 1
    sprite = np.asarray(Image.open(next(folder.rglob("sprite.png"))))
    across = int(np.ceil(np.sqrt(n)))
    assert sprite.shape == (across * 40, across * 40, 3)
    for i in (0, across, n - 1):
        top, left = i // across * 40, i % across * 40
        want = np.asarray(
            Image.fromarray(gallery.crops[i]).resize((40, 40), Image.Resampling.BICUBIC)
        )
        np.testing.assert_array_equal(sprite[top : top + 40, left : left + 40], want)
    assert all(thumb_side(m, 64) * np.ceil(np.sqrt(m)) <= 8192 for m in (1, 4000, 20000, 100000))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "precious").write_text("x")
    with pytest.raises(UserError, match="holds other files"):
        write_projector(tmp_path / "mine", gallery, np.zeros((n, 2), np.float32))


def test_rows_that_were_measured_again(tmp_path: Path) -> None:
    write_results(tmp_path, encoder="e")
    path = tmp_path / "results.jsonl"
    first = json.loads(path.read_text().splitlines()[0])
    again = json.dumps({**first, "value": 0.4321, "seed": 1})
    path.write_text(path.read_text() + again[:40] + "\n" + again + "\n")
    page = run(Report(results=(str(path),), out=tmp_path / "out"))
    rows = parsed(page).rows
    table = next(row for row in rows if len(row) == 7 and row[0] == "e")
    assert table[1].startswith("0.432")
    listed = [
        row[5] for row in rows if row[1:5] == ["e 01234567", "knn", "test", "balanced accuracy"]
    ]
    assert listed == [f"{first['value']:.4f}", "0.4321"]
    text = page.read_text(encoding="utf-8")
    assert "1 rows were measured again" in text and "of results.jsonl is cut off" in text
