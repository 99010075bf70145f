"""Pictures: the pixels are those of the images asked for, and odd inputs still draw."""

import itertools
import os
import pathlib
import subprocess
import sys

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib import image as mpl_image
from scipy.spatial.distance import pdist, squareform
from sklearn.datasets import load_digits

from dec_diffusion import report
from dec_diffusion.metrics import contingency
from dec_diffusion.report import history, latent, style, tables
from dec_diffusion.types import InputError

Path = pathlib.Path


def read(path: Path) -> np.ndarray:
    """uint8 [H, W, 3] of a PNG file; fails on anything else."""
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    pixels = np.round(mpl_image.imread(path)[..., :3] * 255).astype(np.uint8)
    assert min(pixels.shape[:2]) > 50
    assert pixels.std() > 1
    return pixels


def digits(n: int = 150) -> tuple[np.ndarray, np.ndarray]:
    x, labels = load_digits(return_X_y=True)
    return (x[:n] / 16).reshape(-1, 8, 8, 1).astype(np.float32), labels[:n]


def contains(picture: np.ndarray, tile: np.ndarray) -> bool:
    """Whether ``tile`` [h, w, 3] appears exactly somewhere in ``picture``."""
    h, w, _ = tile.shape
    windows = np.lib.stride_tricks.sliding_window_view(picture, (h, w), axis=(0, 1))
    # Rows of the tile are compared first: cheap enough for a whole picture.
    first = (windows[..., 0, :] == tile[0].T).all(axis=(2, 3))
    return any((windows[i, j] == tile.transpose(2, 0, 1)).all() for i, j in np.argwhere(first))


def records(n: int = 40) -> list[dict]:
    rows: list[dict] = [
        {"step": s, "phase": "pretrain" if s < 20 else "em", "loss": 5 / (s + 1)} for s in range(n)
    ]
    rows[-1] |= {"smallest_share": 0.1, "largest_share": 0.3, "clusters_nonempty": 4}
    return rows


# -- pure parts -------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("scale", "gap_after"), [(1, None), (3, 2)])
def test_grid_holds_each_image_where_it_says(channels: int, scale: int, gap_after) -> None:
    images = np.random.default_rng(0).random((3, 4, 5, 7, channels))
    present = np.ones((3, 4), bool)
    present[1, 2] = False
    canvas = report.compose_grid(images, present, scale=scale, gap_after=gap_after)
    assert canvas.dtype == np.uint8
    covered = np.zeros(canvas.shape[:2], bool)
    h, w = 5 * scale, 7 * scale
    for i, j in np.ndindex(3, 4):
        top, left = report.tile_origin(i, j, h, w, gap_after=gap_after)
        tile = canvas[top : top + h, left : left + w]
        assert tile.shape == (h, w, 3)
        assert not covered[top : top + h, left : left + w].any()
        covered[top : top + h, left : left + w] = True
        if present[i, j]:
            expected = np.kron(images[i, j], np.ones((scale, scale, 1)))
            np.testing.assert_allclose(tile, np.broadcast_to(expected * 255, tile.shape), atol=0.51)
        else:
            assert (tile == 255).all()
    assert (canvas[~covered] == 255).all()
    assert covered[-1, -1]


def test_grid_clips_and_marks_broken_pixels_and_takes_bytes() -> None:
    image = np.array([-1.0, 2.0, np.nan, 0.5]).reshape(1, 1, 1, 4, 1)
    row = report.compose_grid(image)[0]
    np.testing.assert_array_equal(row, [[0] * 3, [255] * 3, [255, 0, 255], [128] * 3])
    image = np.arange(6, dtype=np.uint8).reshape(1, 1, 1, 2, 3)
    np.testing.assert_array_equal(report.compose_grid(image)[0], [[0, 1, 2], [3, 4, 5]])


@pytest.mark.parametrize("shape", [(2, 3, 4, 4), (0, 3, 4, 4, 1)])
def test_grid_refuses_wrong_shapes(shape) -> None:
    with pytest.raises(InputError, match="images have shape"):
        report.compose_grid(np.zeros(shape))


def test_members_are_ordered_disjoint_and_of_the_cluster() -> None:
    rng = np.random.default_rng(0)
    labels, confidence = rng.integers(0, 3, 90), rng.random(90)
    high, low = report.members_to_show(labels, confidence, 1, most=6, least=3, seed=0)
    members = np.flatnonzero(labels == 1)
    ranked = members[np.argsort(-confidence[members])]
    np.testing.assert_array_equal(high, ranked[:6])
    np.testing.assert_array_equal(low, ranked[-3:])


