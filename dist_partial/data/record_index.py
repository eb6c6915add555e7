"""Where the records of TFRecord files are: found once, and kept in a file that is read by mmap.

A record is its length (uint64), the masked CRC32C of these 8 bytes, the data, and the masked CRC32C of the data; see
"TFRecords format details" in TensorFlow's guide. There is no table of contents, so that finding the records means
walking from header to header.
"""

import os
import struct
from array import array
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from dist_partial.data.file_lists import digest, index_folders
from dist_partial.errors import UserError
from dist_partial.files import lock, remove, remove_leftovers, write_atomically

HEADER, FOOTER = 12, 4  # bytes
_BLOCK = 2**16  # bytes that are read at once while records are shorter
_SCANNERS = 8  # files that are walked at once: what takes time is waiting for the disk


@dataclass(frozen=True, eq=False)
class RecordIndex:
    """Tells where each record of several files is.

    Attributes:
        paths: of the files.
        states: int64 [files, 2], the size in bytes and the time of the last change in ns.
        firsts: int64 [files + 1], the number of the first record of each file; the last is that of all records.
        table: int64, usually on disk: the number of records of each file, then for each file where its records begin,
            and its size.

    Examples:
        >>> import tempfile
        >>> import tensorflow as tf
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder, "mine.tfrecord")
        ...     with tf.io.TFRecordWriter(str(path)) as writer:
        ...         for data in (b"a", b"bcd"):
        ...             writer.write(data)
        ...     index = open_index([path])
        ...     [part.tolist() for part in index.locate(np.array([1, 0]))]  # files, offsets, lengths
        [[0, 0], [17, 0], [3, 1]]
    """

    paths: Sequence[Path]
    states: np.ndarray
    firsts: np.ndarray
    table: np.ndarray

    def locate(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The file, the offset of the header and the length of the data of records, int64 [b] each."""
        files = np.searchsorted(self.firsts, indices, side="right") - 1
        entries = len(self.paths) + files + indices
        offsets = self.table[entries]
        return files, offsets, self.table[entries + 1] - offsets - HEADER - FOOTER

    def place(self, index: int) -> str:
        """Where a record is, as messages say it; records count from 0."""
        (file,), (offset,), _ = self.locate(np.array([index]))
        return record_place(self.paths[file], index - int(self.firsts[file]), int(offset))


def record_place(path: Path, record: int, offset: int) -> str:
    """Writes where a record is.

    Examples:
        >>> record_place(Path("train-00003.tfrecord"), 17, 123456)
        'train-00003.tfrecord, record 17 (byte 123456)'
    """
    return f"{path}, record {record} (byte {offset})"


def open_index(paths: Sequence[Path], cache_dir: str | os.PathLike[str] | None = None) -> RecordIndex:
    """Opens the index of files, which is made if it is missing or older than they are.

    It is kept in `cache_dir`; without that, in the folder `.dist_partial` beside the first file or, where that cannot
    be written, in `dist_partial/tfrecords` in `$XDG_CACHE_HOME` or `~/.cache`.

    Raises:
        UserError: a file cannot be read, or is not one of whole TFRecords; the index can be kept nowhere.

    Examples:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     Path(folder, "empty.tfrecord").touch()
        ...     _ = open_index([Path(folder, "empty.tfrecord")])
        ...     sorted(path.suffix for path in Path(folder, ".dist_partial").iterdir())
        ['', '.npy']
    """
    states = np.array([_state(path) for path in paths], np.int64)
    beside = Path(os.path.abspath(paths[0])).parent
    folders = index_folders(beside, "tfrecords", cache_dir)
    names = [os.path.relpath(path, beside) for path in paths]
    name = f"{digest(*names)}-{digest(states.tobytes().hex())}.npy"
    for folder in folders:
        if (table := _read(folder / name, states)) is not None:
            return _index(paths, states, table)
    failures = []
    for folder in folders:
        try:
            return _index(paths, states, _made(folder, name, paths, states))
        except OSError as error:
            failures.append(f"{folder} ({error.strerror or error})")
    raise UserError(
        f"cannot keep the index of {paths[0]} in {' or '.join(failures)}: give cache_dir a folder that can be written"
    )


def _made(folder: Path, name: str, paths: Sequence[Path], states: np.ndarray) -> np.ndarray:
    """Makes the table, and keeps it in a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    with lock(folder / ".lock"):
        if (table := _read(folder / name, states)) is not None:  # another process has made it meanwhile
            return table
        remove_leftovers(folder)
        found = _scan_all(paths, states, folder)
        for outdated in folder.glob(f"{name.partition('-')[0]}-*.npy"):
            remove(outdated)
        write_atomically(folder / name, lambda file: np.save(file, found))
        table = _read(folder / name, states)
    return found if table is None else table


def _state(path: Path) -> tuple[int, int]:
    try:
        found = os.stat(path)
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror})") from None
    return found.st_size, found.st_mtime_ns


def _index(paths: Sequence[Path], states: np.ndarray, table: np.ndarray) -> RecordIndex:
    return RecordIndex(paths, states, np.concatenate([[0], np.cumsum(table[: len(paths)])]), table)


