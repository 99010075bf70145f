"""Input in several files: arrays mapped one after the other, and decoding shared by processes."""

import csv
import pathlib
import socket
import zlib
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image

import dec_diffusion as dd
from dec_diffusion import data, distributed, evaluate, num_clusters, reading
from dec_diffusion.data.shards import Shards
from dec_diffusion.types import InputError

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (23, 6, 5, 3), dtype=np.uint8)
CUTS = [9, 9, 10]  # of 23 rows: parts of 9, 0, 1 and 13


def parts(x: np.ndarray) -> list[np.ndarray]:
    return np.split(x, CUTS)


def put(folder: pathlib.Path, x: np.ndarray, labels: np.ndarray | None = None) -> pathlib.Path:
    folder.mkdir(exist_ok=True)
    for i, part in enumerate(parts(x)):
        np.save(folder / f"images-{i:05d}-of-00004.npy", part)
    if labels is not None:
        for i, part in enumerate(np.split(labels, [11])):
            np.save(folder / f"labels-{i}.npy", part)
    return folder


def load(folder: pathlib.Path, name: str = "array", **options) -> data.Dataset:
    return data.load(data.DataConfig(name=name, path=str(folder), **options))


INDICES = [
    0, -1, 9, np.int64(10), slice(None), slice(2, 7), slice(8, 12), slice(9, 9), slice(-4, None),
    slice(20, 99), slice(None, None, 3), slice(None, None, -1), slice(0, 0), [3, 9, 9, 22, 0],
    np.array([], np.int64), np.arange(23)[::-1], np.arange(20).reshape(4, 5),
    np.arange(23) % 3 == 0,
]  # fmt: skip


@pytest.mark.parametrize("index", INDICES, ids=str)
def test_an_index_takes_what_it_takes_from_the_joined_array(index):
    shards = Shards(parts(IMAGES))
    found = shards[index]
    np.testing.assert_array_equal(found, IMAGES[index])
    assert isinstance(found, np.ndarray) and found.dtype == np.uint8


def test_more_files_than_a_process_may_open_at_first(tmp_path):
    resource = pytest.importorskip("resource")
    for i in range(700):
        np.save(tmp_path / f"{i:03d}.npy", np.full((2, 3), i, np.float32))
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (600, limits[1]))
    try:
        examples = np.asarray(load(tmp_path).examples)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    np.testing.assert_array_equal(examples[:, 0], np.repeat(np.arange(700), 2))


def test_a_file_that_only_looks_like_an_archive_is_named(tmp_path):
    (tmp_path / "a.npy").write_bytes(b"PK\x03\x04 and no more")
    with pytest.raises(InputError, match=r"a\.npy: cannot be read .*np\.save"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("other", "words"),
    [(IMAGES, ""), (IMAGES[::-1], "or other values"), (IMAGES[:20], r"20 examples .* 0 23 of")],
)
def test_processes_that_read_other_data_are_refused(monkeypatch, other, words):
    mine, theirs = (data.from_arrays(x, None, name="x", source="x") for x in (IMAGES, other))
    texts: list[str] = []

    def exchange(topic: str, text: str) -> list[str]:
        texts.append(text)
        return texts

    monkeypatch.setattr(reading.jax, "process_count", lambda: 2)
    monkeypatch.setattr(distributed, "exchange", exchange)
    reading.check_same(mine)
    if not words:
        reading.check_same(theirs)
        return
    with pytest.raises(InputError, match=rf"^--config.data: process 1 read .*{words}"):
        reading.check_same(theirs)


def test_shards_tell_of_themselves_what_the_joined_array_tells():
    shards = Shards(parts(IMAGES))
    assert (shards.shape, shards.dtype, shards.ndim) == (IMAGES.shape, IMAGES.dtype, 4)
    assert (shards.size, shards.nbytes, len(shards)) == (IMAGES.size, IMAGES.nbytes, 23)
    np.testing.assert_array_equal(np.stack(list(shards)), IMAGES)
    np.testing.assert_array_equal(np.asarray(shards, np.float32), IMAGES.astype(np.float32))
    for wrong in (23, -24, [0, 23], np.ones(22, bool)):
        with pytest.raises(IndexError):
            shards[wrong]


