"""The cache of decoded images, and data that are mapped from files rather than held in memory."""

import io
import os
import shutil
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dec_diffusion import data, reading
from dec_diffusion.baselines import kmeans_on
from dec_diffusion.data import cache, config
from dec_diffusion.types import InputError

RNG = np.random.default_rng(0)
GREY = RNG.integers(0, 256, (20, 12, 12), dtype=np.uint8)
COLOUR = RNG.integers(0, 256, (20, 12, 12, 3), dtype=np.uint8)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Fifteen grey images and five in colour, the first of these the twelfth of all."""
    place = tmp_path / "photos"
    place.mkdir()
    for i in range(20):
        image = COLOUR[i] if i >= 11 and i % 2 else GREY[i]
        Image.fromarray(image).save(place / f"{i:02d}.png")
    return place


def load(folder: Path, kept: Path | str, **options) -> data.Dataset:
    return data.load(data.DataConfig(name="folder", path=str(folder), cache=str(kept), **options))


def entries(kept: Path) -> list[Path]:
    return sorted(kept.iterdir()) if kept.exists() else []


@pytest.mark.parametrize(
    "options", [{}, {"colour": "grey"}, {"colour": "rgb"}, {"size": 7}, {"limit": 6}]
)
def test_what_comes_from_the_cache_is_what_was_decoded(tmp_path, folder, options):
    kept = tmp_path / "kept"
    plain = load(folder, "none", **options)
    for _ in range(2):
        found = load(folder, kept, **options)
        np.testing.assert_array_equal(found.examples, plain.examples)
        np.testing.assert_array_equal(found.rows, plain.rows)
        assert found.paths == plain.paths and found.examples.dtype == np.uint8
        assert (found.offset, found.scale) == (plain.offset, plain.scale)
        (entry,) = entries(kept)
        # Mapped, read-only, and a file that NumPy alone reads.
        assert not found.examples.flags.writeable
        np.testing.assert_array_equal(np.load(entry / "images.npy"), plain.examples)


def test_a_cached_folder_is_not_decoded_again(tmp_path, folder):
    kept = tmp_path / "kept"
    first = load(folder, kept)
    (entry,) = entries(kept)
    pixels = np.load(entry / "images.npy", mmap_mode="r+")
    pixels[0] = 7  # to be recognised by
    del pixels
    second = load(folder, kept)
    assert (second.examples[0] == 7).all()
    np.testing.assert_array_equal(second.examples[1:], first.examples[1:])


def test_a_changed_file_makes_the_entry_anew_and_removes_the_old_one(tmp_path, folder):
    kept = tmp_path / "kept"
    load(folder, kept)
    load(folder, kept, size=6)
    before = entries(kept)
    # The same size in bytes, another time of change.
    os.utime(folder / "03.png", ns=(1, 1))
    load(folder, kept)
    after = entries(kept)
    assert len(before) == len(after) == 2
    # Other options have another entry, which stays.
    assert len(set(before) & set(after)) == 1
    (folder / "21.png").write_bytes((folder / "00.png").read_bytes())
    assert load(folder, kept).num_examples == 21
    (folder / "00.png").unlink()
    assert load(folder, kept).num_examples == 20
    assert len(entries(kept)) == 2


def test_files_left_out_are_named_again(tmp_path, folder):
    kept = tmp_path / "kept"
    (folder / "notes.tif").write_text("in spring")
    cut = (folder / "05.png").read_bytes()
    (folder / "05.png").write_bytes(cut[: len(cut) // 2])
    rows = [i for i in range(20) if i != 5]
    with pytest.raises(InputError, match=r"notes\.tif"):
        load(folder, kept)
    assert entries(kept) == []
    for _ in range(2):
        with pytest.warns(UserWarning, match=r"left out 2 of 21 files: .*notes\.tif.*05\.png"):
            found = load(folder, kept, broken="skip")
        assert found.rows.tolist() == rows
        np.testing.assert_array_equal(found.examples[:5, :, :, 0], GREY[:5])


HARMS = {
    "images.npy": {
        "cut": lambda content: content[:-1],
        "rubbish": lambda content: b"\x80\x04cos\nsystem\n",
        "a zip file": lambda content: b"PK\x03\x04" + content,
    },
    "rows.npy": {"empty": lambda content: b""},
    "info.json": {"a list": lambda content: b"[]"},
}


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # NumPy's
@pytest.mark.parametrize(
    "harm",
    ["no info", "no images", "other shape", *[(f, how) for f in HARMS for how in HARMS[f]]],
)
def test_an_entry_that_is_not_whole_is_made_anew(tmp_path, folder, harm):
    kept = tmp_path / "kept"
    plain = load(folder, kept).examples.copy()
    (entry,) = entries(kept)
    images = entry / "images.npy"
    if harm == "no info":
        (entry / "info.json").unlink()
    elif harm == "no images":
        images.unlink()
    elif harm == "other shape":
        np.save(images, np.zeros((3, 2, 2, 1), np.uint8))
    else:
        name, how = harm
        (entry / name).write_bytes(HARMS[name][how]((entry / name).read_bytes()))
    np.testing.assert_array_equal(load(folder, kept).examples, plain)
    (entry,) = entries(kept)
    np.testing.assert_array_equal(np.load(entry / "images.npy"), plain)


def test_an_entry_is_for_all_who_may_use_the_cache(tmp_path, folder):
    kept = tmp_path / "kept"
    kept.mkdir()
    kept.chmod(0o755)
    load(folder, kept)
    (entry,) = entries(kept)
    assert entry.stat().st_mode & 0o777 == 0o755


def test_what_a_kill_leaves_is_never_used_and_cleared_away_in_time(tmp_path, folder):
    kept = tmp_path / "kept"
    young, old = kept / ".making-young", kept / ".making-old"
    for place in (young, old):
        place.mkdir(parents=True)
        (place / "images.npy").write_bytes(b"half")
    long_ago = time.time() - 7 * 86400
    os.utime(old, (long_ago, long_ago))
    assert load(folder, kept).num_examples == 20
    assert young.exists() and not old.exists() and len(entries(kept)) == 2


def test_processes_that_make_the_same_entry_at_once_do_no_harm(tmp_path, folder, start_python):
    code = """
