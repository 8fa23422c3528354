"""The atlas in a real browser, opened from disk: hover, colours, lasso, CSV, neighbours, keys."""

import csv
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pytest

from eval.atlas import Atlas, run
from tests.eval.atlas_material import cell, write_embedded, write_tissue
from tests.eval.atlas_material import opened as read

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

N = 5000
NASTY = "</script><b>bold</b> & \"quoted\", 'kind'"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
# A browser without a GPU: WebGL in software, so that the real shaders run.
FLAGS = ["--no-sandbox", "--use-angle=swiftshader", "--enable-unsafe-swiftshader"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, anndata.AnnData]:
    """A page of 5,000 nuclei and the file it is made from; one kind has a nasty name."""
    folder = tmp_path_factory.mktemp("browser")
    file = write_embedded(
        folder / "e.h5ad", write_tissue(folder, slides=2, side=512), nuclei=N, kinds_apart=3
    )
    file.obs["type"] = file.obs["type"].cat.rename_categories({"tumour": NASTY})
    file.write_h5ad(folder / "e.h5ad")
    title = "Nuclei of <i>tissue</i>"
    words = Atlas(data=folder / "e.h5ad", out=folder / "p", projection="pca", title=title)
    return run(words), file


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if not CHROMIUM:
        pytest.skip("there is no chromium on this machine")
    with playwright.sync_playwright() as api:
        started = api.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield started
        started.close()


@pytest.fixture
def page(browser: Any, made: tuple[Path, anndata.AnnData]) -> Iterator[Any]:
    """The page, opened from disk with the network off; nothing may complain."""
    with opened(browser, made[0]) as page:
        yield page


class opened:  # noqa: N801
    """A page as a context; it fails on any error or warning of the console."""

    def __init__(self, browser: Any, path: Path) -> None:
        self.context = browser.new_context(
            viewport={"width": 1200, "height": 800}, offline=True, color_scheme="light"
        )
        self.context.set_default_timeout(60_000)
        self.path = path
        self.said: list[str] = []

    def __enter__(self) -> Any:
        page = self.context.new_page()
        page.on("pageerror", lambda error: self.said.append(str(error)))
        page.on("console", lambda message: self.said.append(message.text))
        page.on("requestfailed", lambda request: self.said.append(request.url[:200]))
        page.goto(self.path.as_uri())
        page.wait_for_function("typeof state === 'object' && state.column && !plot.waiting")
        return page

    def __exit__(self, *_: Any) -> None:
        self.context.close()
        assert self.said == []


def at(page: Any, row: int) -> tuple[float, float]:
    """Where a nucleus is in the window, px."""
    x, y = page.evaluate(
        f"(() => {{ const b = over.getBoundingClientRect(), p = plot.screen({row});"
        " return [p[0] + b.left, p[1] + b.top]; })()"
    )
    return x, y


def alone(page: Any) -> int:
    """A nucleus that no other covers, so that the mouse can mean only it."""
    return page.evaluate(
        """(() => { for (let i = 0; i < DATA.n; i++) {
          const [x, y] = plot.screen(i); let near = 0;
          if (x < 60 || y < 90 || x > plot.width - 60 || y > plot.height - 60) continue;
          for (let j = 0; j < DATA.n && near < 2; j++) {
            const [u, v] = plot.screen(j); near += Math.hypot(u - x, v - y) < 6; }
          if (near === 1) return i; } })()"""
    )


def dot_colour(page: Any, row: int) -> list[int]:
    """What is painted in the middle of a nucleus, r g b a, read off the canvas."""
    return page.evaluate(
        f"""(() => {{ plot.drawDots(); const [x, y] = plot.screen({row}), gl = plot.gl;
          const out = new Uint8Array(4);
          gl.readPixels(Math.round(x * plot.dpr), Math.round((plot.height - y) * plot.dpr) - 1,
            1, 1, gl.RGBA, gl.UNSIGNED_BYTE, out);
          return Array.from(out); }})()"""
    )


def test_hover_shows_thumbnail_and_facts(page: Any, made: tuple[Path, anndata.AnnData]) -> None:
    row = alone(page)
    page.mouse.move(*at(page, row))
    tip = page.locator("#tip")
    tip.wait_for(state="visible")
    name = page.evaluate(f"DATA.ids[{row}]")
    said, obs = tip.inner_text(), made[1].obs.loc[name]
    assert name in said and obs["type"] in said and obs["slide"] in said
    picture = tip.locator(".thumb").evaluate("e => getComputedStyle(e).backgroundImage")
    assert picture.startswith('url("blob:')
    page.mouse.move(*(np.array(at(page, row)) + 3000) % 5 + [300, 795])
    tip.wait_for(state="hidden")


def test_colour_follows_the_menu(page: Any, made: tuple[Path, anndata.AnnData]) -> None:
    row = alone(page)
    name = page.evaluate(f"DATA.ids[{row}]")
    kind = made[1].obs.loc[name, "type"]
    legend = page.locator("#legend button", has_text=kind)
    wanted = legend.locator(".swatch").evaluate("e => getComputedStyle(e).backgroundColor")
    rgb = np.array([int(v) for v in wanted[4:-1].split(",")])
    r, g, b, a = dot_colour(page, row)
    # The canvas holds colours multiplied by their opacity.
    assert a > 150 and np.abs(np.array([r, g, b]) - rgb * a / 255).max() < 6
    page.select_option("#colour", "area")
    assert page.locator("#legend .ramp").count() == 1
    assert dot_colour(page, row)[:3] != [r, g, b]
    page.select_option("#colour", "type")
    page.locator("#legend button", has_text=kind).click()  # hides the kind
    assert dot_colour(page, row)[3] == 0 or page.evaluate(f"!seen({row})")
    page.mouse.move(*at(page, row))
    assert not page.locator("#tip").is_visible()


def test_lasso_gives_contact_sheet_and_csv(
    page: Any, made: tuple[Path, anndata.AnnData], tmp_path: Path
) -> None:
    corners = [(250, 250), (620, 230), (650, 420), (400, 560), (260, 480)]
    page.click("#lasso")
    page.mouse.move(*corners[0])
    page.mouse.down()
    for corner in corners[1:]:
        page.mouse.move(*corner)
    page.mouse.up()
    places = np.array(page.evaluate("Array.from({length: DATA.n}, (_, i) => plot.screen(i))"))
    box = page.evaluate("(() => { const b = over.getBoundingClientRect(); return [b.x, b.y]; })()")
    wanted = inside(places + box, np.array(corners, float))
    assert 50 < wanted.sum() < N - 50
    with page.expect_download() as download:
        page.click("#csv")
    download.value.save_as(tmp_path / "nuclei.csv")
    with (tmp_path / "nuclei.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    ids = np.array(page.evaluate("DATA.ids"))
    assert [row["id"] for row in rows] == ids[wanted].tolist()
    obs = made[1].obs.loc[[row["id"] for row in rows]]
    assert [row["type"] for row in rows] == obs["type"].tolist()
    assert NASTY in {row["type"] for row in rows}
    for name in ("x_px", "y_um", "score", "area"):
        np.testing.assert_allclose([float(row[name]) for row in rows], obs[name], rtol=1e-6)
    assert page.locator("#selection .thumb").count() == min(240, len(rows))
    assert f"{len(rows):,} of 5,000 nuclei" in page.locator("#selection").inner_text()
    page.click("#clear")
    assert page.locator("#selection .thumb").count() == 0 and page.locator("#csv").is_disabled()


def inside(points: np.ndarray, corners: np.ndarray) -> np.ndarray:
    """By the sum of angles: bool [n]."""
    to = corners[None] - points[:, None]
    angle = np.arctan2(to[..., 1], to[..., 0])
    turn = np.diff(np.concatenate([angle, angle[:, :1]], 1), axis=1)
    return np.abs(((turn + np.pi) % (2 * np.pi) - np.pi).sum(1)) > np.pi


def test_click_shows_the_nearest(page: Any, made: tuple[Path, anndata.AnnData]) -> None:
    row = alone(page)
    page.mouse.click(*at(page, row))
    shown = page.locator("#focus .near .thumb")
    shown.first.wait_for()
    ids = page.evaluate("DATA.ids")
    X = np.asarray(made[1].X, np.float64)
    X /= np.linalg.norm(X, axis=1, keepdims=True)
    own = made[1].obs_names.get_loc(ids[row])
    cosine = X @ X[own]
    cosine[own] = -2
    best = made[1].obs_names[np.argsort(-cosine)[:12]]
    found = [ids[int(e.get_attribute("data-row"))] for e in shown.all()]
    assert found == best.tolist()
    said = [float(text) for text in page.locator("#focus figcaption").all_inner_texts()]
    np.testing.assert_allclose(said, np.sort(cosine)[::-1][:12], atol=6e-4)
    shown.nth(2).click()  # from neighbour to neighbour
    assert found[2] in page.locator("#focus .card").inner_text()


def test_works_by_keyboard_alone(page: Any) -> None:
    page.locator("#over").focus()
    for _ in range(4):
        page.keyboard.press("+")
    page.keyboard.press("Enter")
    page.locator("#focus .near .thumb").first.wait_for()
    page.locator("#inview").focus()
    page.keyboard.press("Enter")
    chosen = page.evaluate("state.chosen.length")
    assert 0 < chosen < N
    page.fill("#id", "n000042")
    page.keyboard.press("Enter")
    assert "n000042" in page.locator("#focus .card").inner_text()
    unnamed = page.evaluate(
        """Array.from(document.querySelectorAll("button,select,input")).filter((e) =>
        !(e.textContent.trim() || e.getAttribute("aria-label") || e.labels?.length)).length"""
    )
    assert unnamed == 0


def test_words_are_never_markup_and_dark_is_dark(page: Any) -> None:
    assert page.locator("h1").inner_text() == "Nuclei of <i>tissue</i>"
    assert page.locator("i, b").count() == 0
    page.click("#theme")
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert max(int(v) for v in ground[4:-1].split(",")) < 40
    page.click("#pictures")
    page.wait_for_function("!plot.waiting && SHEETS.image(0, () => {}) !== null")


def test_pictures_are_of_their_nuclei_and_move_with_the_map(
    page: Any, made: tuple[Path, anndata.AnnData]
) -> None:
    def shown() -> dict[int, tuple[int, int]]:
        """Row -> corner of its frame, of the nuclei that lie wholly in view."""
        page.wait_for_function("!plot.waiting && PICTURES.chosen().every((o) => PICTURES.has(o.i))")
        found = page.evaluate(
            "PICTURES.chosen().filter((o) => o.x > 40 && o.y > 40 && o.x < plot.width - 90"
            " && o.y < plot.height - 90).map((o) => [o.i, o.x, o.y])"
        )
        return {i: (x, y) for i, x, y in found}

    page.click("#pictures")
    before, kept = shown(), read(made[0])
    assert len(before) > 30
    painted = page.evaluate(
        """(rows) => { const w = over.width, out = [];
          const { data } = over.getContext("2d").getImageData(0, 0, w, over.height);
          for (const [x, y] of rows) for (let v = y + 2; v < y + 42; v++)
            out.push(Array.from(data.subarray(4 * (v * w + x + 2), 4 * (v * w + x + 42))));
          return out; }""",
        [list(before[row]) for row in list(before)[::7]],
    )
    for row, found in zip(list(before)[::7], np.array(painted).reshape(-1, 40, 40, 4), strict=True):
        assert np.abs(found[..., :3] - cell(kept, row)).mean() < 2
    left, top = page.evaluate("[over.getBoundingClientRect().x, over.getBoundingClientRect().y]")
    page.mouse.move(left + 400, top + 300)
    page.mouse.down()
    page.mouse.move(left + 420, top + 310)
    page.mouse.move(left + 431, top + 317)
    page.mouse.up()
    after = shown()
    both = set(before) & set(after)
    assert len(both) > 0.7 * len(before)
    moved = np.array([np.subtract(after[i], before[i]) for i in both])
    assert np.abs(moved - [31, 17]).max() <= 1


def test_many_nuclei_and_no_webgl(browser: Any, tmp_path: Path) -> None:
    """The page with files beside it, and the plain canvas that draws where WebGL is missing."""
    tissue = write_tissue(tmp_path, slides=1, side=256)
    file = write_embedded(tmp_path / "e.h5ad", tissue, nuclei=10_001, dim=6)
    file.obs["patient"] = ""  # as embed writes it where the file name says no patient
    file.write_h5ad(tmp_path / "e.h5ad")
    path = run(Atlas(data=tmp_path / "e.h5ad", out=tmp_path / "p", projection="pca", neighbours=3))
    with opened(browser, path) as page:
        page.mouse.click(*at(page, 700))
        assert page.locator("#focus .near .thumb").count() == 3
        said = page.locator("#focus .card").inner_text()
        assert "cluster" in said and "patient" not in said
    view = opened(browser, path)
    view.context.add_init_script(
        "const real = HTMLCanvasElement.prototype.getContext;"
        "HTMLCanvasElement.prototype.getContext = function (kind, ...rest) {"
        " return kind === 'webgl' ? null : real.call(this, kind, ...rest); };"
    )
    with view as page:
        painted = page.evaluate(
            "(() => { plot.drawFlat(); const c = points, d = c.getContext('2d')"
            ".getImageData(0, 0, c.width, c.height).data; let n = 0;"
            " for (let k = 3; k < d.length; k += 4) n += d[k] > 0; return n; })()"
        )
        assert painted > 5000