@pytest.mark.parametrize("index", [3, slice(2, 12), [22, 0, 9]], ids=str)
def test_shards_convert_what_is_read_and_nothing_else(index):
    x = RNG.normal(size=(23, 4))
    x[9, 0] = 1e300
    shards = Shards(parts(x), np.float32)
    with np.errstate(over="ignore"):
        wanted = x.astype(np.float32)
    np.testing.assert_array_equal(shards[index], wanted[index])
    assert shards[index].dtype == np.float32
    assert shards.nbytes == wanted.nbytes
    np.testing.assert_array_equal(np.asarray(shards), wanted)
    np.testing.assert_array_equal(np.stack(list(shards)), wanted)
    assert all(part.dtype == np.float64 and np.shares_memory(part, x) for part in shards.parts)


def test_a_mapped_file_of_doubles_is_converted_as_it_is_read(tmp_path):
    x = RNG.normal(size=(23, 4))
    np.save(tmp_path / "x.npy", x)
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    dataset = data.from_arrays(mapped)
    assert isinstance(dataset.examples, Shards)
    assert all(isinstance(part, np.memmap) for part in dataset.examples.parts)
    np.testing.assert_array_equal(np.asarray(dataset.examples), x.astype(np.float32))
    np.testing.assert_array_equal(dataset.offset, data.from_arrays(x).offset)


@pytest.mark.parametrize("kind", ["colour", "grey", "vectors", "float64"])
def test_a_folder_of_arrays_is_the_data_set_of_the_joined_file(tmp_path, kind):
    x = {"colour": IMAGES, "grey": IMAGES[..., 0]}.get(kind, RNG.normal(size=(23, 4)))
    x = x if kind in ("colour", "grey", "float64") else x.astype(np.float32)
    labels = np.arange(23) % 3
    np.save(tmp_path / "whole.npy", x)
    whole, found = load(tmp_path / "whole.npy"), load(put(tmp_path / "parts", x, labels))
    np.testing.assert_array_equal(np.asarray(found.examples), whole.examples)
    assert isinstance(found.examples, Shards) and found.examples.dtype == whole.examples.dtype
    np.testing.assert_array_equal(found.offset, whole.offset)
    np.testing.assert_array_equal(found.scale, whole.scale)
    np.testing.assert_array_equal(found.labels, labels)
    few, some = (load(tmp_path / name, limit=7) for name in ("whole.npy", "parts"))
    np.testing.assert_array_equal(few.examples, some.examples)
    np.testing.assert_array_equal(few.rows, some.rows)
    assert reading.checksum(found.examples, sampled=False) == reading.checksum(
        np.asarray(whole.examples), sampled=False
    )


