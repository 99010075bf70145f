"""Reading ahead: what the next step needs is fetched while this one is computed."""

import queue
import threading
from collections.abc import Iterable, Iterator
from typing import TypeVar

_T = TypeVar("_T")


def ahead(items: Iterable[_T], *, depth: int = 1) -> Iterator[_T]:
    """The same items in the same order, made in a thread, up to ``depth`` before they are needed.

    What the thread raises is raised here, in its place. A consumer that stops early stops the
    thread after the item it is making.
    """
    waiting: queue.Queue[tuple[bool, object]] = queue.Queue(depth)
    stopped = threading.Event()

    def put(entry: tuple[bool, object]) -> None:
        while not stopped.is_set():
            try:
                return waiting.put(entry, timeout=0.1)
            except queue.Full:
                continue

    def fill() -> None:
        try:
            for item in items:
                put((True, item))
                if stopped.is_set():
                    return
            put((False, None))
        except BaseException as error:
            put((False, error))

    thread = threading.Thread(target=fill, name="dec_diffusion-ahead", daemon=True)
    thread.start()
    try:
        while True:
            more, item = waiting.get()
            if more:
                yield item  # pyright: ignore[reportReturnType]
            elif item is None:
                return
            else:
                raise item  # pyright: ignore[reportGeneralTypeIssues]
    finally:
        stopped.set()
        thread.join()
