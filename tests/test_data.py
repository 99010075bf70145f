"""Data sources, validation and scaling, on real files written by the tests.

Set DEC_DIFFUSION_TEST_DATA to a folder with ``mnist/``, ``fashion-mnist/`` and ``usps/usps.h5`` to
check the published data sets too.
"""

import gzip
import hashlib
import importlib
import json
import os
import struct
import subprocess
import sys
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from sklearn.datasets import load_digits
from sklearn.preprocessing import StandardScaler

from dec_diffusion import data, train
from dec_diffusion.config import Config, TrainConfig
from dec_diffusion.data.prepared import find_prepared
from dec_diffusion.methods.clusterddpm import ClusterDDPM
from dec_diffusion.types import InputError

IMAGES = np.random.default_rng(0).integers(0, 256, (30, 5, 4), dtype=np.uint8)
LABELS = (np.arange(30) % 3).astype(np.uint8)
FLOATS = np.random.default_rng(1).normal(size=(30, 6)).astype(np.float32)


def idx_bytes(array, code=0x08):
    header = bytes([0, 0, code, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    return header + array.astype(array.dtype.newbyteorder(">")).tobytes()


def write_mnist(folder, *, compress=True, labels=True):
    """Twenty training and ten test images under the names of MNIST."""
    folder.mkdir(exist_ok=True)
    for prefix, part in (("train", slice(20)), ("t10k", slice(20, None))):
        files = {"images-idx3": IMAGES[part]} | ({"labels-idx1": LABELS[part]} if labels else {})
        for name, array in files.items():
            content = idx_bytes(array)
            path = folder / f"{prefix}-{name}-ubyte{'.gz' if compress else ''}"
            path.write_bytes(gzip.compress(content) if compress else content)
    return folder


def load(name, path=None, **options):
    return data.load(
        data.DataConfig(name=name, path=None if path is None else str(path), **options)
    )


def scaled(dataset):
    return (dataset.examples - dataset.offset) / dataset.scale


# --- sources ---


def test_digits_are_scikit_learns():
    dataset = data.load(data.DataConfig())
    bunch = load_digits()
    np.testing.assert_array_equal(dataset.examples[..., 0], bunch.images)
    np.testing.assert_array_equal(dataset.labels, bunch.target)
    assert dataset.examples.dtype == np.uint8
    assert (dataset.num_examples, dataset.example_shape, dataset.is_image) == (
        1797,
        (8, 8, 1),
        True,
    )
    assert (dataset.offset, dataset.scale) == (8, 8)
    train, test = load("digits", split="train"), load("digits", split="test")
    assert (train.num_examples, test.num_examples) == (1437, 360)
    np.testing.assert_array_equal(np.concatenate([train.labels, test.labels]), dataset.labels)


@pytest.mark.parametrize("compress", [True, False])
@pytest.mark.parametrize(
    ("split", "part"), [("train", slice(20)), ("test", slice(20, 30)), ("all", slice(30))]
)
def test_idx_folder(tmp_path, compress, split, part):
    dataset = load("mnist", write_mnist(tmp_path / "d", compress=compress), split=split)
    np.testing.assert_array_equal(dataset.examples, IMAGES[part, ..., None])
    np.testing.assert_array_equal(dataset.labels, LABELS[part])
    assert dataset.examples.dtype == np.uint8
    assert dataset.name == "mnist"


def test_idx_folder_without_labels(tmp_path):
    assert load("idx", write_mnist(tmp_path / "d", labels=False)).labels is None


def test_idx_single_file_finds_its_labels(tmp_path):
    file = write_mnist(tmp_path / "d") / "t10k-images-idx3-ubyte.gz"
    dataset = load("idx", file)
    np.testing.assert_array_equal(dataset.examples, IMAGES[20:, ..., None])
    np.testing.assert_array_equal(dataset.labels, LABELS[20:])


@pytest.mark.parametrize(
    ("code", "dtype"),
    [(0x08, "u1"), (0x09, "i1"), (0x0B, "i2"), (0x0C, "i4"), (0x0D, "f4"), (0x0E, "f8")],
)
def test_idx_value_types(tmp_path, code, dtype):
    values = (IMAGES // 2).astype(dtype)
    (tmp_path / "x").write_bytes(idx_bytes(values, code))
    np.testing.assert_array_equal(load("idx", tmp_path / "x").examples[..., 0], values)


@pytest.mark.parametrize("examples", [IMAGES, np.stack([IMAGES] * 3, -1), FLOATS, IMAGES > 127])
def test_npy(tmp_path, examples):
    np.save(tmp_path / "x.npy", examples)
    dataset = load("npy", tmp_path / "x.npy")
    expected = examples[..., None] if examples.ndim == 3 else examples
    np.testing.assert_array_equal(dataset.examples, expected)
    assert dataset.examples.dtype == (np.uint8 if examples.dtype == np.uint8 else np.float32)
    assert dataset.is_image == (examples.ndim > 2)
    assert dataset.labels is None
    assert dataset.name == "x"


@pytest.mark.parametrize("keys", [("images", "labels"), ("x", "y"), ("data", "target")])
def test_npz(tmp_path, keys):
    np.savez(tmp_path / "x.npz", **{keys[0]: IMAGES, keys[1]: LABELS})
    dataset = load("npz", tmp_path / "x.npz")
    np.testing.assert_array_equal(dataset.examples[..., 0], IMAGES)
    np.testing.assert_array_equal(dataset.labels, LABELS)


def test_npz_named_keys_and_single_array(tmp_path):
    np.savez(tmp_path / "a.npz", pixels=IMAGES, kinds=LABELS, x=FLOATS)
    dataset = load("npz", tmp_path / "a.npz", image_key="pixels", label_key="kinds")
    np.testing.assert_array_equal(dataset.examples[..., 0], IMAGES)
    np.testing.assert_array_equal(dataset.labels, LABELS)
    np.savez(tmp_path / "b.npz", FLOATS)
    np.testing.assert_array_equal(load("npz", tmp_path / "b.npz").examples, FLOATS)


@pytest.mark.parametrize(
    "keys",
    [
        ("x_train", "y_train", "x_test", "y_test"),
        ("train_images", "train_labels", "test_images", "test_labels"),
    ],
)
def test_npz_splits(tmp_path, keys):
    arrays = (IMAGES[:20], LABELS[:20, None], IMAGES[20:], LABELS[20:, None])
    np.savez(tmp_path / "x.npz", **dict(zip(keys, arrays, strict=True)))
    for split, part in (("train", slice(20)), ("test", slice(20, 30)), ("all", slice(30))):
        dataset = load("npz", tmp_path / "x.npz", split=split)
        np.testing.assert_array_equal(dataset.examples[..., 0], IMAGES[part])
        np.testing.assert_array_equal(dataset.labels, LABELS[part])


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        (LABELS.astype(float), LABELS.astype(np.int64)),
        (LABELS == 1, (LABELS == 1).astype(np.int64)),
        (LABELS.astype("U"), LABELS.astype("U")),
        (LABELS.astype("S"), LABELS.astype("U")),
    ],
)
def test_label_types(labels, expected):
    kept = data.from_arrays(IMAGES, labels).labels
    np.testing.assert_array_equal(kept, expected)
    assert kept.dtype.kind == expected.dtype.kind


def write_usps(path):
    h5py = pytest.importorskip("h5py")
    pixels = np.random.default_rng(2).uniform(size=(30, 256)).astype(np.float32)
    with h5py.File(path, "w") as file:
        for split, part in (("train", slice(20)), ("test", slice(20, None))):
            file[f"{split}/data"], file[f"{split}/target"] = pixels[part], LABELS[part]
    return pixels


def test_usps(tmp_path):
    pixels = write_usps(tmp_path / "usps.h5")
    dataset = load("usps", tmp_path / "usps.h5")
    np.testing.assert_array_equal(dataset.examples, pixels.reshape(30, 16, 16, 1))
    np.testing.assert_array_equal(dataset.labels, LABELS)
    assert (dataset.offset, dataset.scale) == (0.5, 0.5)
    assert load("usps", tmp_path / "usps.h5", split="test").num_examples == 10


# --- TFDS ---


@pytest.fixture(scope="module")
def tfds_dir(tmp_path_factory):
    """A data directory with ``tiny_digits`` as array_record and ``tiny_records`` as tfrecord."""
    root = tmp_path_factory.mktemp("tfds")
    tfds = importlib.import_module("tensorflow_datasets")
    tfds.disable_progress_bar()

    class TinyDigits(tfds.core.GeneratorBasedBuilder):
        """The test images, a third of them in the test split."""

        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            features = {
                "image": tfds.features.Tensor(shape=(5, 4), dtype=np.uint8),
                "label": tfds.features.ClassLabel(num_classes=3),
                "row": tfds.features.Tensor(shape=(), dtype=np.int64),
            }
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict(features)
            )

        def _split_generators(self, dl_manager):
            return {
                "train": self._generate_examples(0, 20),
                "test": self._generate_examples(20, 30),
            }

        def _generate_examples(self, start, stop):
            for i in range(start, stop):
                yield i, {"image": IMAGES[i], "label": int(LABELS[i]), "row": i}

    builder = TinyDigits(data_dir=root, file_format="array_record")
    builder.download_and_prepare()
    convert_to_tfrecord(Path(builder.data_dir), root / "tiny_records" / "1.0.0")
    return root