def _read(path: Path, states: np.ndarray) -> np.ndarray | None:
    """A table that is kept; None where it is missing or not whole."""
    files = len(states)
    with suppress(OSError, ValueError, EOFError):
        table = np.asarray(np.load(path, mmap_mode="r"))
        counts = np.array(table[:files])
        ends = files + np.cumsum(counts + 1) - 1
        if table.dtype == np.int64 and len(table) == ends[-1] + 1 and np.array_equal(table[ends], states[:, 0]):
            return table
    return None


def _scan_all(paths: Sequence[Path], states: np.ndarray, folder: Path) -> np.ndarray:
    """The table of all files; after a few seconds a bar says what takes so long."""
    with ThreadPoolExecutor(_SCANNERS) as pool:
        found: Iterator[np.ndarray] = pool.map(scan, paths, states[:, 0].tolist())
        bar = tqdm(found, f"index of records in {folder}", len(paths), unit="file", delay=3, leave=False, disable=None)
        try:
            offsets = list(bar)
        except UserError:
            pool.shutdown(cancel_futures=True)
            raise
    return np.concatenate([np.array([len(each) - 1 for each in offsets], np.int64), *offsets])


def scan(path: Path, size: int) -> np.ndarray:
    """Finds where the records of a file begin.

    Args:
        path: of the file.
        size: of it in bytes.

    Returns:
        int64 [records + 1], bytes; the last is `size`.

    Raises:
        UserError: it is not a file of TFRecords, is compressed, or has a damaged or cut record.

    Examples:
        >>> import tempfile
        >>> import tensorflow as tf
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with tf.io.TFRecordWriter(f"{folder}/mine.tfrecord") as writer:
        ...         writer.write(b"abc")
        ...     scan(Path(folder, "mine.tfrecord"), 19).tolist()
        [0, 19]
    """
    lengths, sums = array("Q"), array("I")
    unpack = struct.Struct("<QI").unpack_from
    begin = length = 0
    try:
        with open(path, "rb", buffering=0) as file:
            while begin + HEADER <= size:
                block = os.pread(file.fileno(), _BLOCK if length < _BLOCK else HEADER, begin)
                last, at = len(block) - HEADER, 0
                if last < 0:
                    break  # the file has shrunk
                while at <= last:
                    length, check = unpack(block, at)
                    lengths.append(length)
                    sums.append(check)
                    at += length + HEADER + FOOTER
                begin += at
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror})") from None
    found = np.frombuffer(lengths, np.uint64)
    wrong = np.flatnonzero(_masked_crc32c(found) != np.frombuffer(sums, np.uint32))
    whole = int(wrong[0]) if len(wrong) else len(found) - (begin > size)
    offsets = np.concatenate([[0], np.cumsum(found[:whole].astype(np.int64) + HEADER + FOOTER)])
    if len(wrong) and not whole:
        raise UserError(_no_records(path))
    if len(wrong):
        raise UserError(
            f"{record_place(path, whole, offsets[-1])} is damaged: its length fails its checksum (CRC32C); copy the "
            "file again, or write it again"
        )
    if offsets[-1] != size:
        raise UserError(
            f"{record_place(path, whole, offsets[-1])} is cut off: the file ends within it, at byte {size}; copy the "
            "file again, or write it again"
        )
    return offsets


def _no_records(path: Path) -> str:
    """Says what is wrong with a file whose first bytes are not the header of a record."""
    with open(path, "rb") as file:
        start = file.read(HEADER)
    kind = ""
    if start.startswith(b"\x1f\x8b"):
        kind = "GZIP"
    elif start[0] & 0x0F == 8 and int.from_bytes(start[:2]) % 31 == 0:  # RFC 1950
        kind = "ZLIB"
    if kind:
        return (
            f"{path} is compressed by {kind}, and records in it cannot be read one by one: write it again without "
            "compression (of images, JPEG and PNG are compressed already)"
        )
    return f"{path} is not a TFRecord file: its first 12 bytes are no length with a checksum (CRC32C)"


def _crc_table() -> np.ndarray:
    table = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        table = np.where(table & 1, table >> 1 ^ 0x82F63B78, table >> 1).astype(np.uint32)
    return table


_TABLE = _crc_table()


def _masked_crc32c(lengths: np.ndarray) -> np.ndarray:
    """The masked CRC32C of the 8 bytes of each length: uint64 [n] to uint32 [n]."""
    crc = np.full(len(lengths), 0xFFFFFFFF, np.uint32)
    for octet in lengths.astype("<u8").view(np.uint8).reshape(-1, 8).T:
        crc = _TABLE[(crc ^ octet) & 0xFF] ^ crc >> 8
    found: np.ndarray = masked(~crc)
    return found


def masked(crc: Any) -> Any:
    """Masks a checksum, or uint32 [n] of them, as TFRecord files hold it.

    Examples:
        >>> hex(masked(0)), masked(np.zeros(1, np.uint32)).dtype
        ('0xa282ead8', dtype('uint32'))
    """
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF
