"""The data of a run, read by all of its processes."""

import contextlib

import jax

from dec_diffusion import data, distributed
from dec_diffusion.types import InputError

_TOPIC = "input"
_SECONDS = 24 * 3600.0


def read(
    config: data.DataConfig, *, shape: tuple[int, ...] | None = None, verbose: int
) -> data.Dataset:
    """The data, whose decoding the processes share.

    Arguments and errors are those of ``data.load``. What one process raises, all do, even those
    that wait for it.
    """

    def exchange(topic: str, text: str) -> list[str]:
        texts = distributed.exchange(_TOPIC, f" {text}", timeout=_SECONDS)
        for number, found in enumerate(texts):
            if found.startswith("!"):
                raise InputError(f"process {number} stopped: {found[1:]}")
        return [found[1:] for found in texts]

    team = data.Team(jax.process_index(), jax.process_count(), exchange)
    try:
        return data.load(config, shape=shape, team=team, verbose=verbose)
    except Exception as error:
        with contextlib.suppress(InputError):
            distributed.exchange(_TOPIC, f"!{error}", timeout=0.01)
        raise
