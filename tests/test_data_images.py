"""CIFAR, STL-10 and folders of images, on real files written by the tests."""

import csv
import io
import os
import pickle
import tarfile
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dec_diffusion import data, main
from dec_diffusion.data.decode import common_size
from dec_diffusion.types import InputError

RNG = np.random.default_rng(0)
CIFAR = RNG.integers(0, 256, (14, 32, 32, 3), dtype=np.uint8)
STL = RNG.integers(0, 256, (9, 96, 96, 3), dtype=np.uint8)


def load(name, path, **options):
    return data.load(data.DataConfig(name=name, path=str(path), **options))


def refused(name, path, **options) -> str:
    """The one line that a bad input gets."""
    with pytest.raises(InputError) as error:
        load(name, path, **options)
    message = str(error.value)
    assert "\n" not in message
    return message


# --- CIFAR and STL-10 --------------------------------------------------------------------------


def cifar_bytes(images, *labels):
    """Records of label bytes, then the red, the green and the blue plane row by row."""
    out = b""
    for i, image in enumerate(images):
        out += bytes(int(column[i]) for column in labels)
        out += b"".join(image[..., channel].tobytes() for channel in range(3))
    return out


LABELS10 = np.arange(14) % 10
COARSE, FINE = np.arange(14) % 20, 99 - np.arange(14)
CIFAR10 = {
    f"data_batch_{i + 1}.bin": cifar_bytes(CIFAR[2 * i : 2 * i + 2], LABELS10[2 * i : 2 * i + 2])
    for i in range(5)
} | {"test_batch.bin": cifar_bytes(CIFAR[10:], LABELS10[10:])}
CIFAR100 = {
    "train.bin": cifar_bytes(CIFAR[:10], COARSE[:10], FINE[:10]),
    "test.bin": cifar_bytes(CIFAR[10:], COARSE[10:], FINE[10:]),
}


def stl_bytes(images):
    """Each image as its red, green and blue plane, every plane column by column."""
    return b"".join(i[..., channel].tobytes(order="F") for i in images for channel in range(3))


STL10 = {
    "train_X.bin": stl_bytes(STL[:3]),
    "train_y.bin": bytes([1, 10, 2]),
    "test_X.bin": stl_bytes(STL[3:5]),
    "test_y.bin": bytes([3, 4]),
    "unlabeled_X.bin": stl_bytes(STL[5:]),
}
ALL = {"cifar10": CIFAR10, "cifar100": CIFAR100, "stl10": STL10}
STL_LABELS = np.array([0, 9, 1, 2, 3])


