"""What to load: the ``data`` section of every config, and its checks."""

import dataclasses
import difflib
from collections.abc import Iterable
from pathlib import Path
from typing import Literal, get_args, get_origin, get_type_hints

from dec_diffusion.types import InputError

ARRAY_NAMES = ("array", "npy", "npz")
TABLE_NAMES = ("csv", "parquet")
IDX_NAMES = ("idx", "mnist", "fashion-mnist")
BINARY_NAMES = ("cifar10", "cifar100", "stl10")
FILELESS = ("digits", "blobs")
NAMES = (*FILELESS, *IDX_NAMES, *ARRAY_NAMES, "usps", *BINARY_NAMES, "folder", *TABLE_NAMES, "tfds")
SPLITS = ("train", "test", "all")
CIFAR100_LABELS = ("coarse", "fine")
LARGE = 256 * 2**20
"""Bytes from which on examples are mapped from a file rather than held in memory."""
_CSV_ENDINGS = (".csv", ".tsv", ".csv.gz", ".tsv.gz")


@dataclasses.dataclass
class DataConfig:
    """Which examples to cluster.

    Attributes:
      name: The source.
        ``digits``: scikit-learn's 1,797 8x8 digits; no file, no network, ``path`` stays unset.
        ``blobs``: 1,000 points of the plane in round groups, drawn anew; likewise without a file.
        ``mnist``, ``fashion-mnist``, ``idx``: the folder with the four IDX files
        (``train-images-idx3-ubyte`` and so on, gzipped or not), or one IDX file of images.
        ``npy``, ``npz``, ``array``: a NumPy file of images [n, h, w] or [n, h, w, c] or of
        vectors [n, d]; the three names mean the same, what the file holds decides. ``array`` is
        also ``csv`` where ``path`` ends in .csv, .tsv, .csv.gz or .tsv.gz, ``parquet`` where it
        ends in .parquet or is a folder of such files, and ``folder`` where it is another folder.
        ``npy`` (and ``array``, where it holds nothing else) also takes a folder of ``.npy`` files,
        as ``images-00000-of-00016.npy``: one data set in the order of their names, mapped and never
        joined in memory. Files called ``labels*.npy`` are its labels.
        ``usps``: ``usps.h5`` with groups ``train`` and ``test``, each ``data`` [n, 256] in
        [0, 1] and ``target`` [n]; needs h5py.
        ``cifar10``, ``cifar100``, ``stl10``: the binary version, as the archive that was
        downloaded (``cifar-10-binary.tar.gz``, ``cifar-100-binary.tar.gz``,
        ``stl10_binary.tar.gz``) or the folder extracted from it.
        ``folder``: a folder of images in any format that Pillow reads, in folders of any depth,
        of any sizes and modes, made one size; needs no labels.
        ``csv``: a table of numbers as text in UTF-8, gzipped or not, one example per line; tab,
        semicolon or comma between the fields. Line 1 names the columns if any of its fields is no
        number, or if they count four and more columns from 0 or 1; else these are called 1, 2, ...
        The first column may be text that differs from row to row, and is left out then; other
        columns of text must be dropped. A table for a trained run may have its columns in another
        order, and more of them.
        ``parquet``: a file, or a folder whose ``*.parquet`` files (in it or in its folder
        ``data``) are parts of one data set; needs pyarrow. Columns of numbers are read as for
        ``csv``. A column of encoded images (a struct of bytes and path, as Hugging Face data sets
        have, or plain bytes) is read as for ``folder``, and columns beside it are ignored.
        ``tfds``: a data set already prepared by TFDS in array_record or tfrecord format.
      path: The file or folder, ``~`` allowed. For ``tfds`` either the folder that holds
        ``dataset_info.json``, or the data directory above it (unset: ``$TFDS_DATA_DIR``, else
        ``~/tensorflow_datasets``).
      kind: ``images`` or ``vectors`` refuses data of the other kind, as the variants of these names
        do, whose other settings would not suit them. ``any`` takes both.
      split: ``train``, ``test`` or ``all`` (every split, one after the other, train first).
        For ``digits`` train is the first 80% (1,437) and test the rest. A NumPy file has a split
        only if its keys say so, as ``x_train`` or ``train_images`` do. ``folder`` and
        ``csv`` have none. Of ``parquet`` they are the files whose names begin with ``train`` or
        ``test``.
        ``stl10`` also has ``unlabeled``, 100,000 images that ``all`` leaves out. ``tfds`` also
        takes the split syntax of TFDS, such as ``train[:10%]+test``.
      limit: Use only this many examples, at least 2: a fixed pseudo-random subset in input
        order. A smaller limit is a subset of a larger one; a limit above the size has no effect.
      blobs: For ``blobs``: ``gmm4`` (four equal groups on a square), ``gmm10`` (ten on a ring) or
        ``imb3`` (three of 70%, 20% and 10%). Unset: ``gmm4``.
      tfds_name: For ``tfds``: the data set, as ``mnist``, ``name/config`` or ``name:1.0.0``.
        Not needed where ``path`` leads to one data set only.
      image_key: The array in the ``.npz`` or feature in the TFDS data set that holds the
        examples. Unset: the usual names are tried. An ``.npz`` array named here is taken
        whole, so ``split`` must be ``all``.
      label_key: The same for the labels, which are optional and used for scoring only. For
        ``cifar100``: ``coarse`` (20 classes) or ``fine`` (100). Unset: ``coarse``.
      label: For ``csv`` and ``parquet``: the column of the labels, whole numbers or text, which is
        taken off and used for scoring only. Unset: a column called ``label`` or ``labels``, if
        there is one.
      drop: For ``csv`` and ``parquet`` without images: columns to leave out, as ``a,b``.
      size: For ``folder``, and for images in ``parquet``: height and width that all images get, in
        pixels. Unset: the size that most of them have, or, where none has a majority, a square of
        the median of their shorter sides; in both cases scaled down to 64 pixels if larger. Images
        keep their aspect: what sticks out is cut off on both sides.
      colour: Likewise: ``auto`` (three channels if any image has a colour, else one),
        ``grey`` (always one) or ``rgb`` (always three).
      broken: Likewise: what happens on a file that is no image or cannot be decoded:
        ``refuse`` (stop and name it) or ``skip`` (leave it out with a warning). Files whose
        endings say that they are no images are left out with a warning in any case.
      labels: For ``folder``: ``folders`` makes the name of the folder that an image lies in its
        label, for scoring only. ``none``: no labels.
      cache: For ``folder``, ``tfds``, and for images in ``parquet``: where decoded examples are
        kept, so that the next run with the same files and options need not decode them, so that
        memory need not hold them, and so that several processes can share the work. A folder, which
        all processes see; ``auto`` (``dec_diffusion/images`` in ``$XDG_CACHE_HOME``, else in
        ``~/.cache``, and only where they take 256 MiB or more); or ``none``. Other sources have no
        use for it.
    """

    name: str = "digits"
    path: str | None = None
    kind: Literal["any", "images", "vectors"] = "any"
    split: str = "all"
    limit: int | None = None
    blobs: str | None = None
    tfds_name: str | None = None
    image_key: str | None = None
    label_key: str | None = None
    label: str | None = None
    drop: tuple[str, ...] = ()
    size: int | None = None
    colour: Literal["auto", "grey", "rgb"] = "auto"
    broken: Literal["refuse", "skip"] = "refuse"
    labels: Literal["none", "folders"] = "none"
    cache: str = "auto"