@pytest.mark.parametrize(("size", "counts"), [(0, (0, 0)), (4, (4, 0)), (7, (6, 1)), (20, (6, 3))])
def test_small_clusters_show_each_member_once(size: int, counts: tuple[int, int]) -> None:
    labels, confidence = np.zeros(size, int), np.ones(size)
    high, low = report.members_to_show(labels, confidence, 0, most=6, least=3, seed=0)
    assert (len(high), len(low)) == counts
    assert len({*high, *low}) == sum(counts)


def test_ties_of_confidence_are_broken_by_the_seed_not_by_file_order() -> None:
    def top(seed: int) -> list[int]:
        ones = np.ones(500)
        return report.members_to_show(ones.astype(int), ones, 1, most=8, least=0, seed=seed)[
            0
        ].tolist()

    assert top(0) == top(0)
    assert top(0) != top(1)
    assert top(0) != list(range(8))


def test_colours_are_distinct_and_legible() -> None:
    colours = [report.cluster_colour(k) for k in range(100)]
    assert len(set(colours)) == 100
    rgb = np.array([[int(c[i : i + 2], 16) for i in (1, 3, 5)] for c in colours])
    assert rgb.shape == (100, 3)
    distances = squareform(pdist(rgb)) + 1e3 * np.eye(100)
    assert distances[:10, :10].min() > 40
    assert (rgb @ [0.299, 0.587, 0.114]).max() < 200  # seen on white


@pytest.mark.parametrize("d", [1, 2, 3, 20])
def test_projection_is_seeded_and_finite(d: int) -> None:
    x = np.random.default_rng(0).normal(size=(40, d))
    flat, _ = report.project(x, seed=0)
    assert flat.shape == (40, 2)
    assert np.isfinite(flat).all()
    np.testing.assert_array_equal(flat, report.project(x, seed=0)[0])


def test_projection_keeps_neighbourhoods() -> None:
    labels = np.repeat(np.arange(4), 25)
    x = 20 * np.eye(8)[labels] + np.random.default_rng(0).normal(size=(100, 8))
    flat, method = report.project(x, seed=0)
    assert method == "t-SNE"
    nearest = (squareform(pdist(flat)) + 1e9 * np.eye(100)).argmin(axis=1)
    np.testing.assert_array_equal(labels[nearest], labels)


@pytest.mark.parametrize("x", [np.ones((30, 5)), np.eye(4), np.ones((1, 3))])
def test_projection_falls_back_to_principal_axes(x: np.ndarray) -> None:
    flat, method = report.project(x)
    assert method == "PCA"
    assert flat.shape == (len(x), 2)
    assert np.isfinite(flat).all()


# -- pictures ---------------------------------------------------------------------------------


def test_images_by_cluster_shows_the_most_and_the_least_confident(tmp_path: Path) -> None:
    images, labels = digits()
    confidence = np.random.default_rng(0).permutation(np.linspace(0.2, 1, len(labels)))
    report.images_by_cluster(
        tmp_path / "a.png", images, labels, confidence, num_clusters=10, per_cluster=3, least=2
    )
    picture = read(tmp_path / "a.png")
    shown = set()
    for k in range(10):
        lists = report.members_to_show(labels, confidence, k, most=3, least=2, seed=0)
        shown |= {*lists[0].tolist(), *lists[1].tolist()}
    assert len(shown) == 50
    left_out = next(i for i in np.argsort(-confidence) if i not in shown)
    some = [*sorted(shown)[::10], left_out]
    tiles = report.compose_grid(images[some][None], scale=8)
    found = [
        contains(picture, tiles[:, left : left + 64])
        for left in (report.tile_origin(0, j, 64, 64)[1] for j in range(len(some)))
    ]
    assert found == [True] * (len(some) - 1) + [False]


@pytest.mark.parametrize(
    ("shape", "clusters", "per_cluster"),
    [
        ((20, 8, 8, 1), 4, 12),  # fewer members than places
        ((5, 9, 5, 3), 1, 12),  # one cluster, odd and oblong, colour
        ((1, 1, 1, 1), 3, 2),
        ((40, 130, 201, 3), 3, 4),  # larger than a tile
        ((30, 12, 12, 2), 2, 3),  # two channels
        ((200, 8, 8, 1), 130, 4),  # more clusters than rows
    ],
)
def test_images_by_cluster_takes_odd_inputs(tmp_path: Path, shape, clusters, per_cluster) -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, max(1, clusters - 1), shape[0])  # the last cluster is empty
    report.images_by_cluster(
        tmp_path / "a.png",
        rng.random(shape, dtype=np.float32),
        labels,
        rng.random(shape[0]),
        num_clusters=clusters,
        per_cluster=per_cluster,
    )
    assert max(read(tmp_path / "a.png").shape) < 6000


