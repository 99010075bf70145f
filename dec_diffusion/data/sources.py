"""From a config to a data set."""

from pathlib import Path

from dec_diffusion.data import binary, files, folder, parquet, prepared, synthetic, tables
from dec_diffusion.data.config import ARRAY_NAMES, BINARY_NAMES, IDX_NAMES, DataConfig, check_config
from dec_diffusion.data.dataset import Dataset
from dec_diffusion.data.shares import ALONE, Team
from dec_diffusion.types import InputError


def load(
    config: DataConfig,
    *,
    shape: tuple[int, ...] | None = None,
    team: Team = ALONE,
    verbose: int = 0,
) -> Dataset:
    """Read, validate and scale the data that ``config`` names.

    Args:
      config: what to read.
      shape: of one example of the training data, if this is to go through a trained run; the
        images of a folder are then made that size.
      team: the processes that all call this with the same config: they share the decoding of
        images where the result is kept on disk.
      verbose: 0 is silent, 1 shows progress on standard output where images take long to read.

    Raises:
      InputError: options that do not fit together, or files that are missing, broken or hold
        something that cannot be clustered. One line, naming the option or file and the remedy.
    """
    dataset = _read(check_config(config), config, shape, team, verbose)
    kind, other = ("images", "vectors") if dataset.is_image else ("vectors", "images")
    if config.kind == other:
        size = "x".join(map(str, dataset.example_shape))
        given = f"path={config.path}" if config.path else f"name={config.name}"
        raise InputError(
            f"--config.data.{given}: holds {kind} ({size}), and these settings are for"
            f" {other}; choose the variant {kind}, or --config.data.kind=any"
        )
    return dataset


def _read(
    name: str, config: DataConfig, shape: tuple[int, ...] | None, team: Team, verbose: int
) -> Dataset:
    if name == "digits":
        return files.read_digits(config)
    if name == "blobs":
        return synthetic.read_blobs(config)
    if name in IDX_NAMES:
        return files.read_idx(config, name)
    if name in ARRAY_NAMES:
        return files.read_array(config)
    if name == "usps":
        return files.read_usps(config)
    if name == "stl10":
        return binary.read_stl10(config)
    if name in BINARY_NAMES:
        return binary.read_cifar(config, name)
    if name == "folder":
        return folder.read_folder(config, shape, team=team, verbose=verbose)
    if name == "csv":
        return tables.read_csv(config)
    if name == "parquet":
        return parquet.read_parquet(config, shape, team=team, verbose=verbose)
    return prepared.read_tfds(config, team=team, verbose=verbose)


def column_names(config: DataConfig) -> list[str]:
    """The columns of a table; none of what is no table, or cannot be read (``load`` says why)."""
    try:
        name = check_config(config)
    except InputError:
        return []
    read = {"csv": tables.column_names, "parquet": parquet.column_names}.get(name)
    return read(Path(str(config.path)).expanduser()) if read else []