def write(folder: Path, files: dict[str, bytes], form: str = "folder") -> Path:
    """The files in a folder, in a folder of a folder, or in an archive as it is downloaded."""
    inner = folder / "extracted"
    inner.mkdir(parents=True, exist_ok=True)
    if form != "archive":
        for name, content in files.items():
            (inner / name).write_bytes(content)
        return inner if form == "folder" else folder
    with tarfile.open(folder / "download.tar.gz", "w:gz") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(f"extracted/{name}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return folder / "download.tar.gz"


@pytest.mark.parametrize("form", ["folder", "above", "archive"])
@pytest.mark.parametrize(
    ("split", "part"), [("train", slice(10)), ("test", slice(10, 14)), ("all", slice(14))]
)
@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar(tmp_path, name, form, split, part):
    dataset = load(name, write(tmp_path, ALL[name], form), split=split)
    np.testing.assert_array_equal(dataset.examples, CIFAR[part])
    np.testing.assert_array_equal(dataset.labels, {"cifar10": LABELS10}.get(name, COARSE)[part])
    assert dataset.examples.dtype == np.uint8
    assert (dataset.name, dataset.offset, dataset.scale) == (name, 127.5, 127.5)


def test_cifar100_has_two_kinds_of_labels(tmp_path):
    path = write(tmp_path, CIFAR100)
    np.testing.assert_array_equal(load("cifar100", path, label_key="fine").labels, FINE)
    np.testing.assert_array_equal(load("cifar100", path, label_key="coarse").labels, COARSE)


@pytest.mark.parametrize("form", ["folder", "above", "archive"])
@pytest.mark.parametrize(
    ("split", "part"),
    [("train", slice(3)), ("test", slice(3, 5)), ("all", slice(5)), ("unlabeled", slice(5, 9))],
)
def test_stl10(tmp_path, form, split, part):
    dataset = load("stl10", write(tmp_path, STL10, form), split=split)
    np.testing.assert_array_equal(dataset.examples, STL[part])
    assert dataset.examples.dtype == np.uint8
    if split == "unlabeled":
        assert dataset.labels is None
    else:
        np.testing.assert_array_equal(dataset.labels, STL_LABELS[part])


@pytest.mark.parametrize("name", ["cifar10", "stl10"])
def test_a_limit_keeps_examples_labels_and_rows_together(tmp_path, name):
    path = write(tmp_path, ALL[name])
    whole, part = load(name, path), load(name, path, limit=4)
    assert part.num_examples == 4
    np.testing.assert_array_equal(part.examples, whole.examples[part.rows])
    np.testing.assert_array_equal(part.labels, whole.labels[part.rows])


_BAD_BINARY = {
    "no path": ("cifar10", lambda t: t / "no", {}, ["does not exist"]),
    "missing batch": (
        "cifar10",
        lambda t: write(t, {k: v for k, v in CIFAR10.items() if "3" not in k}),
        {},
        ["no data_batch_3.bin", "cifar-10-binary.tar.gz", "--config.data.path"],
    ),
    "other set": ("cifar100", lambda t: write(t, CIFAR10), {}, ["no train.bin", "cifar-100"]),
    "truncated": (
        "cifar10",
        lambda t: write(t, CIFAR10 | {"data_batch_2.bin": CIFAR10["data_batch_2.bin"][:-7]}),
        {},
        ["data_batch_2.bin", "6139 bytes", "3073", "truncated"],
    ),
    "empty": (
        "stl10",
        lambda t: write(t, STL10 | {"test_X.bin": b""}),
        {},
        ["test_X.bin: is empt"],
    ),
    "labels too large": (
        "cifar10",
        lambda t: write(t, CIFAR10 | {"test_batch.bin": bytes([10]) + bytes(3072)}),
        {},
        ["test_batch.bin", "label of 10", "download"],
    ),
    "pickled folder": (
        "cifar10",
        lambda t: write(t, {"data_batch_1": pickle.dumps({}), "test_batch": b"x"}),
        {},
        ["Python version", "pickle", "cifar-10-binary.tar.gz"],
    ),
    "pickled archive": (
        "cifar100",
        lambda t: write(t, {"train": pickle.dumps({}), "test": b"x"}, "archive"),
        {},
        ["Python version", "cifar-100-binary.tar.gz"],
    ),
    "no archive": ("stl10", lambda t: put(t / "x.tar.gz", b"hello"), {}, ["x.tar.gz", "stl10_b"]),
    "cut archive": (
        "cifar10",
        lambda t: put(t / "y.tar.gz", write(t, CIFAR10, "archive").read_bytes()[:9000]),
        {},
        ["y.tar.gz", "cannot be read", "cifar-10-binary.tar.gz"],
    ),
    "STL labels from 0": (
        "stl10",
        lambda t: write(t, STL10 | {"train_y.bin": bytes([0, 1, 2])}),
        {},
        ["train_y.bin", "from 0 to 2", "from 1 to 10"],
    ),
    "STL labels missing": (
        "stl10",
        lambda t: write(t, STL10 | {"test_y.bin": bytes([1])}),
        {"split": "test"},
        ["test_y.bin", "1 labels", "2 images"],
    ),
    "unlabeled elsewhere": (
        "cifar10",
        lambda t: write(t, CIFAR10),
        {"split": "unlabeled"},
        ["--config.data.split=unlabeled", "known: train, test, all"],
    ),
    "other labels": (
        "cifar100",
        lambda t: write(t, CIFAR100),
        {"label_key": "fein"},
        ["--config.data.label_key=fein", "did you mean fine?"],
    ),
    "labels of cifar10": ("cifar10", lambda t: t, {"label_key": "fine"}, ["label_key", "cifar100"]),
    "option of folders": ("stl10", lambda t: t, {"size": 32}, ["--config.data.size", "folder"]),
    "choice of folders": (
        "cifar10",
        lambda t: t,
        {"labels": "folders"},
        ["--config.data.labels", "only with folder"],
    ),
}


def put(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    ("name", "make", "options", "expected"), _BAD_BINARY.values(), ids=_BAD_BINARY.keys()
)
def test_bad_binary_files(tmp_path, name, make, options, expected):
    message = refused(name, make(tmp_path), **options)
    assert all(words in message for words in expected), message


# --- folders of images -------------------------------------------------------------------------

GREY = RNG.integers(0, 256, (6, 12, 10), dtype=np.uint8)
COLOUR = RNG.integers(0, 256, (6, 12, 10, 3), dtype=np.uint8)


def save(array, path: Path, **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    (array if isinstance(array, Image.Image) else Image.fromarray(array)).save(path, **options)
    return path


def folder_of(path: Path, arrays) -> Path:
    for i, array in enumerate(arrays):
        save(array, path / f"{i:03d}.png")
    return path


@pytest.mark.parametrize("images", [GREY, COLOUR])
def test_images_of_one_size_are_read_as_they_are(tmp_path, images):
    dataset = load("folder", folder_of(tmp_path / "pets", images))
    np.testing.assert_array_equal(dataset.examples, images.reshape(6, 12, 10, -1))
    assert dataset.examples.dtype == np.uint8 and dataset.labels is None
    assert dataset.name == "pets"
    assert dataset.paths == [str(tmp_path / "pets" / f"{i:03d}.png") for i in range(6)]


def test_nested_folders_are_read_in_the_order_of_their_paths(tmp_path):
    places = ["b/2.png", "a.png", "b/10.png", "a/x/1.png", "c.JPG"]
    for i, place in enumerate(places):
        save(np.full((8, 8), 40 * i + 10, np.uint8), tmp_path / place)
    for ignored in (".hidden/x.png", ".DS_Store", "Thumbs.db", "__MACOSX/a.png"):
        put(tmp_path / ignored, b"no image")
    (tmp_path / "b" / "loop").symlink_to(tmp_path)
    dataset = load("folder", tmp_path)
    order = [3, 1, 2, 0, 4]
    assert dataset.paths == [str(tmp_path / places[i]) for i in order]
    assert dataset.examples[:, 0, 0, 0].tolist() == [40 * i + 10 for i in order]


def test_names_of_folders_become_labels_on_demand(tmp_path):
    for place in ("train/cat/1.png", "train/dog/1.png", "test/cat/1.png"):
        save(RNG.integers(0, 256, (8, 8), dtype=np.uint8), tmp_path / place)
    assert load("folder", tmp_path, labels="folders").labels.tolist() == ["cat", "cat", "dog"]
    assert load("folder", tmp_path).labels is None
    stray = save(GREY[0], tmp_path / "stray.png")
    message = refused("folder", tmp_path, labels="folders")
    assert message.startswith(str(stray)) and "class folder" in message


SQUARE = np.zeros((6, 6, 3), np.uint8)
SQUARE[:] = [200, 100, 50]


def with_alpha(mode):
    """The same colour, opaque in the left half and clear in the right one."""
    image = Image.fromarray(SQUARE).convert("RGBA")
    alpha = np.zeros((6, 6), np.uint8)
    alpha[:, :3] = 255
    image.putalpha(Image.fromarray(alpha))
    return image.convert(mode)


def palette(transparent=None):
    image = Image.fromarray(np.repeat([[0, 0, 0, 1, 1, 1]], 6, axis=0).astype(np.uint8), "P")
    image.putpalette([200, 100, 50, 255, 255, 255] if transparent is None else [200, 100, 50] * 2)
    return image, {} if transparent is None else {"transparency": transparent}


LUMA = round(0.299 * 200 + 0.587 * 100 + 0.114 * 50)
WIDE = np.repeat([[0, 128, 257, 25700, 40000, 65535]], 6, axis=0).astype(np.uint16)
MODES = {
    "RGB png": (SQUARE, {}, "a.png", [[200, 100, 50]] * 6),
    "RGBA over white": (with_alpha("RGBA"), {}, "a.png", [[200, 100, 50]] * 3 + [[255] * 3] * 3),
    "LA over white": (with_alpha("LA"), {}, "a.png", [[LUMA] * 3] * 3 + [[255] * 3] * 3),
    "palette": (palette()[0], {}, "a.png", [[200, 100, 50]] * 3 + [[255] * 3] * 3),
    "clear palette": (*palette(1), "a.png", [[200, 100, 50]] * 3 + [[255] * 3] * 3),
    "gif": (palette()[0], {}, "a.gif", [[200, 100, 50]] * 3 + [[255] * 3] * 3),
    "clear gif": (*palette(1), "a.gif", [[200, 100, 50]] * 3 + [[255] * 3] * 3),
    "bmp": (SQUARE, {}, "a.bmp", [[200, 100, 50]] * 6),
    "CMYK tiff": (
        Image.new("CMYK", (6, 6), (255, 0, 0, 0)), {}, "a.tif", [[0, 255, 255]] * 6,
    ),
    "one bit": (
        Image.fromarray(np.repeat([[0, 0, 0, 255, 255, 255]], 6, axis=0).astype(np.uint8)).convert(
            "1"
        ),
        {},
        "a.png",
        [[0] * 3] * 3 + [[255] * 3] * 3,
    ),
    "16 bit": (WIDE, {}, "a.png", [[v] * 3 for v in (0, 0, 1, 100, 156, 255)]),
    "16 bit tiff": (WIDE, {}, "a.tif", [[v] * 3 for v in (0, 0, 1, 100, 156, 255)]),
    "32 bit tiff": (
        WIDE.astype(np.int32), {}, "a.tif", [[v] * 3 for v in (0, 0, 1, 100, 156, 255)],
    ),
}  # fmt: skip


@pytest.mark.parametrize(("image", "options", "name", "row"), MODES.values(), ids=MODES.keys())
def test_modes(tmp_path, image, options, name, row):
    save(image, tmp_path / name, **options)
    save(np.random.default_rng(1).integers(0, 256, (6, 6, 3), np.uint8), tmp_path / "z.png")
    examples = load("folder", tmp_path).examples
    np.testing.assert_array_equal(examples[0], np.tile(row, (6, 1, 1)))


@pytest.mark.parametrize("name", ["a.png", "a.tif"])
def test_dark_images_of_16_bits_are_warned_of(tmp_path, name):
    save((WIDE // 16).astype(np.uint16), tmp_path / name)
    save(WIDE, tmp_path / f"b{name}")
    with pytest.warns(UserWarning, match=r"hold nothing above 8192.*\.npy"):
        examples = load("folder", tmp_path).examples
    assert examples[0].max() == 16  # 4095 of 65535 in 255ths


def test_jpeg_is_close_to_what_was_saved(tmp_path):
    ramp = np.linspace(0, 255, 32)[:, None, None] * np.array([1.0, 0.5, 0.25])
    image = np.repeat(ramp, 32, axis=1).astype(np.uint8)
    save(image, tmp_path / "a.jpg", quality=95)
    save(image[::-1].copy(), tmp_path / "b.jpeg", quality=95)
    examples = load("folder", tmp_path).examples.astype(int)
    assert np.abs(examples[0] - image).mean() < 3 and np.abs(examples[1] - image[::-1]).mean() < 3


def test_any_coloured_image_gives_three_channels(tmp_path):
    grey_rgb = np.repeat(GREY[..., None], 3, axis=-1)
    folder_of(tmp_path, grey_rgb)
    dataset = load("folder", tmp_path)
    np.testing.assert_array_equal(dataset.examples, GREY[..., None])
    np.testing.assert_array_equal(load("folder", tmp_path, colour="rgb").examples, grey_rgb)
    save(COLOUR[0], tmp_path / "z.png")
    dataset = load("folder", tmp_path)
    np.testing.assert_array_equal(dataset.examples, np.concatenate([grey_rgb, COLOUR[:1]]))
    expected = COLOUR[0] @ np.array([0.299, 0.587, 0.114])
    grey = load("folder", tmp_path, colour="grey").examples
    assert grey.shape == (7, 12, 10, 1)
    np.testing.assert_array_equal(grey[:6, ..., 0], GREY)
    np.testing.assert_allclose(grey[6, ..., 0], expected, atol=0.51)


@pytest.mark.parametrize("kind", ["jpg", "png", "tif"])
def test_exif_orientation_is_applied(tmp_path, kind):
    upright = np.zeros((16, 8), np.uint8)
    upright[:8] = 255  # bright above, dark below
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise by a quarter when shown
    for name in "ab":
        stored = np.rot90(upright).copy()
        save(stored, tmp_path / f"{name}.{kind}", exif=exif)
    save(255 - upright, tmp_path / "c.png")
    examples = load("folder", tmp_path).examples[..., 0]
    assert examples.shape == (3, 16, 8)
    np.testing.assert_allclose(examples[0], upright, atol=3)


@pytest.mark.parametrize(
    ("sizes", "wanted", "expected"),
    [
        ([(28, 20)] * 3, None, (28, 20)),
        ([(28, 20)] * 3 + [(9, 9), (700, 80)], None, (28, 20)),
        ([(128, 96)] * 2, None, (64, 48)),
        ([(10, 20), (30, 14), (50, 40)], None, (14, 14)),
        ([(640, 480), (480, 640), (1000, 1000)], None, (64, 64)),
        ([(640, 480)] * 3, 128, (128, 128)),
        ([(1000, 1)] * 3, None, (64, 1)),
    ],
)
def test_the_common_size(sizes, wanted, expected):
    assert common_size(sizes, wanted) == expected


def test_mixed_sizes_are_scaled_to_cover_and_cut_in_the_centre(tmp_path):
    # Three vertical stripes, the middle one a square: only it is left of the wide image.
    wide = np.repeat(np.array([0, 90, 0], np.uint8), 30)[None].repeat(30, axis=0)
    tall = np.repeat(np.array([255, 180, 255], np.uint8), 12)[:, None].repeat(12, axis=1)
    save(wide, tmp_path / "a.png")
    save(tall, tmp_path / "b.png")
    save(np.full((10, 10), 30, np.uint8), tmp_path / "c.png")
    examples = load("folder", tmp_path, size=16).examples[..., 0]
    assert examples.shape == (3, 16, 16)
    for image, value in zip(examples, (90, 180, 30), strict=True):
        np.testing.assert_allclose(image[2:-2, 2:-2], value, atol=2)
    assert load("folder", tmp_path).examples.shape == (3, 12, 12, 1)


def test_large_photographs_are_averaged_down_not_sampled(tmp_path):
    board = np.indices((600, 600)).sum(0) % 2 * 255
    save(board.astype(np.uint8), tmp_path / "a.png")
    save(board.astype(np.uint8), tmp_path / "b.jpg", quality=95)
    save(np.full((600, 600), 20, np.uint8), tmp_path / "c.png")
    examples = load("folder", tmp_path).examples[..., 0].astype(int)
    assert examples.shape == (3, 64, 64)
    assert np.abs(examples[:2] - 127).max() <= 3


def test_a_limit_reads_a_subset_of_the_same_size(tmp_path):
    folder_of(tmp_path, [*COLOUR, *RNG.integers(0, 256, (5, 30, 30, 3), dtype=np.uint8)])
    whole, part = load("folder", tmp_path), load("folder", tmp_path, limit=4)
    assert whole.num_examples == 11 and part.num_examples == 4
    np.testing.assert_array_equal(part.examples, whole.examples[part.rows])
    assert part.paths == [whole.paths[i] for i in part.rows]


def broken_folder(folder: Path) -> Path:
    folder_of(folder, COLOUR)
    cut = (folder / "002.png").read_bytes()
    put(folder / "002.png", cut[: len(cut) // 2])
    put(folder / "notes.tif", b"taken in spring")
    return folder


def test_a_folder_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    (tmp_path / "a").mkdir()
    scan = os.scandir

    def denied(place):
        if Path(place).name == "a":  # whoever runs this may read everything
            raise PermissionError(13, "Permission denied", place)
        return scan(place)

    monkeypatch.setattr(os, "scandir", denied)
    assert "a: cannot be read (Permission denied); permit" in refused("folder", tmp_path)


def test_broken_files_are_refused_by_name(tmp_path):
    folder = broken_folder(tmp_path)
    message = refused("folder", folder)
    assert message.startswith(f"{folder / 'notes.tif'}: is not an image")
    assert "--config.data.broken=skip" in message
    (folder / "notes.tif").unlink()
    message = refused("folder", folder)
    assert message.startswith(f"{folder / '002.png'}: cannot be read") and "repair" in message
    put(folder / "004.png", b"")
    put(folder / "005.png", b"")
    assert "(and 1 more like it)" in refused("folder", folder)


def test_broken_files_are_left_out_with_a_warning(tmp_path):
    folder = broken_folder(tmp_path)
    with pytest.warns(UserWarning, match=r"left out 2 of 7 files") as record:
        dataset = load("folder", folder, broken="skip")
    (message,) = [str(warning.message) for warning in record]
    assert "002.png" in message and "notes.tif" in message and "\n" not in message
    np.testing.assert_array_equal(dataset.examples, COLOUR[[0, 1, 3, 4, 5]])
    assert dataset.rows.tolist() == [0, 1, 3, 4, 5]
    assert [Path(path).name for path in dataset.paths] == [f"{i:03d}.png" for i in dataset.rows]


def test_files_that_are_plainly_no_images_are_left_out_with_one_warning(tmp_path):
    folder_of(tmp_path, COLOUR)
    endings = "TXT json csv xml xmp md html pdf db ini log py".split()
    for ending in endings:
        put(tmp_path / f"000.{ending}", b"no image")
    with pytest.warns(UserWarning, match="endings") as record:
        dataset = load("folder", tmp_path)
    (message,) = [str(warning.message) for warning in record]
    first = tmp_path / "000.TXT"
    assert f"left out 12 files with endings that images do not have, the first {first}" in message
    np.testing.assert_array_equal(dataset.examples, COLOUR)
    assert [Path(path).name for path in dataset.paths] == [f"{i:03d}.png" for i in range(6)]


def test_whole_folders_warn_of_nothing(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load("folder", folder_of(tmp_path, COLOUR), broken="skip")


_BAD_FOLDER = {
    "no folder": (lambda t: t / "no", {}, ["/no: does not exist"]),
    "a file": (lambda t: save(GREY[0], t / "a.png"), {}, ["a.png: is a file", "folder"]),
    "empty": (lambda t: t, {}, ["holds no files"]),
    "only hidden": (lambda t: put(t / ".x.png", b"x").parent, {}, ["holds no files"]),
    "no images": (
        lambda t: put(t / "a.txt", b"x").parent,
        {"broken": "skip"},
        ["holds no images, only 1 file such as", "a.txt", "; give a folder of images"],
    ),
    "nothing but broken images": (
        lambda t: put(t / "a.png", b"x").parent,
        {"broken": "skip"},
        ["none of its 1 files", "a.png"],
    ),
    "real numbers": (
        lambda t: save(GREY[0].astype(np.float32), t / "a.tif").parent,
        {},
        ["a.tif", "real numbers", "8 or 16 bits"],
    ),
    "32 bits": (
        lambda t: save(np.full((5, 5), 70000, np.int32), t / "a.tif").parent,
        {},
        ["a.tif", "more than 16 bits"],
    ),
    "split": (lambda t: folder_of(t, GREY), {"split": "test"}, ["split=test", "no splits"]),
    "size": (lambda t: folder_of(t, GREY), {"size": 0}, ["--config.data.size=0", "at least 4"]),
    "colour": (lambda t: t, {"colour": "gray"}, ["colour=gray", "did you mean grey?"]),
    "broken": (lambda t: t, {"broken": "ignore"}, ["broken=ignore", "known: refuse, skip"]),
    "label key": (lambda t: t, {"label_key": "y"}, ["label_key", "no meaning"]),
}


@pytest.mark.parametrize(("make", "options", "expected"), _BAD_FOLDER.values(), ids=_BAD_FOLDER)
def test_bad_folders(tmp_path, make, options, expected):
    message = refused("folder", make(tmp_path), **options)
    assert all(words in message for words in expected), message


@pytest.mark.filterwarnings("ignore::dec_diffusion.train.EmptyClusterWarning")
@pytest.mark.filterwarnings("ignore::dec_diffusion.train.CollapseWarning")
def test_a_folder_of_images_is_clustered_from_the_command_line(capfd, tmp_path):
    place, workdir = tmp_path / "shots", tmp_path / "run"
    for i in range(40):
        image = np.zeros((12, 10, 3), np.uint8)
        image[..., i % 2] = RNG.integers(150, 250)  # red or green
        save(image, place / f"{i % 4}" / f"{i:02d}.{'jpg' if i % 3 else 'png'}")
    argv = [
        "--config=neural_mixture:images",  # whose path may be a file or a folder
        f"--workdir={workdir}",
        f"--config.data.path={place}",
        "--config.data.size=8",
        "--config.method.num_clusters=2",
        "--config.method.network=mlp",
        "--config.method.networks=1",
        "--config.method.heads=1",
        "--config.method.width=8",
        "--config.method.hidden=8",
        "--config.method.rotate=0",
        "--config.method.shift=0",
        "--config.method.scale=0",
        "--config.method.shear=0",
        "--config.method.noise=0.1",
        "--config.method.iterations=2",
        "--config.method.steps=40",
        "--config.method.learning_rate=0.01",
        "--config.train.batch_size=16",
    ]
    assert main.execute(["main", *argv]) == 0
    assert "40 examples of 8x8x3 (shots" in capfd.readouterr().out
    with (workdir / "assignments.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["path"] for row in rows] == [str(p) for p in sorted(place.rglob("*.*"))]
    assert {row["cluster"] for row in rows} <= {"0", "1"}
    # New images, of another size and without colour, are made what the run was trained on.
    save(np.full((20, 30), 200, np.uint8), tmp_path / "new" / "grey.png")
    predict = [f"--workdir={workdir}", f"--config.data.path={tmp_path / 'new'}"]
    put(tmp_path / "new" / "notes.txt", b"no image")
    with pytest.warns(UserWarning, match="left out 1 file with endings that images do not have"):
        assert main.execute(["main", "--mode=predict", *predict]) == 0
    assert "1 examples assigned" in capfd.readouterr().out
    put(place / "0" / "note.gif", b"no image")
    again = [*argv, f"--workdir={tmp_path / 'other'}"]
    assert main.execute(["main", *again]) == 2
    error = capfd.readouterr().err
    assert error.startswith(f"error: {place / '0' / 'note.gif'}: is not an image")
    assert error.count("\n") == 1