@pytest.mark.parametrize("name", ["tiny_digits", "tiny_records"])
def test_a_team_shares_the_decoding_of_tfds(tfds_dir, tmp_path, name):
    given, together = {}, threading.Barrier(2)

    def read(number):
        def exchange(topic, text):
            given[number] = text
            together.wait(30)
            texts = [given[0], given[1]]
            together.wait(30)
            return texts

        config = data.DataConfig(
            name="tfds", path=str(tfds_dir), tfds_name=name, cache=str(tmp_path)
        )
        return data.load(config, team=data.Team(number, 2, exchange))

    alone = data.load(
        data.DataConfig(name="tfds", path=str(tfds_dir), tfds_name=name, cache="none")
    )
    with ThreadPoolExecutor(2) as pool:
        for found in pool.map(read, (0, 1)):
            np.testing.assert_array_equal(np.asarray(found.examples), alone.examples)
            np.testing.assert_array_equal(found.labels, alone.labels)
            np.testing.assert_array_equal(found.rows, alone.rows)
    parts = sorted(file.name for file in tmp_path.glob("*/images-*"))
    assert parts == ["images-00000-of-00002.npy", "images-00001-of-00002.npy"]


def crc32c(content):
    """The checksum of TFRecord (Castagnoli polynomial, rotated and shifted)."""
    crc = 0xFFFFFFFF
    for byte in content:
        crc ^= byte
        for _ in range(8):
            crc = (crc >> 1) ^ (0x82F63B78 if crc & 1 else 0)
    crc ^= 0xFFFFFFFF
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)


