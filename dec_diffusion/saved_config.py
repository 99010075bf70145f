"""A config file for a run that exists: ``--config=saved_config.py:WORKDIR``."""

from dec_diffusion import config, workdir


def get_config(path: str) -> config.Config:
    """The configuration in the workdir ``path``."""
    return config.from_dict(workdir.read_config(path))