def test_large_images_are_averaged_not_cropped(tmp_path: Path) -> None:
    image = np.zeros((1, 1, 200, 200, 1))
    image[..., 100:, :] = 1  # left half black, right half white
    report.generated_by_cluster(tmp_path / "a.png", image)
    picture = read(tmp_path / "a.png")
    black = np.argwhere((picture == 0).all(axis=2))
    height, width = np.ptp(black, axis=0) + 1
    assert 60 <= height <= 96
    assert abs(height - 2 * width) <= 2


def test_generated_by_cluster_shows_every_image(tmp_path: Path) -> None:
    images = digits(6)[0].reshape(2, 3, 8, 8, 1)
    report.generated_by_cluster(tmp_path / "a.png", images, captions=["60 %", "40 %"])
    picture = read(tmp_path / "a.png")
    assert contains(picture, report.compose_grid(images, scale=8))


def test_rows_carry_the_cluster_colour(tmp_path: Path) -> None:
    report.generated_by_cluster(tmp_path / "a.png", np.zeros((12, 2, 8, 8, 1)))
    picture = read(tmp_path / "a.png").reshape(-1, 3)
    for k in range(12):
        colour = [int(report.cluster_colour(k)[i : i + 2], 16) for i in (1, 3, 5)]
        assert (picture == colour).all(axis=1).sum() >= 4 * 60


@pytest.mark.parametrize("with_labels", [False, True])
@pytest.mark.parametrize(("n", "d", "k"), [(120, 6, 3), (3, 4, 3), (60, 2, 50), (1, 1, 1)])
def test_latent_map_draws(tmp_path: Path, n: int, d: int, k: int, with_labels: bool) -> None:
    rng = np.random.default_rng(0)
    classes = np.array(["cat", "dog", "a very long name of a class"])[rng.integers(0, 3, n)]
    report.latent_map(
        tmp_path / "a.png",
        rng.normal(size=(n, d)),
        rng.integers(0, k, n),
        labels_true=classes if with_labels else None,
    )
    read(tmp_path / "a.png")


def test_latent_map_names_the_classes_as_they_are(tmp_path: Path, monkeypatch) -> None:
    drawn = []
    monkeypatch.setattr(latent, "save", lambda figure, path, dpi: drawn.append(figure))
    classes = np.array([r"$\oops$", "expression of gene A", "expression of gene B"] * 10)
    x = np.random.default_rng(0).normal(size=(30, 2))
    report.latent_map(tmp_path / "a.png", x, np.zeros(30, int), labels_true=classes)
    shown = {text.get_text() for text in drawn[0].axes[1].texts}
    assert shown == {r"$\oops$", "expressi…of gene A", "expressi…of gene B"}
    drawn[0].canvas.draw()  # a formula between dollars would be one that cannot be drawn


def test_latent_map_colours_points_by_cluster_and_samples(tmp_path: Path) -> None:
    x = np.random.default_rng(0).normal(size=(400, 2))
    labels = np.full(400, 3)
    report.latent_map(tmp_path / "all.png", x, labels, sample=400)
    report.latent_map(tmp_path / "few.png", x, labels, sample=20)

    def ink(name: str) -> int:
        red, green, blue = read(tmp_path / name).astype(int).transpose(2, 0, 1)
        return int(((red > green + 60) & (red > blue + 60)).sum())  # colour 3 is red

    assert ink("all.png") > 1.5 * ink("few.png") > 0


def test_curves_draw_one_panel_per_group_with_data(tmp_path: Path) -> None:
    rows = records()
    report.curves(tmp_path / "few.png", rows)
    report.curves(tmp_path / "more.png", [*rows, {"step": 50, "acc": 0.5, "silhouette": 0.1}])
    report.curves(tmp_path / "one.png", rows, {"mine": ["loss"]})
    heights = [read(tmp_path / f"{name}.png").shape[0] for name in ("one", "few", "more")]
    # 1, 3 and 5 panels.
    assert heights[1] - heights[0] > 200
    assert heights[2] - heights[1] == pytest.approx(heights[1] - heights[0], abs=3)


