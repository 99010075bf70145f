"""The data of a run, read by all of its processes."""

import json
import zlib

import jax
import numpy as np

from dec_diffusion import data, distributed
from dec_diffusion.data.shards import bounded, chunks
from dec_diffusion.types import InputError, Rows

_TOPIC = "input"
_SECONDS = 24 * 3600.0
_CHECKED_ROWS = 4096


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
                raise distributed.failed(number, found[1:])
        return [found[1:] for found in texts]

    team = data.Team(jax.process_index(), jax.process_count(), exchange)
    try:
        return data.load(config, shape=shape, team=team, verbose=verbose)
    except Exception as error:
        distributed.tell(_TOPIC, f"!{distributed.failure(error)}")
        raise


def check_same(dataset: data.Dataset) -> None:
    """Check that all processes hold the same examples, by some of them.

    Raises:
        InputError: in every process, naming the first that differs.
    """
    if jax.process_count() == 1:
        return
    own = [dataset.example_shape, dataset.num_examples, checksum(dataset.examples, sampled=True)]
    first, *others = distributed.exchange("data", json.dumps(own))
    for number, other in enumerate(others, 1):
        if other != first:
            (shape, count, _), (its_shape, its_count, _) = json.loads(first), json.loads(other)
            raise InputError(
                f"--config.data: process {number} read {its_count:,} examples of {its_shape} and "
                f"process 0 {count:,} of {shape}, or other values; give all hosts the same files"
            )


def checksum(examples: Rows, *, sampled: bool) -> int:
    """CRC-32 of all values, or of those of 4,096 rows where there are too many to read them all."""
    if sampled:
        examples = bounded(examples)[
            np.linspace(0, len(examples) - 1, _CHECKED_ROWS).astype(np.int64)
        ]
    crc = 0
    for _, part in chunks(examples):  # a part at a time, as they may be mapped from a file
        crc = zlib.crc32(np.ascontiguousarray(part).data, crc)
    return crc