def test_baselines_and_the_number_of_clusters_are_those_of_the_joined_file(tmp_path):
    x = (np.repeat(np.eye(4) * 9, 60, 0) + RNG.normal(size=(240, 4))).astype(np.float32)
    x = x[RNG.permutation(240)]
    np.save(tmp_path / "whole.npy", x)
    sets = [load(tmp_path / "whole.npy"), load(put(tmp_path / "parts", x))]
    assert [num_clusters.choose(d.examples).chosen for d in sets] == [4, 4]
    assignment = evaluate.Assignment(np.zeros(240, np.int32), np.ones(240), np.ones((240, 1)), x)
    first, second = (evaluate.compare(d, assignment, 4, seed=0) for d in sets)
    assert first.keys() == second.keys()
    for name, baseline in first.items():
        assert second[name]["scores"] == pytest.approx(baseline["scores"], abs=1e-6)
    for dataset in sets:
        data.check_clusters(dataset, 4)


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        ("missing", r"images-00002-of-00004\.npy: is missing; copy it there"),
        ("shape", r"images-00003-of-00004\.npy: holds uint8 of shape \(4, 4\), .*must be alike"),
        ("dtype", r"images-00003-of-00004\.npy: holds float32 of shape .*must be alike"),
        ("pickle", r"images-00003-of-00004\.npy: cannot be read .*np\.save"),
        ("cut", r"images-00003-of-00004\.npy: cannot be read"),
        ("labels", "22 labels for 23 examples"),
        ("only labels", r"no \*\.npy files of examples"),
        ("split", r"--config\.data\.split=train: .*a folder of \.npy files has no splits"),
        ("key", r"--config\.data\.image_key: .*a folder of \.npy files"),
    ],
)
def test_what_does_not_fit_together_is_refused_in_one_line(tmp_path, harm, message):
    folder = put(tmp_path / "a", IMAGES, np.arange(23))
    last, options = folder / "images-00003-of-00004.npy", {}
    if harm == "missing":
        (folder / "images-00002-of-00004.npy").unlink()
    elif harm == "shape":
        np.save(last, np.zeros((3, 4, 4), np.uint8))
    elif harm == "dtype":
        np.save(last, np.load(last).astype(np.float32))
    elif harm == "pickle":
        np.save(last, np.array([print], object), allow_pickle=True)
    elif harm == "cut":
        last.write_bytes(last.read_bytes()[:-1])
    elif harm == "labels":
        np.save(folder / "labels-0.npy", np.arange(10))
    elif harm == "only labels":
        for file in folder.glob("images*"):
            file.unlink()
    else:
        options = {"split": "train"} if harm == "split" else {"image_key": "x"}
    with pytest.raises(InputError, match=message) as error:
        load(folder, "npy", **options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kinds", [(["cat"] * 10, ["horse"] * 13), (np.int32(1), np.int64(2))])
def test_labels_of_shards_may_be_of_different_width(tmp_path, kinds):
    folder = put(tmp_path / "a", IMAGES)
    first, second = np.broadcast_to(kinds[0], 10), np.broadcast_to(kinds[1], 13)
    np.save(folder / "labels-0.npy", first)
    np.save(folder / "labels-1.npy", second)
    labels = load(folder).labels
    assert labels is not None and labels.tolist() == [*first.tolist(), *second.tolist()]


def test_a_stray_array_does_not_make_a_folder_of_images_one_of_arrays(tmp_path):
    np.save(tmp_path / "a.npy", IMAGES)
    (tmp_path / "b.png").write_bytes(b"")
    assert data.config.check_config(data.DataConfig(name="array", path=str(tmp_path))) == "folder"
    (tmp_path / "b.png").unlink()
    assert data.config.check_config(data.DataConfig(name="array", path=str(tmp_path))) == "npy"


# -- decoding shared by processes --

READ = """
import sys, warnings, zlib
import numpy as np
from dec_diffusion import data, distributed, reading
from dec_diffusion.types import InputError
address, number, name, path, cache, colour, broken = sys.argv[1:]
config = data.DataConfig(name=name, path=path, cache=cache, colour=colour, broken=broken)
warnings.simplefilter("ignore")
with distributed.joined(distributed.Pod("on", address, 2, int(number), 120), verbose=False):
    try:
        d = reading.read(config, verbose=int(number == "0"))
    except InputError as error:
        print("refused", error)
    else:
        x = np.asarray(d.examples)
        print("read", type(d.examples).__name__, x.shape, zlib.crc32(x.tobytes()), d.rows.tolist())
        print("labels", None if d.labels is None else d.labels.tolist())
"""


@pytest.fixture
def two(start_python) -> Callable[..., list[str]]:
    """Reads data in two processes; what each says, last lines only."""

    def run(name, path, caches, *, colour="auto", broken="refuse") -> list[str]:
        address = f"localhost:{free_port()}"
        running = [
            start_python(READ, address, i, name, path, caches[i], colour, broken, devices=1)
            for i in range(2)
        ]
        outputs = [process.communicate(timeout=200) for process in running]
        assert [p.returncode for p in running] == [0, 0], outputs
        return [said for said, _ in outputs]

    return run


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


def pictures(folder: pathlib.Path, colours: set[int]) -> pathlib.Path:
    """Twenty-three images, those of ``colours`` not grey."""
    folder.mkdir()
    for i, image in enumerate(IMAGES):
        pixels = image if i in colours else image[..., 0]
        Image.fromarray(pixels).save(folder / f"{i:02d}.png")
    return folder


def said(dataset: data.Dataset, kind: str = "Shards") -> str:
    x = np.asarray(dataset.examples)
    labels = None if dataset.labels is None else dataset.labels.tolist()
    rows = dataset.rows.tolist()
    return f"read {kind} {x.shape} {zlib.crc32(x.tobytes())} {rows}\nlabels {labels}\n"


@pytest.mark.parametrize("colours", [{3}, {20}], ids=["in the first", "in the last"])
def test_processes_share_the_decoding_and_get_what_one_gets(tmp_path, two, colours):
    folder, kept = pictures(tmp_path / "a", colours), tmp_path / "kept"
    alone = load(folder, "folder", cache="none")
    for output in two("folder", folder, [kept, kept]):
        assert output.endswith(said(alone))
    (entry,) = kept.iterdir()
    parts = [np.load(file) for file in sorted(entry.glob("images-*"))]
    assert [len(part) for part in parts] == [11, 12]
    # Found by one process, too.
    found = load(folder, "folder", cache=str(kept))
    assert isinstance(found.examples, Shards) and found.paths == alone.paths
    np.testing.assert_array_equal(np.asarray(found.examples), alone.examples)


def test_a_broken_image_of_one_share_stops_both_or_is_skipped_by_both(tmp_path, two):
    folder, kept = pictures(tmp_path / "a", {5}), tmp_path / "kept"
    cut = (folder / "17.png").read_bytes()
    (folder / "17.png").write_bytes(cut[:-30])
    for output in two("folder", folder, [kept, kept]):
        (line,) = [line for line in output.splitlines() if line.startswith("refused")]
        assert "17.png: cannot be read" in line and "repair or remove it" in line
    assert list(kept.iterdir()) == []
    with pytest.warns(UserWarning, match=r"left out 1 of 23 files: .*17\.png"):
        alone = load(folder, "folder", cache="none", broken="skip")
    for output in two("folder", folder, [kept, kept], broken="skip"):
        assert output.endswith(said(alone))


def test_without_a_common_cache_each_decodes_all_and_one_line_says_so(tmp_path, two):
    folder = pictures(tmp_path / "a", {5})
    kept = [tmp_path / "first", tmp_path / "second"]
    alone = load(folder, "folder", cache="none")
    outputs = two("folder", folder, kept)
    for output in outputs:
        assert output.endswith(said(alone, "ndarray"))
    assert outputs[0].count("is not one folder for all processes") == 1
    assert "--config.data.cache=FOLDER" in outputs[0] and len(outputs[1].splitlines()) == 2
    assert [len(list(place.iterdir())) for place in kept] == [1, 1]


def test_a_process_that_cannot_read_at_all_stops_those_that_wait_for_it(tmp_path, start_python):
    folder, kept = pictures(tmp_path / "a", set()), tmp_path / "kept"
    address, paths = f"localhost:{free_port()}", [folder, tmp_path / "elsewhere"]
    running = [
        start_python(READ, address, i, "folder", paths[i], kept, "auto", "refuse", devices=1)
        for i in range(2)
    ]
    outputs = [process.communicate(timeout=200)[0] for process in running]
    assert "elsewhere: does not exist" in outputs[1]
    assert "process 1 stopped: " in outputs[0] and "elsewhere: does not exist" in outputs[0]


PREDICT = """
import sys
from dec_diffusion import main
sys.exit(main.execute(["main", "--mode=predict", *sys.argv[1:]]))
"""


def test_processes_that_predict_share_the_decoding_too(tmp_path, start_python):
    folder, kept, run = pictures(tmp_path / "a", {3}), tmp_path / "kept", tmp_path / "run"
    settings = {"iterations": 1, "steps": 1, "networks": 1, "width": 8, "hidden": 8}
    model = dd.NeuralMixture(3, settings=settings, batch_size=8).fit(IMAGES)
    model.save(run)
    options = [f"--workdir={run}", f"--config.data.path={folder}", f"--config.data.cache={kept}"]
    address = f"localhost:{free_port()}"
    pod = [f"--coordinator={address}", "--num_processes=2", "--distributed_timeout=120"]
    running = [
        start_python(PREDICT, *options, *pod, f"--process_id={i}", devices=1) for i in range(2)
    ]
    outputs = [process.communicate(timeout=200) for process in running]
    assert [process.returncode for process in running] == [0, 0], outputs
    (entry,) = kept.iterdir()
    assert [len(np.load(file)) for file in sorted(entry.glob("images-*"))] == [11, 12]
    with (run / "predict" / "assignments.csv").open(newline="") as file:
        found = [int(row["cluster"]) for row in csv.DictReader(file)]
    alone = load(folder, "folder", cache="none")
    np.testing.assert_array_equal(found, model.predict(alone.examples))