def test_every_curve_is_of_a_figure_that_some_method_logs() -> None:
    package = Path(report.__file__).parents[1]
    files = [package / "engine.py", package / "metrics.py", *(package / "methods").glob("*.py")]
    sources = "".join(file.read_text() for file in files)
    for name in itertools.chain(*history.GROUPS.values()):
        assert f'"{name}": ' in sources, name


def test_curves_forget_what_a_resumed_run_repeated(tmp_path: Path) -> None:
    rows = records()
    stale = [row | {"loss": 1e6} for row in rows[10:20]]
    report.curves(tmp_path / "clean.png", rows)
    report.curves(tmp_path / "resumed.png", [*rows[:10], *stale, *rows[10:]])
    np.testing.assert_array_equal(read(tmp_path / "clean.png"), read(tmp_path / "resumed.png"))


@pytest.mark.parametrize(
    "rows",
    [
        [{"step": 3, "loss": 1.0}],
        [{"step": s, "loss": float("nan") if s % 3 else -s} for s in range(9)],
        [{"step": s, "loss": float("nan")} for s in range(3)],
        [{"step": s, "loss": np.float32(s), "note": "x", "flag": True} for s in range(500)],
        [{"loss": 2.0}, {"step": 1, "loss": 1.0}, {"step": 2, "clusters_nonempty": 0}],
    ],
)
def test_curves_take_odd_records(tmp_path: Path, rows) -> None:
    report.curves(tmp_path / "a.png", rows)
    read(tmp_path / "a.png")


@pytest.mark.parametrize("shape", [(1, 1), (4, 4), (3, 7), (7, 3), (4, 60)])
def test_confusion_draws(tmp_path: Path, shape) -> None:
    table = np.random.default_rng(0).integers(0, 2000, shape)
    table[-1, 0] = 0
    report.confusion(tmp_path / "a.png", table, [f"c{i}" for i in range(shape[0])], range(shape[1]))
    read(tmp_path / "a.png")


def test_confusion_puts_matched_pairs_on_the_diagonal(tmp_path: Path) -> None:
    labels = np.repeat(np.arange(5), 4)
    names = np.array([3, 1, 4, 0, 2])
    report.confusion(tmp_path / "a.png", *contingency(labels, names[labels]))
    picture = read(tmp_path / "a.png").astype(int)
    # The full colour of the map: dark blue cells.
    dark = np.argwhere((picture[..., 2] > picture[..., 0] + 60) & (picture[..., 0] < 30))
    dark = dark[dark[:, 1] < 0.8 * picture.shape[1]]  # not the colour bar
    assert len(dark) > 1000
    assert np.corrcoef(dark.T)[0, 1] > 0.9


def test_confusion_has_classes_without_a_cluster_last(tmp_path: Path, monkeypatch) -> None:
    drawn = []
    monkeypatch.setattr(tables, "save", lambda figure, path, dpi: drawn.append(figure))
    counts = np.array([[0, 9], [1, 1], [8, 0]])
    report.confusion(tmp_path / "a.png", counts, ["a", "b", "c"], [0, 1])
    axes = drawn[0].axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["a", "c", "b"]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["1", "0"]
    np.testing.assert_array_equal(axes.images[0].get_array(), [[1, 0], [0, 1], [0.5, 0.5]])


@pytest.mark.parametrize(("n", "d", "k"), [(40, 13, 4), (3, 1, 1), (50, 300, 12), (300, 4, 120)])
def test_centres_draw(tmp_path: Path, n: int, d: int, k: int) -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(n, d)) * 10.0 ** rng.integers(-3, 4, d)
    x[:, 0] = 5.0  # constant
    labels = rng.integers(0, max(1, k - 1), n)
    report.centres(tmp_path / "a.png", x, labels, num_clusters=k)
    assert max(read(tmp_path / "a.png").shape) < 6000