import sys, zlib
from dec_diffusion import data
d = data.load(data.DataConfig(name="folder", path=sys.argv[1], cache=sys.argv[2]))
print(zlib.crc32(d.examples.tobytes()), flush=True)
"""
    kept = tmp_path / "kept"
    running = [start_python(code, folder, kept) for _ in range(3)]
    expected = zlib.crc32(load(folder, "none").examples.tobytes())
    for process in running:
        assert process.stdout.readline().strip() == str(expected), process.stderr.read()
    assert len(entries(kept)) == 1


def test_a_place_that_cannot_be_written_costs_a_warning_only(tmp_path, folder):
    (tmp_path / "file").write_text("")
    plain = load(folder, "none")
    with pytest.warns(UserWarning, match=r"not kept .*file.*--config\.data\.cache") as record:
        found = load(folder, tmp_path / "file" / "kept")
    assert len(record) == 1 and "\n" not in str(record[0].message)
    np.testing.assert_array_equal(found.examples, plain.examples)


def test_a_disk_too_full_costs_a_warning_only(tmp_path):
    place = cache.Cache(tmp_path / "kept" / "photos-1-2", always=True)
    free = shutil.disk_usage(tmp_path).free
    with pytest.raises(cache.CacheError, match="GiB"):
        cache.begin(place, free // 2 + 2**20)


def test_by_default_only_large_results_are_kept(tmp_path, folder, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    load(folder, "auto")
    assert not (tmp_path / "home").exists()
    place = cache.locate("auto", folder, (), ())
    assert place is not None
    assert place.folder.parent == tmp_path / "home" / "dec_diffusion" / "images"
    assert not place.wants(config.LARGE - 1) and place.wants(config.LARGE)
    assert cache.locate("none", folder, (), ()) is None


def test_a_user_without_a_home_keeps_nothing(folder, monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr("os.path.expanduser", lambda path: path)
    assert cache.user_folder() is None
    assert cache.locate("auto", folder, (), ()) is None


def test_parquet_images_are_kept_too(tmp_path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    encoded = []
    for image in COLOUR:
        out = io.BytesIO()
        Image.fromarray(image).save(out, "PNG")
        encoded.append({"bytes": out.getvalue(), "path": None})
    pq.write_table(pa.table({"image": encoded}), tmp_path / "a.parquet")
    kept = tmp_path / "kept"
    for _ in range(2):
        found = data.load(
            data.DataConfig(name="parquet", path=str(tmp_path / "a.parquet"), cache=str(kept))
        )
        np.testing.assert_array_equal(found.examples, COLOUR)
        assert len(entries(kept)) == 1


# --- mapped files, and memory -------------------------------------------------------------------


def test_a_large_file_is_mapped_and_a_small_one_read(tmp_path):
    small, large = tmp_path / "small.npy", tmp_path / "large.npy"
    np.save(small, COLOUR)
    n = config.LARGE // 3072 + 1
    pixels = np.lib.format.open_memmap(large, "w+", np.uint8, (n, 32, 32, 3))
    pixels[0], pixels[-1] = 200, 255
    pixels.flush()
    assert data.load(data.DataConfig(name="npy", path=str(small))).examples.flags.writeable
    found = data.load(data.DataConfig(name="npy", path=str(large)))
    assert not found.examples.flags.writeable
    assert found.examples.shape == (n, 32, 32, 3) and found.scale == 127.5
    assert found.examples[-1].min() == 255


@pytest.mark.skipif(sys.platform != "linux", reason="the limit counts other things elsewhere")
def test_a_file_larger_than_memory_is_loaded(tmp_path, run_python):
    # Blocks of a file that were never written take no room on disk.
    large = tmp_path / "large.npy"
    images = np.lib.format.open_memmap(large, "w+", np.uint8, (100_000, 32, 32, 3))
    images[:50] = RNG.integers(0, 256, (50, 32, 32, 3))
    images.flush()
    code = """
