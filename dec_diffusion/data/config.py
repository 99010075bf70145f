"""What to load: the ``data`` section of every config, and its checks."""

import dataclasses
import difflib
from collections.abc import Iterable

from dec_diffusion.types import InputError

ARRAY_NAMES = ("array", "npy", "npz")
IDX_NAMES = ("idx", "mnist", "fashion-mnist")
NAMES = ("digits", *IDX_NAMES, *ARRAY_NAMES, "usps", "tfds")
SPLITS = ("train", "test", "all")


@dataclasses.dataclass
class DataConfig:
    """Which examples to cluster.

    Attributes:
      name: The source.
        ``digits``: scikit-learn's 1,797 8x8 digits; no file, no network, ``path`` stays unset.
        ``mnist``, ``fashion-mnist``, ``idx``: the folder with the four IDX files
        (``train-images-idx3-ubyte`` and so on, gzipped or not), or one IDX file of images.
        ``npy``, ``npz``, ``array``: a NumPy file of images [n, h, w] or [n, h, w, c] or of
        vectors [n, d]; the three names mean the same, what the file holds decides.
        ``usps``: ``usps.h5`` with groups ``train`` and ``test``, each ``data`` [n, 256] in
        [0, 1] and ``target`` [n]; needs h5py.
        ``tfds``: a data set already prepared by TFDS in array_record or tfrecord format.
      path: The file or folder, ``~`` allowed. For ``tfds`` either the folder that holds
        ``dataset_info.json``, or the data directory above it (unset: ``$TFDS_DATA_DIR``, else
        ``~/tensorflow_datasets``).
      split: ``train``, ``test`` or ``all`` (every split, one after the other, train first).
        For ``digits`` train is the first 80% (1,437) and test the rest. A NumPy file has a split
        only if its keys say so, as ``x_train`` or ``train_images`` do. ``tfds`` also takes the
        split syntax of TFDS, such as ``train[:10%]+test``.
      limit: Use only this many examples, at least 2: a fixed pseudo-random subset in input
        order. A smaller limit is a subset of a larger one; a limit above the size has no effect.
      tfds_name: For ``tfds``: the data set, as ``mnist``, ``name/config`` or ``name:1.0.0``.
        Not needed where ``path`` leads to one data set only.
      image_key: The array in the ``.npz`` or feature in the TFDS data set that holds the
        examples. Unset: the usual names are tried. An ``.npz`` array named here is taken
        whole, so ``split`` must be ``all``.
      label_key: The same for the labels, which are optional and used for scoring only.
    """

    name: str = "digits"
    path: str | None = None
    split: str = "all"
    limit: int | None = None
    tfds_name: str | None = None
    image_key: str | None = None
    label_key: str | None = None


def check_config(config: DataConfig) -> str:
    """Check the fields against each other and return the canonical source name.

    Raises:
      InputError: an unknown name or split, a limit below 2, or an option the source ignores.
    """
    name = config.name.lower().replace("_", "-")
    if name not in NAMES:
        raise InputError(
            f"--config.data.name={config.name}: unknown source; {suggest(name, NAMES)}"
        )
    if name != "tfds" and config.split not in SPLITS:
        raise InputError(
            f"--config.data.split={config.split}: unknown split; {suggest(config.split, SPLITS)}"
        )
    if config.limit is not None and config.limit < 2:
        raise InputError(
            f"--config.data.limit={config.limit}: must be at least 2; leave it unset to use all"
        )
    if name == "digits" and config.path is not None:
        raise InputError(
            f"--config.data.path={config.path}: digits come without a file; also give"
            f" --config.data.name, one of {', '.join(n for n in NAMES if n != 'digits')}"
        )
    if name not in ("digits", "tfds") and not config.path:
        raise InputError(f"--config.data.name={config.name}: also needs --config.data.path=...")
    users = {"tfds_name": ("tfds",)} | dict.fromkeys(
        ("image_key", "label_key"), (*ARRAY_NAMES, "tfds")
    )
    for option, names in users.items():
        if getattr(config, option) is not None and name not in names:
            raise InputError(
                f"--config.data.{option}: has no meaning with --config.data.name={config.name}"
                f" (only with {', '.join(names)}); leave it unset"
            )
    return name


def suggest(given: str, known: Iterable[str]) -> str:
    """'did you mean ...?' with the nearest of ``known``, and all of them."""
    known = list(known)
    near = difflib.get_close_matches(given, known, n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    return f"{hint}known: {', '.join(known) or 'none'}"