def test_centres_name_the_features_and_tell_long_names_apart(tmp_path: Path, monkeypatch) -> None:
    drawn = []
    monkeypatch.setattr(tables, "save", lambda figure, path, dpi: drawn.append(figure))
    x, labels = np.random.default_rng(0).normal(size=(20, 4)), np.arange(20) % 2
    # The last two begin alike; a formula between dollars would be one that cannot be drawn.
    names = ["mass", r"$\oops$", "expression of gene A", "expression of gene B"]
    report.centres(tmp_path / "a.png", x, labels, num_clusters=2, feature_names=names)
    shown = [label.get_text() for label in drawn[0].axes[0].get_xticklabels()]
    assert shown == ["mass", r"$\oops$", "expressi…of gene A", "expressi…of gene B"]
    drawn[0].canvas.draw()


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["short", "a name of nineteen."], ["short", "a name of ninetee…"]),
        (["x" * 20 + "1", "x" * 20 + "2"], ["xxxxxxxx…xxxxxxxx1", "xxxxxxxx…xxxxxxxx2"]),
        (["x" * 20 + c + "y" * 20 for c in "ab"], ["x" * 16 + "…0", "x" * 16 + "…1"]),
        (["x" * 20, "x" * 20], ["x" * 17 + "…"] * 2),
    ],
)
def test_names_that_are_cut_stay_different(names, expected) -> None:
    assert style.short_names(names) == expected


# -- conduct ----------------------------------------------------------------------------------


def draw_all(folder: Path) -> None:
    images, labels = digits(60)
    flat = images.reshape(len(images), -1)
    confidence = np.linspace(0, 1, len(labels))
    report.images_by_cluster(folder / "a.png", images, labels, confidence, num_clusters=10)
    report.generated_by_cluster(folder / "b.png", images.reshape(10, 6, 8, 8, 1))
    report.latent_map(folder / "c.png", flat, labels, labels_true=labels)
    report.curves(folder / "d.png", records())
    report.confusion(folder / "e.png", *contingency(labels, labels))
    report.centres(folder / "f.png", flat, labels, num_clusters=10)


def test_same_input_same_files_and_settings_of_matplotlib_untouched(tmp_path: Path) -> None:
    before = dict(mpl.rcParams)
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        draw_all(tmp_path / name)
    assert dict(mpl.rcParams) == before
    for file in sorted((tmp_path / "one").iterdir()):
        assert file.read_bytes() == (tmp_path / "two" / file.name).read_bytes(), file.name


def test_matplotlib_is_imported_late_and_pyplot_never(tmp_path: Path) -> None:
    code = (
        "import sys, numpy as np; from dec_diffusion import report;"
        "assert 'matplotlib' not in sys.modules;"
        f"report.generated_by_cluster({str(tmp_path / 'a.png')!r}, np.zeros((2, 2, 8, 8, 1)));"
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    environment = {k: v for k, v in os.environ.items() if k not in ("DISPLAY", "MPLBACKEND")}
    root = Path(report.__file__).parents[2]
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root, env=environment)
    read(tmp_path / "a.png")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p: report.images_by_cluster(p, np.ones((2, 8, 8)), [0, 1], [1, 1], num_clusters=2),
         "expected \\[n, h, w, c\\]"),
        (lambda p: report.images_by_cluster(
            p, np.ones((2, 8, 8, 1)), [0, 2], [1, 1], num_clusters=2), "below num_clusters=2"),
        (lambda p: report.images_by_cluster(
            p, np.ones((2, 8, 8, 1)), [0, 1], [1], num_clusters=2), "confidence has shape"),
        (lambda p: report.generated_by_cluster(p, np.ones((2, 8, 8, 1))), "k, m, h, w, c"),
        (lambda p: report.generated_by_cluster(p, np.ones((2, 1, 8, 8, 1)), captions=["a"]),
         "captions"),
        (lambda p: report.latent_map(p, np.ones((2, 3)), [0]), "labels have shape"),
        (lambda p: report.latent_map(p, np.ones((2, 3)), [0, -1]), "integers from 0"),
        (lambda p: report.latent_map(p, np.full((2, 3), np.nan), [0, 1]), "NaN"),
        (lambda p: report.latent_map(p, np.ones((2, 3)), [0, 1], labels_true=[0]), "labels_true"),
        (lambda p: report.curves(p, [{"step": 1, "other": 2}]), "no metric to draw"),
        (lambda p: report.curves(p, []), "no metric to draw"),
        (lambda p: report.confusion(p, np.ones((2, 3)), [0, 1], [0, 1]), "table has shape"),
        (lambda p: report.centres(p, np.ones(3), [0, 0, 0], num_clusters=1), "expected \\[n, d\\]"),
        (lambda p: report.centres(
            p, np.ones((2, 2)), [0, 0], num_clusters=1, feature_names=["a"]), "feature_names"),
    ],
)  # fmt: skip
def test_bad_input_is_refused_and_nothing_written(tmp_path: Path, call, message: str) -> None:
    with pytest.raises(InputError, match=message):
        call(tmp_path / "a.png")
    assert not list(tmp_path.iterdir())