def field(number, content):
    """A protocol buffer field of bytes: tag, length as a varint, content."""
    length, varint = len(content), b""
    while length > 127:
        varint, length = varint + bytes([length & 127 | 128]), length >> 7
    return bytes([number << 3 | 2]) + varint + bytes([length]) + content


def convert_to_tfrecord(prepared, target):
    """Rewrite a prepared array_record folder in tfrecord format, two shards for train."""
    from array_record.python.array_record_module import ArrayRecordReader

    target.mkdir(parents=True)
    info = json.loads((prepared / "dataset_info.json").read_text())
    info |= {"fileFormat": "tfrecord", "name": "tiny_records"}
    for split in info["splits"]:
        name = split["name"]
        source = prepared / f"tiny_digits-{name}.array_record-00000-of-00001"
        records = ArrayRecordReader(str(source)).read_all()
        shards = [records[:7], records[7:]] if name == "train" else [records]
        split["shardLengths"] = [str(len(shard)) for shard in shards]
        for i, shard in enumerate(shards):
            file = target / f"tiny_records-{name}.tfrecord-{i:05}-of-{len(shards):05}"
            with file.open("wb") as out:
                for record in shard:
                    length = struct.pack("<Q", len(record))
                    out.write(length + crc32c(length) + record + crc32c(record))
    (target / "dataset_info.json").write_text(json.dumps(info))
    (target / "features.json").write_bytes((prepared / "features.json").read_bytes())


def rows_of(dataset):
    """The rows of IMAGES that the examples are; TFDS shuffles as it writes."""
    equal = (dataset.examples[:, None, ..., 0] == IMAGES).all((2, 3))
    assert (equal.sum(1) == 1).all()
    return equal.argmax(1)


@pytest.mark.parametrize("name", ["tiny_digits", "tiny_records"])
@pytest.mark.parametrize(
    ("split", "expected"), [("train", range(20)), ("test", range(20, 30)), ("all", range(30))]
)
def test_tfds_splits(tfds_dir, name, split, expected):
    dataset = load("tfds", tfds_dir, tfds_name=name, split=split)
    rows = rows_of(dataset)
    assert sorted(rows) == list(expected)
    np.testing.assert_array_equal(dataset.labels, LABELS[rows])
    assert dataset.examples.dtype == np.uint8


@pytest.mark.parametrize("split", ["train[:25%]+test[2:5]", "train[35%:]", "test+train", "all"])
def test_tfrecord_equals_array_record(tfds_dir, split):
    one = load("tfds", tfds_dir, tfds_name="tiny_digits", split=split)
    two = load("tfds", tfds_dir / "tiny_records" / "1.0.0", split=split)
    np.testing.assert_array_equal(one.examples, two.examples)
    np.testing.assert_array_equal(one.labels, two.labels)


@pytest.mark.parametrize("name", ["tiny_digits", "tiny_records"])
def test_tfds_limit_is_the_subset_of_the_whole(tfds_dir, name):
    whole = load("tfds", tfds_dir, tfds_name=name)
    some = load("tfds", tfds_dir, tfds_name=name, limit=11)
    assert some.num_examples == 11
    np.testing.assert_array_equal(some.examples, whole.examples[some.rows])
    np.testing.assert_array_equal(some.labels, whole.labels[some.rows])


@pytest.mark.parametrize("name", ["tiny_digits", "tiny_records"])
def test_tfds_from_the_cache_is_what_was_decoded(tfds_dir, tmp_path, name):
    plain = load("tfds", tfds_dir, tfds_name=name, limit=21, cache="none")
    for _ in range(2):
        found = load("tfds", tfds_dir, tfds_name=name, limit=21, cache=str(tmp_path / "kept"))
        np.testing.assert_array_equal(found.examples, plain.examples)
        np.testing.assert_array_equal(found.labels, plain.labels)
        np.testing.assert_array_equal(found.rows, plain.rows)
        assert not found.examples.flags.writeable  # mapped
        assert len(list((tmp_path / "kept").iterdir())) == 1


def test_tfds_other_feature_as_label(tfds_dir):
    dataset = load("tfds", tfds_dir, tfds_name="tiny_digits", label_key="row")
    np.testing.assert_array_equal(dataset.labels, rows_of(dataset))


