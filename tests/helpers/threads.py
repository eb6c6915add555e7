"""Several workers in one process, each in a thread of its own."""

import threading
from collections.abc import Callable, Sequence
from typing import Any


def at_once(functions: Sequence[Callable[[], Any]]) -> list[Any]:
    """Calls each in a thread; returns what they return, or raises what the first one raised."""
    results: list[Any] = [None] * len(functions)
    errors: list[BaseException] = []

    def call(i: int) -> None:
        try:
            results[i] = functions[i]()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=call, args=(i,), daemon=True) for i in range(len(functions))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive(), "hangs"
    if errors:
        raise errors[0]
    return results
