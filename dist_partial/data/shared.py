"""Objects for other processes, whose arrays all of them share in memory."""

import io
import mmap
import os
import pickle
from typing import Any

import numpy as np

_LEAST = 2**16  # bytes of an array that is shared; smaller ones are copied


class SharedArrays:
    """Pickles objects, and puts the data of their arrays into one file in memory, each once.

    The file has no name: it is gone with the last process that has it open, however that ends. Arrays of a file on the
    disk (`np.load(path, mmap_mode="r")`) are sent as their place in it.

    Attributes:
        file: its descriptor.

    Examples:
        >>> shared, array = SharedArrays(), np.arange(100_000)
        >>> content = shared.pickled({"a": array, "b": array})
        >>> len(content[0]) < 1000, content[1]
        (True, [(0, 800000)])
        >>> (restored(shared.file, *content)["b"] == array).all().item()
        True
    """

    def __init__(self) -> None:
        self.file = os.memfd_create("dist_partial arrays")
        self._places: dict[tuple[int, int], int] = {}  # by address and size
        self._kept: list[Any] = []  # so that no other array gets the address of one
        self._end = 0

    def pickled(self, value: Any) -> tuple[bytes, list[tuple[int, int]]]:
        """The object as `restored` takes it: bytes, and where in the file its arrays are."""
        places: list[tuple[int, int]] = []

        def in_place(buffer: pickle.PickleBuffer) -> bool:
            raw = buffer.raw()
            if raw.nbytes < _LEAST:
                return True
            places.append((self._place(raw), raw.nbytes))
            return False

        content = io.BytesIO()
        _Pickler(content, 5, buffer_callback=in_place).dump(value)
        return content.getvalue(), places

    def close(self) -> None:
        """Closes the file, which is gone when the processes have done so, too."""
        os.close(self.file)

    def _place(self, raw: memoryview) -> int:
        key = np.frombuffer(raw, np.uint8).ctypes.data, raw.nbytes
        if key not in self._places:
            self._kept.append(raw)
            with os.fdopen(os.dup(self.file), "wb") as file:
                file.seek(self._end)
                file.write(raw)
            self._places[key] = self._end
            self._end += -(-raw.nbytes // mmap.ALLOCATIONGRANULARITY) * mmap.ALLOCATIONGRANULARITY
        return self._places[key]


def restored(file: int, content: bytes, places: list[tuple[int, int]]) -> Any:
    """Makes an object of what `SharedArrays.pickled` has given; what is written into its arrays stays here.

    Examples:
        >>> shared = SharedArrays()
        >>> restored(shared.file, *shared.pickled({"a": 3}))
        {'a': 3}
    """
    buffers = [mmap.mmap(file, size, access=mmap.ACCESS_COPY, offset=offset) for offset, size in places]
    return pickle.loads(content, buffers=buffers)


class _Pickler(pickle.Pickler):
    """Sends arrays that are part of a file as their place in it."""

    def reducer_override(self, value: Any) -> Any:
        if type(value) not in (np.ndarray, np.memmap) or value.dtype == object or value.nbytes < _LEAST:
            return NotImplemented
        whole: Any = value
        while isinstance(whole.base, np.ndarray):
            whole = whole.base
        if isinstance(whole, np.memmap) and whole.filename and whole.mode != "c" and value.flags.c_contiguous:
            offset = whole.offset + value.ctypes.data - whole.ctypes.data
            return _of_file, (str(whole.filename), value.dtype, offset, value.shape)
        plain = np.asarray(value) if value.flags.forc else np.ascontiguousarray(value)
        return plain.__reduce_ex__(5)  # of others NumPy would have pickle copy the data for each process


def _of_file(path: str, dtype: np.dtype, offset: int, shape: tuple[int, ...]) -> np.ndarray:
    return np.memmap(path, dtype, "c", offset, shape)