import resource, sys
from dec_diffusion import data, reading
import numpy as np
used = next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith("VmData")) * 1024
limit = used + 100 * 2**20  # the file has three times as many bytes
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
d = data.load(data.DataConfig(name="array", path=sys.argv[1]))
data.check_clusters(d, 10)
print(d.num_examples, float(d.scale), reading.checksum(d.examples, sampled=False))
try:
    np.zeros(200 * 2**20, np.uint8)
except MemoryError:
    print("limited")
"""
    said = run_python(code, large).stdout.split()
    assert said[:2] == ["100000", "127.5"] and said[3] == "limited"


def test_the_checksum_of_parts_is_that_of_the_whole():
    examples = RNG.integers(0, 256, (9001, 2, 3, 1), dtype=np.uint8)
    assert reading.checksum(examples, sampled=False) == zlib.crc32(examples.tobytes())
    assert reading.checksum(examples[::2], sampled=False) == zlib.crc32(examples[::2].tobytes())


def test_baselines_of_part_of_the_rows_label_all():
    from sklearn.cluster import KMeans

    centres = 8.0 * np.eye(4, 6)
    x = (centres[np.arange(6000) % 4] + RNG.normal(size=(6000, 6))).astype(np.float32)
    truth = np.arange(6000) % 4
    scale = np.array([1, 2, 3, 4, 5, 6.0])
    found = kmeans_on(x, 4, truth, seed=0, limit=500, scale=scale)
    assert found["settings"]["rows_fitted"] == 500 and found["settings"]["rows"] == 6000
    drawn = np.sort(np.random.default_rng(0).choice(6000, 500, replace=False))
    points = (x.astype(np.float64) - x.mean(0, dtype=np.float64)) / scale
    model = KMeans(4, n_init=10, max_iter=300, random_state=0).fit(points[drawn])
    np.testing.assert_array_equal(found["labels"], model.predict(points))
    assert found["scores"]["largest_share"] == np.bincount(found["labels"]).max() / 6000