CHOICES = {
    name: hint for name, hint in get_type_hints(DataConfig).items() if get_origin(hint) is Literal
}
"""The fields that take one of a few words."""


def check_config(config: DataConfig) -> str:
    """Check the fields against each other and return the canonical source name.

    Raises:
      InputError: an unknown name or split, a limit or size that is too small, or an option the
        source ignores.
    """
    name = config.name.lower().replace("_", "-")
    if name not in NAMES:
        raise InputError(
            f"--config.data.name={config.name}: unknown source; {suggest(name, NAMES)}"
        )
    if name == "array" and config.path:
        name = _kind_of(Path(config.path).expanduser())
    splits = (*SPLITS, "unlabeled") if name == "stl10" else SPLITS
    if name != "tfds" and config.split not in splits:
        raise InputError(
            f"--config.data.split={config.split}: unknown split; {suggest(config.split, splits)}"
        )
    if config.limit is not None and config.limit < 2:
        raise InputError(
            f"--config.data.limit={config.limit}: must be at least 2; leave it unset to use all"
        )
    if name in FILELESS and config.path is not None:
        raise InputError(
            f"--config.data.path={config.path}: {name} come without a file; also give"
            f" --config.data.name, one of {', '.join(n for n in NAMES if n not in FILELESS)}"
        )
    if name not in (*FILELESS, "tfds") and not config.path:
        raise InputError(f"--config.data.name={config.name}: also needs --config.data.path=...")
    users = {
        "blobs": ("blobs",),
        "tfds_name": ("tfds",),
        "image_key": (*ARRAY_NAMES, "parquet", "tfds"),
        "label_key": (*ARRAY_NAMES, "cifar100", "tfds"),
        "label": TABLE_NAMES,
        "drop": TABLE_NAMES,
        "labels": ("folder",),
    } | dict.fromkeys(("size", "colour", "broken"), ("folder", "parquet"))
    unset = DataConfig()
    for option, names in users.items():
        if getattr(config, option) != getattr(unset, option) and name not in names:
            if option == "label_key" and name in TABLE_NAMES:
                raise InputError(
                    f"--config.data.label_key: {config.path} is a table; name the column of its"
                    " labels with --config.data.label"
                )
            raise InputError(
                f"--config.data.{option}: has no meaning with --config.data.name={config.name}"
                f" (only with {', '.join(names)}); leave it unset"
            )
    for option, hint in CHOICES.items():
        if getattr(config, option) not in get_args(hint):
            given = getattr(config, option)
            raise InputError(
                f"--config.data.{option}={given}: unknown; {suggest(given, get_args(hint))}"
            )
    if config.size is not None and config.size < 4:
        raise InputError(
            f"--config.data.size={config.size}: must be at least 4 pixels; leave it unset to take"
            " the size of the images"
        )
    if name == "cifar100" and config.label_key not in (None, *CIFAR100_LABELS):
        raise InputError(
            f"--config.data.label_key={config.label_key}: CIFAR-100 has no such labels;"
            f" {suggest(config.label_key, CIFAR100_LABELS)}"
        )
    return name


def files_of_parquet(folder: Path) -> list[Path]:
    """The parquet files in a folder or, as the Hugging Face hub lays them out, in its ``data``."""
    for place in (folder, folder / "data"):
        found = sorted(p for p in place.glob("*.parquet") if not p.name.startswith((".", "_")))
        if found:
            return found
    return []


def _kind_of(path: Path) -> str:
    """What ``array`` means for this path."""
    if path.is_dir():
        if files_of_parquet(path):
            return "parquet"
        # Only where there is nothing else: it may be a folder of images with a stray array.
        names = [p.name for p in path.iterdir() if not p.name.startswith(".")]
        return "npy" if names and all(n.endswith(".npy") for n in names) else "folder"
    if path.name.lower().endswith(_CSV_ENDINGS):
        return "csv"
    return "parquet" if path.suffix.lower() == ".parquet" else "array"


def suggest(given: str, known: Iterable[str]) -> str:
    """'did you mean ...?' with the nearest of ``known``, and all of them."""
    known = list(known)
    near = difflib.get_close_matches(given, known, n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    return f"{hint}known: {', '.join(known) or 'none'}"