def test_tfds_png_images_in_tfrecord(tmp_path):
    """A whole tfrecord data set written by hand, its images as PNG like MNIST's."""
    image_module = pytest.importorskip("PIL.Image")
    tfds = importlib.import_module("tensorflow_datasets")
    features = tfds.features.FeaturesDict({"image": tfds.features.Image(shape=(5, 4, 1))})
    features.save_config(tmp_path)
    records = b""
    for i, image in enumerate(IMAGES):
        file = tmp_path / f"{i}.png"
        image_module.fromarray(image).save(file)
        # Example.features.feature["image"].bytes_list.value = [the file]
        value = field(2, field(1, field(1, file.read_bytes())))
        record = field(1, field(1, field(1, b"image") + value))
        length = struct.pack("<Q", len(record))
        records += length + crc32c(length) + record + crc32c(record)
    (tmp_path / "png-train.tfrecord-00000-of-00001").write_bytes(records)
    split = {
        "name": "train",
        "shardLengths": ["30"],
        "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
    }
    info = {"fileFormat": "tfrecord", "name": "png", "version": "1.0.0", "splits": [split]}
    (tmp_path / "dataset_info.json").write_text(json.dumps(info))
    dataset = load("tfds", tmp_path)
    np.testing.assert_array_equal(dataset.examples[..., 0], IMAGES)
    assert dataset.labels is None


def test_find_prepared_takes_the_newest_version(tmp_path, monkeypatch):
    for version in ("mnist/3.0.1", "mnist/3.0.9", "mnist/3.0.10", "glue/cola/2.0.0"):
        (tmp_path / version).mkdir(parents=True)
        (tmp_path / version / "dataset_info.json").write_text("{}")
    assert find_prepared(str(tmp_path), "mnist") == tmp_path / "mnist/3.0.10"
    assert find_prepared(str(tmp_path / "mnist"), None) == tmp_path / "mnist/3.0.10"
    assert find_prepared(str(tmp_path), "mnist:3.0.1") == tmp_path / "mnist/3.0.1"
    assert find_prepared(str(tmp_path), "glue") == tmp_path / "glue/cola/2.0.0"
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    assert find_prepared(None, "glue/cola") == tmp_path / "glue/cola/2.0.0"


