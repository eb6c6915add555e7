"""Writes arrays and metadata as one safetensors file, and reads them (https://github.com/huggingface/safetensors)."""

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
import safetensors

from dist_partial.files import write_atomically

# The format's own names of dtypes.
_DTYPES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint64": "U64",
    "uint32": "U32",
    "uint16": "U16",
    "uint8": "U8",
    "bool": "BOOL",
}


def write(path: Path, arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> None:
    """Writes a file atomically; equal contents give equal bytes.

    Args:
        path: of the file.
        arrays: by name, of any shape.
        metadata: texts by name.

    Raises:
        OSError: it cannot be written.

    Examples:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write(Path(folder, "a"), {"v": np.ones(2), "w": np.zeros(1)}, {"step": "5"})
        ...     write(Path(folder, "b"), {"w": np.zeros(1), "v": np.ones(2)}, {"step": "5"})
        ...     Path(folder, "a").read_bytes() == Path(folder, "b").read_bytes()
        True
    """
    # Not by `safetensors.numpy.save_file`, of safetensors 0.8: it hides the system's error, leaves a file of a random
    # name behind when it is killed, and gives the file to its owner alone. `save` copies all arrays.
    write_atomically(path, lambda file: file.writelines(pieces(arrays, metadata)))


def pieces(arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> Iterator[bytes | memoryview]:
    """Gives the content of such a file, piece by piece.

    Examples:
        >>> parse(b"".join(pieces({"w": np.array([1.5, 2.5])}, {"step": "5"})))
        ({'w': array([1.5, 2.5])}, {'step': '5'})
    """
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    ordered = sorted(arrays, key=lambda name: (-arrays[name].dtype.itemsize, name))  # so that all are aligned
    end = 0
    for name in ordered:
        array, start = arrays[name], end
        end += array.nbytes
        header[name] = {"dtype": _DTYPES[array.dtype.name], "shape": array.shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for name in ordered:
        yield raw(arrays[name])


def parse(content: bytes) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Reads what `pieces` has given, by this process or one that it trusts: nothing is checked, and nothing copied."""
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    metadata, names, arrays = header.pop("__metadata__"), {kind: name for name, kind in _DTYPES.items()}, {}
    for name, each in header.items():
        dtype = np.dtype(names[each["dtype"]])
        arrays[name] = np.frombuffer(content, dtype, math.prod(each["shape"]), start + each["data_offsets"][0])
        arrays[name] = arrays[name].reshape(each["shape"])
    return arrays, metadata


def read(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Reads what `write` has written, the arrays and the metadata.

    Raises:
        Exception: it cannot be read, or is no such file; of the library's, NumPy's and the file system's kinds.

    Examples:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write(Path(folder, "mine"), {"w": np.array([1.5, 2.5])}, {"step": "5"})
        ...     read(Path(folder, "mine"))
        ({'w': array([1.5, 2.5])}, {'step': '5'})
    """
    # Checks the header against the file's length before anything is allocated, and runs nothing of the file's.
    with safetensors.safe_open(path, framework="np") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118


def checksum(arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str], digest: Callable[[np.ndarray], str]) -> str:
    """Returns the SHA-256 of the metadata and of the digests of all arrays, as hex digits.

    Args:
        arrays: by name.
        metadata: texts by name.
        digest: of an array's dtype, shape and values.

    Examples:
        >>> def digest(array):
        ...     return array.tobytes().hex()
        >>> arrays = {"v": np.ones(2), "w": np.zeros(2)}
        >>> swapped, reordered = {"w": np.ones(2), "v": np.zeros(2)}, dict(reversed(arrays.items()))
        >>> [checksum(each, {}, digest) == checksum(arrays, {}, digest) for each in (reordered, swapped)]
        [True, False]
    """
    digests = [(name, digest(array)) for name, array in sorted(arrays.items())]
    return hashlib.sha256(json.dumps([sorted(metadata.items()), digests]).encode()).hexdigest()


def raw(array: np.ndarray) -> memoryview:
    """Views the values of an array as bytes, in the order of C.

    Examples:
        >>> raw(np.array([[1], [256]], np.int16)).tolist()
        [1, 0, 0, 1]
    """
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
