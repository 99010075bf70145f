"""From a config to a data set."""

from dec_diffusion.data import files, prepared
from dec_diffusion.data.config import ARRAY_NAMES, IDX_NAMES, DataConfig, check_config
from dec_diffusion.data.dataset import Dataset


def load(config: DataConfig) -> Dataset:
    """Read, validate and scale the data that ``config`` names.

    Raises:
      InputError: options that do not fit together, or files that are missing, broken or hold
        something that cannot be clustered. One line, naming the option or file and the remedy.
    """
    name = check_config(config)
    if name == "digits":
        return files.read_digits(config)
    if name in IDX_NAMES:
        return files.read_idx(config, name)
    if name in ARRAY_NAMES:
        return files.read_array(config)
    if name == "usps":
        return files.read_usps(config)
    return prepared.read_tfds(config)