def test_import_and_tfds_never_load_tensorflow(tfds_dir):
    """A subprocess, because other tests may have imported anything."""
    program = f"""
import sys
from dec_diffusion import data
lazy = {{"tensorflow_datasets", "h5py", "sklearn", "grain", "tensorflow"}} & set(sys.modules)
assert not lazy, lazy
for name in ("tiny_digits", "tiny_records"):
    data.load(data.DataConfig(name="tfds", path={str(tfds_dir)!r}, tfds_name=name))
assert "tensorflow_datasets" in sys.modules
assert not any(m.split(".")[0] in ("tensorflow", "torch") for m in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# --- scaling, subsets, checks ---


def test_uint8_images_scale_to_the_nominal_range():
    dataset = data.from_arrays(IMAGES)
    assert (dataset.offset, dataset.scale) == (127.5, 127.5)
    np.testing.assert_array_equal(scaled(dataset)[..., 0] * 127.5 + 127.5, IMAGES)


@pytest.mark.parametrize("images", [IMAGES // 128, IMAGES // 16, IMAGES / 7 - 3, IMAGES > 100])
def test_few_level_and_float_images_fill_the_range(images):
    assert scaled(data.from_arrays(images)).min() == pytest.approx(-1, abs=1e-6)
    assert scaled(data.from_arrays(images)).max() == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize(
    "vectors", [FLOATS * 0.01 + 1000, IMAGES.reshape(30, -1), np.repeat(FLOATS, 300, axis=0)]
)
def test_vectors_are_standardised_as_by_scikit_learn(vectors):
    dataset = data.from_arrays(vectors)
    expected = StandardScaler().fit(dataset.examples.astype(np.float64))
    np.testing.assert_allclose(dataset.offset, expected.mean_, rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(dataset.scale, expected.scale_, rtol=1e-6)
    assert dataset.offset.dtype == dataset.scale.dtype == np.float32


def test_features_that_float32_blurs_are_warned_of():
    rng = np.random.default_rng(0)
    x = np.column_stack([rng.normal(size=50), 1.7e9 + 40 * rng.normal(size=50)])
    with pytest.warns(
        UserWarning, match=r"column when has values around 1.7e\+09 in steps of 1.3e"
    ):
        data.warn_of_rounding(data.from_arrays(x, columns=["a", "when"]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # Of new data, perhaps a single row, nothing can be said; and constants lose nothing.
        data.from_arrays(x[:1])
        for fine in (x - x.min(0), np.column_stack([x[:, 0], np.full(50, 1e9), 1e5 + x[:, 0]])):
            data.warn_of_rounding(data.from_arrays(fine))


def test_constant_feature_keeps_scale_one():
    vectors = FLOATS.copy()
    vectors[:, 2] = 0.1
    dataset = data.from_arrays(vectors)
    assert dataset.scale[2] == 1
    assert (scaled(dataset)[:, 2] == 0).all()


@pytest.mark.parametrize("examples", [IMAGES, FLOATS])
def test_with_scaling_of_the_training_data(examples):
    train, new = data.from_arrays(examples[:20]), data.from_arrays(examples[20:])
    both = data.with_scaling(new, train.offset, train.scale)
    np.testing.assert_array_equal(both.offset, train.offset)
    np.testing.assert_array_equal(both.scale, train.scale)
    np.testing.assert_array_equal(both.examples, new.examples)
    assert np.asarray(both.offset).dtype == np.float32


def test_limit_is_a_nested_ordered_subset():
    whole = data.from_arrays(IMAGES, LABELS, paths=[f"{i}.png" for i in range(30)])
    small = data.from_arrays(IMAGES, LABELS, limit=6, paths=whole.paths)
    large = data.from_arrays(IMAGES, LABELS, limit=15)
    assert small.num_examples == 6
    assert set(small.rows) < set(large.rows)
    assert (np.diff(large.rows) > 0).all()
    np.testing.assert_array_equal(small.examples, whole.examples[small.rows])
    np.testing.assert_array_equal(small.labels, whole.labels[small.rows])
    assert small.paths == [f"{row}.png" for row in small.rows]
    np.testing.assert_array_equal(data.from_arrays(IMAGES, limit=6).rows, small.rows)
    np.testing.assert_array_equal(data.from_arrays(IMAGES, limit=99).rows, np.arange(30))


def test_check_clusters_accepts_what_can_work():
    repeated = data.from_arrays(np.repeat(FLOATS[:3], 10, axis=0))
    data.check_clusters(repeated, 3)


# --- bad input: each case writes its files and says what the one-line message must contain ---


def _idx_folder(change):
    def write(folder):
        change(write_mnist(folder))
        return folder

    return write


def _file(name, content):
    def write(folder):
        (folder / name).write_bytes(content() if callable(content) else content)
        return folder / name

    return write


def _npz(**arrays):
    def write(folder):
        np.savez(folder / "x.npz", **arrays)
        return folder / "x.npz"

    return write


def _npy(array):
    def write(folder):
        np.save(folder / "x.npy", array, allow_pickle=True)
        return folder / "x.npy"

    return write


def _npy_bytes():
    return b"".join([b"\x93NUMPY\x01\x00v\x00", b" " * 50])


def _with(array, index, value):
    array = array.copy()
    array[index] = value
    return array


_TRAIN = "train-images-idx3-ubyte"
_BAD = {
    "unknown name": (lambda _: None, {"name": "digit"}, ["--config.data.name", "mean digits"]),
    "no path": (lambda _: None, {"name": "mnist"}, ["--config.data.path"]),
    "digits with path": (_npy(FLOATS), {"name": "digits"}, ["--config.data.path", "npy"]),
    "unknown split": (
        lambda _: None,
        {"name": "digits", "split": "trian"},
        ["--config.data.split=trian", "mean train"],
    ),
    "limit": (lambda _: None, {"name": "digits", "limit": 1}, ["--config.data.limit=1"]),
    "useless option": (_npy(FLOATS), {"name": "npy", "tfds_name": "x"}, ["data.tfds_name"]),
    "useless key": (lambda _: None, {"name": "digits", "label_key": "x"}, ["data.label_key"]),
    "missing path": (lambda f: f / "none.npy", {"name": "npy"}, ["none.npy", "does not exist"]),
    "missing idx": (lambda f: f / "none", {"name": "mnist"}, ["none", "does not exist"]),
    "folder for a file": (lambda f: f, {"name": "npz"}, ["--config.data.path", "is a folder"]),
    "folder without idx": (lambda f: f, {"name": "mnist"}, [_TRAIN, "--config.data.path"]),
    "missing split file": (
        _idx_folder(lambda f: (f / "t10k-images-idx3-ubyte.gz").unlink()),
        {"name": "mnist"},
        ["t10k-images-idx3-ubyte", "--config.data.split"],
    ),
    "labels in one split": (
        _idx_folder(lambda f: (f / "t10k-labels-idx1-ubyte.gz").unlink()),
        {"name": "mnist"},
        ["some have none", "--config.data.split"],
    ),
    "empty file": (_file("e", b""), {"name": "idx"}, ["/e:", "empty"]),
    "truncated gz": (
        _file("a.gz", lambda: gzip.compress(idx_bytes(IMAGES))[:-100]),
        {"name": "idx"},
        ["a.gz", "cannot be read", "again"],
    ),
    "damaged gz": (
        _file("a.gz", lambda: gzip.compress(idx_bytes(IMAGES))[:-8] + b"\0" * 8),
        {"name": "idx"},
        ["a.gz", "cannot be read"],
    ),
    "truncated idx": (
        _file("a", lambda: idx_bytes(IMAGES)[:-1]),
        {"name": "idx"},
        ["/a:", "truncated", "616 bytes", "615"],
    ),
    "truncated idx header": (
        _file("a", lambda: idx_bytes(IMAGES)[:9]),
        {"name": "idx"},
        ["/a:", "truncated"],
    ),
    "surplus idx": (_file("a", lambda: idx_bytes(IMAGES) + b"x"), {"name": "idx"}, ["too long"]),
    "huge idx header": (
        _file("a", bytes([0, 0, 8, 3]) + b"\xff" * 12),
        {"name": "idx"},
        ["/a:", "truncated"],
    ),
    "wrong magic": (_file("a", b"PK\x03\x04 a zip"), {"name": "idx"}, ["/a:", "not an IDX"]),
    "text as idx": (_file("a.txt", b"hello world"), {"name": "idx"}, ["a.txt", "not an IDX"]),
    "labels as images": (_file("a", lambda: idx_bytes(LABELS)), {"name": "idx"}, ["shape (30,)"]),
    "labels under the images' name": (
        _idx_folder(lambda f: (f / f"{_TRAIN}.gz").write_bytes(idx_bytes(LABELS))),
        {"name": "mnist"},
        [f"{_TRAIN}.gz", "not images"],
    ),
    "idx labels too few": (
        _idx_folder(lambda f: (f / "train-labels-idx1-ubyte.gz").write_bytes(idx_bytes(LABELS))),
        {"name": "mnist"},
        ["train-labels-idx1-ubyte.gz", "20 images"],
    ),
    "idx sizes differ": (
        _idx_folder(lambda f: (f / f"{_TRAIN}.gz").write_bytes(idx_bytes(IMAGES[:20, :3]))),
        {"name": "mnist"},
        ["different shapes", "--config.data.split"],
    ),
    "idx no images": (_file("a", lambda: idx_bytes(IMAGES[:0])), {"name": "idx"}, ["0 examples"]),
    "idx file with split": (
        _file("a", lambda: idx_bytes(IMAGES)),
        {"name": "idx", "split": "train"},
        ["--config.data.split=train", "split=all"],
    ),
    "text as npy": (_file("a.npy", b"1,2,3\n"), {"name": "npy"}, ["a.npy", "not a .npy"]),
    "truncated npy": (_file("a.npy", _npy_bytes), {"name": "npy"}, ["a.npy", "cannot be read"]),
    "truncated npz": (_file("a.npz", b"PK\x03\x04abc"), {"name": "npz"}, ["a.npz", "cannot be"]),
    "pickled npy": (
        _npy(np.array([{"a": 1}, 2], object)),
        {"name": "npy"},
        ["x.npy", "allow_pickle", "np.save"],
    ),
    "pickled npz": (
        _npz(x=IMAGES, y=np.array(["a", 1] * 15, object)),
        {"name": "npz"},
        ["x.npz", "allow_pickle"],
    ),
    "text array": (_npy(np.array([["a", "b"]] * 3)), {"name": "npy"}, ["x.npy", "dtype <U1"]),
    "complex array": (_npy(FLOATS * 1j), {"name": "npy"}, ["x.npy", "complex"]),
    "one axis": (_npy(FLOATS[0]), {"name": "npy"}, ["x.npy", "(6,)", "reshape"]),
    "five axes": (_npy(np.zeros((2, 2, 2, 2, 2))), {"name": "npy"}, ["x.npy", "[n, h, w, c]"]),
    "channels first": (
        _npy(np.stack([np.tile(IMAGES, 2)] * 3, 1)),
        {"name": "npy"},
        ["x.npy", "channels first", "transpose"],
    ),
    "no examples": (_npy(FLOATS[:0]), {"name": "npy"}, ["x.npy", "0 examples"]),
    "nan": (
        _npy(_with(_with(FLOATS, (7, 2), np.nan), (9, 1), np.inf)),
        {"name": "npy"},
        ["x.npy", "2 values", "example 7"],
    ),
    "beyond float32": (
        _npy(_with(FLOATS.astype(float), (4, 0), 1e300)),
        {"name": "npy"},
        ["1 values", "example 4"],
    ),
    "npy with split": (_npy(FLOATS), {"name": "npy", "split": "test"}, ["--config.data.split"]),
    "npy with key": (_npy(FLOATS), {"name": "npy", "image_key": "x"}, ["--config.data.image_key"]),
    "npz without split": (
        _npz(x=IMAGES),
        {"name": "npz", "split": "train"},
        ["--config.data.split=train", "x_train"],
    ),
    "npz which array": (
        _npz(a=IMAGES, b=LABELS),
        {"name": "npz"},
        ["x.npz", "--config.data.image_key", "a, b"],
    ),
    "npz empty": (_npz(), {"name": "npz"}, ["x.npz"]),
    "npz image key": (
        _npz(images=IMAGES),
        {"name": "npz", "image_key": "image"},
        ["--config.data.image_key=image", "mean images"],
    ),
    "npz label key": (
        _npz(images=IMAGES, label=LABELS),
        {"name": "npz", "label_key": "labels"},
        ["--config.data.label_key=labels", "mean label"],
    ),
    "labels too few": (_npz(x=IMAGES, y=LABELS[:9]), {"name": "npz"}, ["x.npz", "9 labels"]),
    "labels one-hot": (_npz(x=IMAGES, y=np.eye(30)), {"name": "npz"}, ["x.npz", "argmax"]),
    "labels fractional": (_npz(x=IMAGES, y=LABELS / 2), {"name": "npz"}, ["x.npz", "whole"]),
    "labels nan": (_npz(x=IMAGES, y=LABELS + np.nan), {"name": "npz"}, ["x.npz", "whole"]),
    "not hdf5": (_file("u.h5", b"hello"), {"name": "usps"}, ["u.h5", "cannot be read", "train"]),
    "tfds path": (lambda f: f / "no", {"name": "tfds"}, ["--config.data.path", "does not exist"]),
    "tfds file": (_file("a", b"x"), {"name": "tfds"}, ["--config.data.path", "not a folder"]),
    "tfds unprepared": (
        lambda f: f,
        {"name": "tfds", "tfds_name": "mnist"},
        ["mnist", "tfds build mnist", "array_record"],
    ),
    "tfds broken info": (
        lambda f: _file("dataset_info.json", b"{")(f).parent,
        {"name": "tfds"},
        ["cannot be read", "prepare"],
    ),
}


def check_message(error, *parts):
    message = str(error.value)
    assert "\n" not in message
    for part in parts:
        assert part in message


@pytest.mark.parametrize(("write", "options", "expected"), _BAD.values(), ids=_BAD.keys())
def test_bad_input(tmp_path, write, options, expected):
    if options["name"] == "usps":
        pytest.importorskip("h5py")
    with pytest.raises(InputError) as error:
        load(path=write(tmp_path), **options)
    check_message(error, *expected)


def _remove(pattern):
    return lambda folder: [file.unlink() for file in folder.glob(pattern)]


def _cut(pattern, size):
    return lambda folder: [os.truncate(file, size) for file in folder.glob(pattern)]


def _info(**changes):
    def change(folder):
        file = folder / "dataset_info.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return change


def _nothing(folder):
    return None


@pytest.mark.parametrize(
    ("name", "change", "options", "expected"),
    [
        ("tiny_digits", _nothing, {"split": "trian"}, ["--config.data.split=trian", "mean train"]),
        ("tiny_records", _nothing, {"split": "train[:x]"}, ["--config.data.split=train[:x]"]),
        (
            "tiny_digits",
            _nothing,
            {"split": "train[:0]"},
            ["--config.data.split=train[:0]", "0 examples"],
        ),
        (
            "tiny_records",
            _nothing,
            {"split": "train[:0]"},
            ["--config.data.split=train[:0]", "0 examples"],
        ),
        ("tiny_digits", _nothing, {"image_key": "img"}, ["data.image_key=img", "mean image"]),
        ("tiny_digits", _nothing, {"label_key": "lable"}, ["data.label_key=lable", "mean label"]),
        ("tiny_digits", _nothing, {"image_key": "row"}, ["[row]", "--config.data.image_key"]),
        ("tiny_digits", _remove("*-train*"), {}, ["array_record-00000-of-00001", "is missing"]),
        ("tiny_digits", _cut("*-train*", 2000), {}, ["cannot be read", "prepare"]),
        ("tiny_records", _cut("*00001-of-00002", 300), {}, ["00001-of-00002", "truncated"]),
        ("tiny_records", _cut("*00001-of-00002", 0), {}, ["00001-of-00002", "holds 0 records"]),
        ("tiny_digits", _info(fileFormat="parquet"), {"split": "train"}, ["parquet"]),
        ("tiny_digits", _info(splits=[]), {}, ["no splits"]),
    ],
)
def test_bad_tfds(tfds_dir, tmp_path, name, change, options, expected):
    for file in (tfds_dir / name / "1.0.0").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    change(tmp_path)
    with pytest.raises(InputError) as error:
        load("tfds", tmp_path, **options)
    check_message(error, *expected)


def test_tfds_asks_which_of_several(tfds_dir):
    with pytest.raises(InputError) as error:
        load("tfds", tfds_dir)
    check_message(error, "--config.data.tfds_name", "tiny_digits", "tiny_records")


def test_usps_without_h5py(tmp_path, monkeypatch):
    (tmp_path / "usps.h5").write_bytes(b"\x89HDF")
    monkeypatch.setitem(sys.modules, "h5py", None)  # how Python itself blocks an import
    with pytest.raises(InputError) as error:
        load("usps", tmp_path / "usps.h5")
    check_message(error, "pip install h5py")


def test_tfds_damaged_record(tfds_dir, tmp_path):
    for file in (tfds_dir / "tiny_records" / "1.0.0").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    shard = next(tmp_path.glob("*-test.tfrecord*"))
    content = bytearray(shard.read_bytes())
    content[12:20] = b"\xff" * 8
    shard.write_bytes(content)
    with pytest.raises(InputError) as error:
        load("tfds", tmp_path)
    check_message(error, str(tmp_path), "cannot be read", "prepare")


def test_usps_of_another_shape(tmp_path):
    h5py = pytest.importorskip("h5py")
    with h5py.File(tmp_path / "u.h5", "w") as file:
        for split in ("train", "test"):
            file[f"{split}/data"], file[f"{split}/target"] = FLOATS, LABELS
    with pytest.raises(InputError) as error:
        load("usps", tmp_path / "u.h5")
    check_message(error, "u.h5", "(30, 6)", "[n, 256]")


@pytest.mark.parametrize(
    ("num_clusters", "expected"),
    [
        (1, ["--config.method.num_clusters=1"]),
        (4, ["--config.method.num_clusters=4", "3 distinct"]),
    ],
)
def test_check_clusters_refuses(num_clusters, expected):
    dataset = data.from_arrays(np.repeat(FLOATS[:3], 10, axis=0))
    with pytest.raises(InputError) as error:
        data.check_clusters(dataset, num_clusters)
    check_message(error, *expected)


@pytest.mark.parametrize(
    ("examples", "expected"),
    [(IMAGES[:1], "only 1 example"), (np.ones((5000, 3)), "5000 examples of array are identical")],
)
def test_what_cannot_be_clustered_can_still_be_assigned(examples, expected):
    dataset = data.from_arrays(examples)
    scaled = (dataset.examples.astype(np.float32) - dataset.offset) / dataset.scale
    assert np.isfinite(scaled).all() and dataset.num_examples == len(examples)
    with pytest.raises(InputError) as error:
        data.check_clusters(dataset, 2)
    check_message(error, "--config.data", expected)


@pytest.mark.parametrize(
    ("one", "two"), [(IMAGES, FLOATS), (FLOATS, IMAGES), (FLOATS[:, 1:], FLOATS)]
)
def test_with_scaling_refuses_other_kinds(one, two):
    train = data.from_arrays(two)
    with pytest.raises(InputError) as error:
        data.with_scaling(data.from_arrays(one), train.offset, train.scale)
    check_message(error, "--config.data", "same kind")


# --- the published files, where the reader has them ---

_PUBLISHED = {
    "mnist": (
        ["f68b3c2dcbeaaa9fbdd348bbdeb94873", "d53e105ee54ea40749a09fcbcd1e9432"],
        ["9fb629c4189551a2d022fa330f9573f3", "ec29112dd5afa0611ce80d1b7f02629c"],
    ),
    "fashion-mnist": (
        ["8d4fb7e6c68d591d4c3dfef9ec88bf0d", "25c81989df183df01b3e8a0aad5dffbe"],
        ["bef4ecab320f06d8554ea6380940ec79", "bb300cfdad3c16e7a12a480ee83cd310"],
    ),
}
_FIRST_LABELS = {
    "mnist": [5, 0, 4, 1, 9, 2, 1, 3, 1, 4],
    "fashion-mnist": [9, 0, 0, 3, 0, 2, 7, 2, 5, 5],
}


def published(*parts):
    root = os.environ.get("DEC_DIFFUSION_TEST_DATA")
    if not root:
        pytest.skip("DEC_DIFFUSION_TEST_DATA is not set")
    path = Path(root, *parts)
    if not path.exists():
        pytest.skip(f"{path} does not exist")
    return path


@pytest.mark.parametrize("name", ["mnist", "fashion-mnist"])
def test_published_idx(name):
    folder = published(name)
    for prefix, sums in zip(("train", "t10k"), _PUBLISHED[name], strict=True):
        for kind, md5 in zip(("images-idx3", "labels-idx1"), sums, strict=True):
            content = (folder / f"{prefix}-{kind}-ubyte.gz").read_bytes()
            if hashlib.md5(content).hexdigest() != md5:
                pytest.skip(f"{folder} does not hold the published {name}")
    dataset = load(name, folder)
    assert (dataset.num_examples, dataset.example_shape) == (70_000, (28, 28, 1))
    assert dataset.labels[:10].tolist() == _FIRST_LABELS[name]
    assert (dataset.offset, dataset.scale) == (127.5, 127.5)
    counts = np.bincount(dataset.labels)
    assert counts[0] == (6_903 if name == "mnist" else 7_000)
    assert counts.sum() == 70_000
    for split, part in (("train", slice(60_000)), ("test", slice(60_000, None))):
        np.testing.assert_array_equal(
            load(name, folder, split=split).examples, dataset.examples[part]
        )


def test_published_usps():
    dataset = load("usps", published("usps", "usps.h5"))
    assert (dataset.num_examples, dataset.example_shape) == (9_298, (16, 16, 1))
    assert dataset.labels[0] == 6
    assert dataset.examples[0, 0, 7, 0] == pytest.approx(0.1845)
    assert (dataset.examples.min(), dataset.examples.max()) == (0, 1)
    counts = np.bincount(dataset.labels)
    assert counts.tolist() == [1553, 1269, 929, 824, 852, 716, 834, 792, 708, 821]


@pytest.mark.slow
def test_a_tfds_data_set_trains(tfds_dir, tmp_path):
    method = ClusterDDPM(
        num_clusters=3,
        latent=3,
        width=4,
        multipliers=(1,),
        encoder_multipliers=(1,),
        pretrain_iterations=1,
        balance_iterations=0,
        em_iterations=1,
        steps=2,
        mixture_restarts=2,
        sample_steps=2,
    )
    source = data.DataConfig(name="tfds", path=str(tfds_dir), tfds_name="tiny_digits")
    config = Config("tfds", method, source, TrainConfig(batch_size=8))
    result = train.fit(config, tmp_path / "run", verbose=0)
    expected = data.load(source)
    rows = (tmp_path / "run" / "assignments.csv").read_text().splitlines()
    assert len(rows) == 1 + expected.num_examples
    np.testing.assert_array_equal(result.dataset.examples, expected.examples)
    assert result.run.step == 4
    assert 0 <= result.summary["scores"]["acc"] <= 1
