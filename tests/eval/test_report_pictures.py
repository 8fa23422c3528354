"""What the report's pictures are made of, against plain loops and scikit-learn."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from eval.report import embedding, retrieval
from eval.report.gallery import Gallery, choose_rows, read_gallery, write_gallery
from eval.report.projector import thumb_side, write_projector
from lemon_muse.errors import UserError
from tests.eval.report_material import CLASSES, write_nuclei


@pytest.fixture(scope="module")
def gallery(tmp_path_factory: pytest.TempPathFactory) -> Gallery:
    """Some nuclei with features."""
    path = tmp_path_factory.mktemp("gallery") / "gallery.npz"
    write_nuclei(path, None)
    return read_gallery(path)


def test_neighbours_equal_a_plain_loop() -> None:
    rng = np.random.default_rng(0)
    queries, base = rng.normal(0, 1, (23, 9)), rng.normal(0, 3, (71, 9))
    got = retrieval.nearest(queries, base, 10)
    for query, found in zip(queries, got, strict=True):
        cosine = [float(query @ b / np.linalg.norm(query) / np.linalg.norm(b)) for b in base]
        assert found.tolist() == sorted(range(71), key=lambda i: -cosine[i])[:10]


def test_retrieval_searches_train_only(gallery: Gallery) -> None:
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


def test_components_are_those_of_scikit_learn(gallery: Gallery) -> None:
    from sklearn.decomposition import PCA
    from sklearn.preprocessing import normalize

    features = gallery.features
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


def test_projector_sprite_holds_the_nuclei(gallery: Gallery, tmp_path: Path) -> None:
    vectors = embedding.principal(gallery.features)
    assert vectors is not None
    folder = write_projector(tmp_path / "projector", gallery, vectors)
    assert write_projector(folder, gallery, vectors) == folder  # a second time replaces the first
    n = len(gallery.labels)
    tensors = np.loadtxt(next(folder.rglob("tensors.tsv")))
    lines = next(folder.rglob("metadata.tsv")).read_text().splitlines()
    np.testing.assert_allclose(tensors, vectors, rtol=1e-5)
    assert lines[0] == "class\tsplit\tpatient" and len(lines) == n + 1
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
