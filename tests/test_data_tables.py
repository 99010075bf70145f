"""Tables as text and parquet, images in parquet, progress, and files that carry code."""

import contextlib
import gzip
import importlib
import io
import json
import pickle
import sys
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dec_diffusion import data
from dec_diffusion.data import folder
from dec_diffusion.types import InputError

pa = pytest.importorskip("pyarrow")
pq = importlib.import_module("pyarrow.parquet")

RNG = np.random.default_rng(0)
X = RNG.normal(size=(30, 4)).astype(np.float32)
NAMES = ["width", "height", "mass", "age"]
KINDS = ["cat", "dog", "cow"] * 10


def load(path, **options):
    return data.load(data.DataConfig(**{"name": "array", "path": str(path)} | options))


def put(path: Path, content: bytes | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def text(columns, header=True, delimiter=","):
    """Columns by name as lines of text; repr of a float32 is exact."""
    lines = [[f"{v}" for v in row] for row in zip(*columns.values(), strict=True)]
    return "\n".join(map(delimiter.join, [list(columns)] * header + lines)) + "\n"


FEATURES = {name: X[:, i] for i, name in enumerate(NAMES)}


@pytest.mark.parametrize("header", [True, False])
@pytest.mark.parametrize(
    ("name", "delimiter"), [("a.csv", ","), ("a.csv", ";"), ("a.TSV", "\t"), ("a.csv.gz", ",")]
)
def test_numbers_are_read_as_they_are(tmp_path, name, delimiter, header):
    content = text(FEATURES, header, delimiter).encode()
    dataset = load(put(tmp_path / name, gzip.compress(content) if "gz" in name else content))
    np.testing.assert_array_equal(dataset.examples, X)
    assert dataset.examples.dtype == np.float32
    assert (dataset.labels, dataset.paths, dataset.name) == (None, None, "a")


@pytest.mark.parametrize(
    "change",
    [
        lambda t: "\ufeff" + t,
        lambda t: t.replace("\n", "\r\n"),
        lambda t: t.replace("\n", "\n\n").rstrip(),
        lambda t: '"' + t.replace(",", '" , "').replace("\n", '"\n"').removesuffix('"'),
    ],
    ids=["byte order mark", "CRLF", "empty lines", "quotes"],
)
def test_dialects(tmp_path, change):
    content = change(text(FEATURES)).replace('" , "', '","')
    np.testing.assert_array_equal(load(put(tmp_path / "a.csv", content)).examples, X)


@pytest.mark.parametrize("kind", ["csv", "parquet"])
@pytest.mark.parametrize(
    ("column", "values", "options"),
    [
        ("label", list(range(30)), {}),
        ("labels", KINDS, {}),
        ("species", KINDS, {"label": "species"}),
        ("species", [i % 3 for i in range(30)], {"label": "species"}),
    ],
)
def test_labels_are_taken_off(tmp_path, kind, column, values, options):
    columns = {"width": X[:, 0], column: values} | FEATURES
    path = write(tmp_path / f"a.{kind}", columns)
    dataset = load(path, **options)
    np.testing.assert_array_equal(dataset.examples, X)
    assert dataset.labels is not None and dataset.labels.tolist() == values
    part = load(path, limit=7, **options)
    np.testing.assert_array_equal(part.examples, X[part.rows])
    assert part.labels.tolist() == [values[i] for i in part.rows]


def write(path: Path, columns) -> Path:
    """A table in the format that the name ends in."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".csv":
        return put(path, text(columns))
    pq.write_table(pa.table(columns), path, row_group_size=11)
    return path


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_columns_left_out(tmp_path, kind):
    ids = [f"row {i}" for i in range(30)]
    path = write(tmp_path / f"a.{kind}", {"id": ids, "label": KINDS} | FEATURES | {"note": KINDS})
    dataset = load(path, drop=("note",))
    np.testing.assert_array_equal(dataset.examples, X)
    # The first is no feature, but what the examples are called.
    assert dataset.paths == ids
    part = load(path, drop=("note",), limit=7)
    assert part.paths == [ids[i] for i in part.rows]
    dataset = load(path, drop=("note", "label", "mass", "id"))
    np.testing.assert_array_equal(dataset.examples, X[:, [0, 1, 3]])
    assert dataset.labels is None and dataset.paths is None


@pytest.mark.parametrize("name", ["id", "__index_level_0__"])
@pytest.mark.parametrize("values", [[f"row {i}" for i in range(30)], list(range(100, 130))])
def test_the_index_of_a_data_frame_names_the_rows(tmp_path, name, values):
    def frame(**index):
        # pandas puts the index last, and says which columns it was.
        stored = json.dumps({"index_columns": list(index), "columns": []})
        table = pa.table(FEATURES | {"label": KINDS} | index)
        pq.write_table(table.replace_schema_metadata({"pandas": stored}), tmp_path / "a.parquet")
        return tmp_path / "a.parquet"

    dataset = load(frame(**{name: values}))
    np.testing.assert_array_equal(dataset.examples, X)
    assert (dataset.columns, dataset.paths) == (tuple(NAMES), [str(v) for v in values])
    # One that is asked for by name is what it is asked for as.
    assert load(frame(**{name: KINDS}), label=name, drop=("label",)).labels.tolist() == KINDS
    # One whose values repeat names nothing, as the levels of several do not.
    for index in ({name: values[:15] * 2}, {name: values, "level": values}):
        dataset = load(frame(**index))
        np.testing.assert_array_equal(dataset.examples, X)
        assert dataset.paths is None


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_a_column_that_counts_the_rows_is_warned_of(tmp_path, kind):
    path = write(tmp_path / f"a.{kind}", {"n": list(range(5, 35))} | FEATURES)
    with pytest.warns(UserWarning, match=r"column n counts the rows .*--config.data.drop=n"):
        assert load(path).examples.shape == (30, 5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        np.testing.assert_array_equal(load(path, drop=("n",)).examples, X)


def test_names_that_are_numbers_and_columns_without_names(tmp_path):
    head = ",0,1,2,3\n"
    body = "".join(f"r{i},{text({n: [v] for n, v in enumerate(row)}, False)}"
                   for i, row in enumerate(X))  # fmt: skip
    np.testing.assert_array_equal(load(put(tmp_path / "a.csv", head + body)).examples, X)
    dataset = load(put(tmp_path / "b.csv", text(FEATURES, False)), drop=("2",))
    np.testing.assert_array_equal(dataset.examples, X[:, [0, 2, 3]])


@pytest.mark.parametrize("first", [0, 1])
def test_numbers_that_count_four_columns_and_more_are_names(tmp_path, first):
    def head(n: int) -> str:
        return ",".join(str(first + i) for i in range(n)) + "\n"

    path = put(tmp_path / "a.csv", head(4) + text(FEATURES, False))
    np.testing.assert_array_equal(load(path).examples, X)
    assert load(path).columns == tuple(str(first + i) for i in range(4))
    # Of three columns it may as well be an example.
    few = {name: FEATURES[name] for name in NAMES[:3]}
    dataset = load(put(tmp_path / "b.csv", head(3) + text(few, False)))
    np.testing.assert_array_equal(dataset.examples[0], first + np.arange(3))
    assert dataset.columns is None


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_columns_are_found_by_name(tmp_path, kind):
    first = load(write(tmp_path / f"a.{kind}", FEATURES))
    assert first.columns == tuple(NAMES)
    turned = {name: FEATURES[name] for name in ["mass", "age", "width", "height"]}
    other = load(write(tmp_path / f"b.{kind}", {"more": X[:, 0] ** 2} | turned))
    found = data.with_columns(other, first.columns)
    np.testing.assert_array_equal(found.examples, X)
    np.testing.assert_array_equal(found.scale, first.scale)
    assert found.columns == first.columns
    assert data.with_columns(other, None) is other
    unnamed = data.from_arrays(X)
    assert data.with_columns(unnamed, first.columns) is unnamed
    with pytest.raises(InputError, match=r"no column more, of which the run was trained"):
        data.with_columns(first, other.columns)


def test_parquet_types_of_numbers(tmp_path):
    columns = {
        "a": pa.array(range(30), pa.int8()),
        "b": pa.array([i % 2 == 0 for i in range(30)]),
        "c": pa.array(X[:, 0].astype(np.float64)),
    }
    dataset = load(write(tmp_path / "a.parquet", columns), drop=("a",))
    np.testing.assert_array_equal(dataset.examples[:, 0], np.arange(30) % 2 == 0)
    np.testing.assert_array_equal(dataset.examples[:, 1], X[:, 0])


# --- images in parquet ---------------------------------------------------------------------------

PICTURES = RNG.integers(0, 256, (12, 9, 7, 3), dtype=np.uint8)


def png(array) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(array).save(stream, "png")
    return stream.getvalue()


def pictures(path: Path, contents, label=None, column="image", plain=False) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    values = contents if plain else [{"bytes": c, "path": "x.png"} for c in contents]
    table = {column: values, "caption": ["text"] * len(contents)}
    pq.write_table(pa.table(table | ({"label": label} if label else {})), path, row_group_size=5)
    return path


@pytest.mark.parametrize("column", ["image", "img", "scan"])
@pytest.mark.parametrize("plain", [False, True])
def test_images_of_one_file(tmp_path, column, plain):
    contents = [png(picture) for picture in PICTURES]
    path = pictures(tmp_path / "a.parquet", contents, list(range(12)), column, plain)
    dataset = load(path)
    np.testing.assert_array_equal(dataset.examples, PICTURES)
    assert dataset.labels.tolist() == list(range(12))
    assert load(path, drop=("label",)).labels is None
    part = load(path, limit=5)
    np.testing.assert_array_equal(part.examples, PICTURES[part.rows])
    assert part.labels.tolist() == part.rows.tolist()


@pytest.mark.parametrize("place", ["", "data"])
def test_images_of_parts(tmp_path, place):
    contents = [png(picture) for picture in PICTURES]
    for name, part in (("test-0", slice(9, 12)), ("train-1", slice(5, 9)), ("train-0", slice(5))):
        pictures(tmp_path / place / f"{name}.parquet", contents[part])
    put(tmp_path / "README.md", "not a picture")
    np.testing.assert_array_equal(load(tmp_path).examples, PICTURES)
    np.testing.assert_array_equal(load(tmp_path, split="test").examples, PICTURES[9:])
    np.testing.assert_array_equal(load(tmp_path, split="train").examples, PICTURES[:9])


def test_images_get_the_sizes_that_a_folder_of_them_gets(tmp_path):
    contents = []
    for i in range(20):
        shape = (*RNG.integers(5, 90, 2), 3)[: 2 + i % 2]
        contents.append(png(RNG.integers(0, 256, shape, dtype=np.uint8)))
        put(tmp_path / "folder" / f"{i:02d}.png", contents[-1])
    path = pictures(tmp_path / "a.parquet", contents)
    for options in ({}, {"size": 12}, {"colour": "grey"}, {"limit": 6}):
        mine, theirs = load(path, **options), load(tmp_path / "folder", **options)
        np.testing.assert_array_equal(mine.examples, theirs.examples)
        np.testing.assert_array_equal(mine.rows, theirs.rows)
    config = data.DataConfig(name="array", path=str(path))
    assert data.load(config, shape=(10, 11, 1)).examples.shape == (20, 10, 11, 1)


def test_broken_images_are_left_out_with_their_labels(tmp_path):
    contents = [png(picture) for picture in PICTURES]
    contents[3], contents[7], contents[8] = contents[3][:60], b"no image", None
    path = pictures(tmp_path / "a.parquet", contents, list(range(12)))
    with pytest.warns(UserWarning, match=r"left out 3 of 12 files: .*row 8 is not an image"):
        dataset = load(path, broken="skip")
    good = [0, 1, 2, 4, 5, 6, 9, 10, 11]
    np.testing.assert_array_equal(dataset.examples, PICTURES[good])
    assert dataset.rows.tolist() == dataset.labels.tolist() == good


# --- progress ------------------------------------------------------------------------------------


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("stream", [io.StringIO, Terminal])
@pytest.mark.parametrize("verbose", [0, 1])
@pytest.mark.parametrize("wait", [0.0, 60.0])
def test_progress_while_reading(tmp_path, monkeypatch, stream, verbose, wait):
    monkeypatch.setattr(folder, "_QUIET_SECONDS", wait - 1)
    monkeypatch.setattr(folder, "_LIVE_SECONDS", -1.0)
    path = pictures(tmp_path / "a.parquet", [png(picture) for picture in PICTURES])
    with contextlib.redirect_stdout(stream()) as out:
        data.load(data.DataConfig(name="array", path=str(path)), verbose=verbose)
    said = out.getvalue()
    if not verbose or wait:
        assert said == ""
    else:
        assert "100%  reading 12 images  0:00 left" in said
        assert ("\r" in said) == out.isatty() and said.endswith("\n")


# --- files that carry code -----------------------------------------------------------------------


class Payload:
    """Unpickled, it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize("kind", ["npy", "npz", "npz labels", "bare pickle", "zipped pickle"])
def test_code_in_a_file_is_not_run(tmp_path, kind):
    made = tmp_path / "made"
    array = np.array([Payload(made), 1], object)
    path = tmp_path / f"a.{kind[:3] if kind.startswith('np') else 'npy'}"
    if kind == "npy":
        np.save(path, array, allow_pickle=True)
    elif kind == "npz":
        np.savez(path, x=array)
    elif kind == "npz labels":
        np.savez(path, x=X[:2], y=array)
    elif kind == "bare pickle":
        path.write_bytes(pickle.dumps(Payload(made)))
    else:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("x.npy", pickle.dumps(Payload(made)))
    with pytest.raises(InputError) as error:
        load(path)
    assert "a.np" in str(error.value) and "\n" not in str(error.value)
    assert not made.exists()
    # The file would have been made by whoever does load it.
    if kind == "npy":
        np.load(path, allow_pickle=True)[0].close()
        assert made.exists()


# --- bad input -----------------------------------------------------------------------------------


def csv(content, name="a.csv"):
    return lambda t: put(t / name, content)


def table(columns):
    return lambda t: write(t / "a.parquet", columns)


def images(contents, **options):
    return lambda t: pictures(t / "a.parquet", contents, **options)


def two(first, second):
    def make(t):
        write(t / "d" / "a.parquet", first)
        write(t / "d" / "b.parquet", second)
        return t / "d"

    return make


_DROP = "--config.data.drop="
_PNG = png(PICTURES[0])
BAD = {
    "no file": (lambda t: t / "no.csv", {}, ["--config.data.path", "does not exist"]),
    "empty": (csv(""), {}, ["a.csv: is empty"]),
    "only names": (csv("a,b\n"), {}, ["0 examples"]),
    "only empty lines": (csv("\n\n"), {}, ["0 examples"]),
    "binary": (csv(b"a,b\n1,\0\n"), {}, ["not a text file", "UTF-8"]),
    "other encoding": (csv("ä,b\n1,2\n".encode("latin-1")), {}, ["cannot be read", "UTF-8"]),
    "cut gzip": (csv(gzip.compress(b"1,2\n" * 99)[:20], "a.csv.gz"), {}, ["cannot be read"]),
    "split": (csv("1,2\n3,4\n"), {"split": "test"}, ["--config.data.split=test", "split=all"]),
    "text column": (
        csv("a,b\n1,x\n2,y\n"), {},
        [f"column b holds 'x', not numbers; leave it out with {_DROP}b; if it holds the classes",
         "classes, --config.data.label=b scores against them END"],
    ),
    "text columns": (
        csv("i,a,b,c\nu,1,x,y\n"),
        {"drop": ("a",)},
        ["column b holds 'x', not numbers (and 1 more column like it); leave them out",
         f"{_DROP}a,b,c; if one of them holds the classes, --config.data.label=NAME scores"],
    ),
    "text beside a label": (
        csv("a,b,c,d,label\n1,x,y,z,0\n"), {},
        ["(and 2 more columns like it); leave them out", f"with {_DROP}b,c,d END"],
    ),
    "identifier repeats": (
        csv("a,b\nx,1\ny,2\nx,3\n"), {}, ["'x' in lines 2 and 4", f"{_DROP}a"],
    ),
    "missing": (csv("a,b\n1,2\n3,\n"), {}, ["line 3, column b", "missing", "fill", f"{_DROP}b"]),
    "missing in row 1": (csv("1,\n3,4\n"), {}, ["line 1, column 2", "missing"]),
    "NA": (csv("a,b\n1,2\n\n3,NA\n"), {}, ["line 4, column b", "missing (NA)"]),
    "nan": (csv("a,b\nnan,2\n3,4\n"), {}, ["line 2, column a", "missing (nan)"]),
    "infinite": (csv("a,b\n1,2\n-inf,4\n"), {}, ["line 3, column a", "infinite", "remove"]),
    "beyond float32": (csv("a,b\n1,2\n1e300,4\n"), {}, ["line 3, column a", "float32"]),
    "text later": (csv("a,b\n1,2\n3,red\n"), {}, ["line 3, column b", "'red', not a number"]),
    "decimal comma": (
        csv("a;b\n1,5;2,5\n"), {},
        ["column a holds '1,5'", "decimal points and no commas, or leave", f"{_DROP}a,b END"],
    ),
    "decimal comma in front": (csv("a;b\n1,70;30\n1,82;41\n"), {}, ["column a holds '1,70'"]),
    "thousands": (csv('a;b\n"1,200.5";30\n'), {}, ["column a holds '1,200.5'", "no commas"]),
    "underscore later": (csv("a,b\n1,2\n3,4_5\n"), {}, ["line 3, column b", "'4_5', not a number"]),
    "short line": (csv("a,b\n1,2\n3\n"), {}, ["line 3 has 1 fields", "has 2", "repair"]),
    "long line": (csv("1,2\n1,2\n3,4,5\n"), {}, ["line 3 has 3 fields"]),
    "names or not": (csv("1.5,x\n2.5,y\n"), {"label": "2"}, ["line 1", "a line of names"]),
    "no such label": (
        csv("a,kind\n1,2\n3,4\n"), {"label": "kinds"},
        ["--config.data.label=kinds", "did you mean kind?", "known: a, kind"],
    ),
    "no such drop": (csv("a,b\n1,2\n"), {"drop": ("c",)}, [f"{_DROP}c: no such column", "a, b"]),
    "label twice": (csv("a,a\n1,2\n"), {"label": "a"}, ["--config.data.label=a", "rename"]),
    "label missing": (
        csv("a,label\n1,x\n2,\n"), {}, ["line 3 has no label in column label", f"{_DROP}label"],
    ),
    "nothing left": (csv("a,b\n1,2\n"), {"drop": ("a", "b")}, ["no column of numbers", _DROP[:-1]]),
    "label key": (csv("a,b\n1,2\n"), {"label_key": "b"}, ["label_key", "--config.data.label"]),
    "size of a table": (csv("1,2\n3,4\n"), {"size": 8}, ["--config.data.size", "folder, parquet"]),
    "label of npy": (csv("x", "a.npy"), {"label": "y"}, ["--config.data.label", "csv, parquet"]),
    "drop of digits": (
        lambda t: None, {"name": "digits", "path": None, "drop": ("y",)},
        ["--config.data.drop", "csv, parquet"],
    ),
    "parquet: no file": (lambda t: t / "no.parquet", {}, ["--config.data.path", "does not exist"]),
    "parquet: not one": (csv("a,b\n", "a.parquet"), {}, ["a.parquet: cannot be read", "again"]),
    "parquet: no rows": (table({"a": pa.array([], pa.int8())}), {}, ["0 examples"]),
    "parquet: no parts": (
        lambda t: t, {"name": "parquet"}, ["--config.data.path", "no *.parquet"],
    ),
    "parquet: parts differ": (
        two({"a": [1]}, {"b": [1]}), {}, ["b.parquet: its columns", "a.parquet"],
    ),
    "parquet: split of a file": (table({"a": [1]}), {"split": "test"}, ["split=test", "split=all"]),
    "parquet: no such split": (
        two({"a": [1]}, {"a": [1]}), {"split": "test"}, ["split=test", "begins with test"],
    ),
    "parquet: text": (table({"a": [1], "b": ["x"]}), {}, ["column b holds text", f"{_DROP}b"]),
    "parquet: lists": (table({"a": [1], "b": [[1, 2]]}), {}, ["column b", "list", f"{_DROP}b"]),
    "parquet: identifier repeats": (
        table({"a": ["x", "x"], "b": [1, 2]}), {}, ["column a holds text", f"{_DROP}a"],
    ),
    "parquet: missing": (table({"a": [1, 2, None]}), {}, ["row 3, column a: is missing", _DROP]),
    "parquet: nan": (table({"a": [1.0, np.nan]}), {}, ["row 2, column a: is missing (nan)"]),
    "parquet: infinite": (table({"a": [1e300, 1.0]}), {}, ["row 1, column a", "float32"]),
    "parquet: no such label": (
        table({"a": [1]}), {"label": "b"}, ["--config.data.label=b: no such column"],
    ),
    "parquet: label missing": (
        table({"a": [1, 2], "label": ["x", None]}), {}, ["row 2 has no label", f"{_DROP}label"],
    ),
    "parquet: no images": (
        table({"a": [1]}), {"size": 8}, ["--config.data.size", "holds no images"],
    ),
    "parquet: image key": (
        table({"a": [1]}), {"image_key": "b"}, ["--config.data.image_key=b: no such column"],
    ),
    "parquet: key of no images": (
        table({"a": [1]}), {"image_key": "a"}, ["--config.data.image_key=a", "not encoded images"],
    ),
    "parquet: which images": (
        table({"x": [_PNG], "y": [_PNG]}), {}, ["--config.data.image_key, one of x, y"],
    ),
    "parquet: broken image": (
        images([_PNG, _PNG[:70]]), {}, ["a.parquet, row 2: cannot be read", "broken=skip"],
    ),
    "parquet: missing truth value": (
        table({"a": [True, None, False], "b": [1.0, 2.0, 3.0]}), {}, ["row 2, column a", "missing"],
    ),
    "parquet: only paths": (images([_PNG, None]), {}, ["row 2", "only a path is stored"]),
    "parquet: all broken": (
        images([b"x", b"y"]), {"broken": "skip"}, ["none of its 2", "check the path"],
    ),
    "parquet: label of images": (
        images([_PNG]), {"label": "kind"}, ["--config.data.label=kind: no such column"],
    ),
}  # fmt: skip


def test_numbers_with_an_underscore_are_names(tmp_path):
    found = load(csv("id,a,b\n1_0,1,2\n1_1,3,4\n1_2,5,7\n")(tmp_path))
    np.testing.assert_array_equal(found.examples, [[1, 2], [3, 4], [5, 7]])


@pytest.mark.parametrize(("make", "options", "expected"), BAD.values(), ids=BAD.keys())
def test_bad_input(tmp_path, make, options, expected):
    path = make(tmp_path)
    with pytest.raises(InputError) as error:
        load(path, **options) if path else data.load(data.DataConfig(**options))
    message = f"{error.value} END"
    assert "\n" not in message
    assert all(words in message for words in expected), message


def test_parquet_without_pyarrow(tmp_path, monkeypatch):
    path = write(tmp_path / "a.parquet", {"a": [1, 2]})
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(InputError, match=r"pip install 'dec_diffusion\[parquet\]'"):
        load(path)
