"""The embedded corpus: this machine's own Python standard library, 9.5 MB of text that needs no download."""

import math
import os
import shutil
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import tensorflow as tf

from dist_partial.data.codecs import SHAPE_OF_BYTE, ByteCodec, ShapeCodec
from dist_partial.data.quiet import quiet_tfds
from dist_partial.data.source import Dataset, fingerprint
from dist_partial.errors import UserError
from dist_partial.files import lock
from dist_partial.validation import Above, AtLeast, AtMost, Below, check_value

BLOCK = 4096
"""Symbols of text that go to training or to evaluation together, whatever the window, so that the losses of two
windows are of the same text. Files would split too coarsely: a single one is 8 % of the library."""
Window = Annotated[int, AtLeast(1), AtMost(BLOCK)]
Share = Annotated[float, Above(0), Below(1)]

SKIPPED = {
    *("test", "tests", "idlelib", "turtledemo", "lib2to3", "encodings", "ensurepip"),
    *("site-packages", "dist-packages", "__pycache__"),
}


@dataclass(frozen=True, eq=False)
class _Windows:
    """Windows of symbols as a source.

    Neighbours in index are far apart in the text, so that a short evaluation, the first few, sees all of it.

    Args:
        symbols: uint8 [blocks, windows of a block, window + 1].
        next_only: whether the target is only the symbol after the window, not one for each of its symbols.
    """

    symbols: np.ndarray
    next_only: bool

    @property
    def spec(self) -> tuple[tf.TensorSpec, ...]:
        window = self.symbols.shape[2] - 1
        return tf.TensorSpec([window], tf.int32), tf.TensorSpec([] if self.next_only else [window], tf.int32)

    def __len__(self) -> int:
        return self.symbols.shape[0] * self.symbols.shape[1]

    def fetch(self, indices: np.ndarray) -> tuple[np.ndarray, ...]:
        within, block = np.divmod(indices, len(self.symbols))
        rows = self.symbols[block, within].astype(np.int32)
        return rows[:, :-1], rows[:, -1] if self.next_only else rows[:, 1:]


def stdlib_corpus(
    window: Window = 128,
    cache_dir: str | os.PathLike[str] | None = None,
    evaluation_share: Share = 0.02,
    root: str | os.PathLike[str] | None = None,
) -> Dataset:
    """Makes byte-level language modelling of the Python code of the standard library.

    The text differs between versions of Python; its SHA-256 is part of the fingerprint.

    Args:
        window: bytes of an example.
        cache_dir: where the text is prepared, once; None: dist_partial in `$XDG_CACHE_HOME` or `~/.cache`.
        evaluation_share: the part of the text, in (0, 1), that is held out, in blocks spread evenly over it.
        root: a folder whose .py files are the text; None: the standard library without its tests and data.

    Returns:
        x int32 [window], bytes; y int32 [window], for each the byte that follows. Every byte is the target of
        at most one example.

    Raises:
        UserError: no such text, too little of it for the window, or a cache folder that cannot be used.

    Examples:
        >>> data = stdlib_corpus(window=32)
        >>> data.train.spec[0].shape, data.unit
        (TensorShape([32]), 'byte')
    """
    digest, text = _text("stdlib_corpus", cache_dir, root)
    train, evaluation = _split("stdlib_corpus", np.frombuffer(text, np.uint8), window, window, evaluation_share)
    return Dataset(
        name="stdlib_corpus",
        train=_Windows(train, next_only=False),
        evaluation=_Windows(evaluation, next_only=False),
        fingerprint=fingerprint("stdlib_corpus", digest, window, evaluation_share),
        codec=ByteCodec(),
        unit="byte",
    )


def stdlib_shapes(
    window: Window = 16,
    cache_dir: str | os.PathLike[str] | None = None,
    evaluation_share: Share = 0.02,
    root: str | os.PathLike[str] | None = None,
) -> Dataset:
    """Makes ten classes: which shape of symbol follows, in the silhouette of Python code.

    Args:
        window: symbols of an example.
        cache_dir: as for `stdlib_corpus`, with which it is shared.
        evaluation_share: as for `stdlib_corpus`.
        root: as for `stdlib_corpus`.

    Returns:
        x int32 [window], shapes 0..9 (see `codecs.SHAPES`); y int32 (), the shape that follows. Every
        byte but the first `window` of a block is a target.

    Raises:
        UserError: as for `stdlib_corpus`.

    Examples:
        >>> data = stdlib_shapes()
        >>> data.codec.size
        10
    """
    digest, text = _text("stdlib_shapes", cache_dir, root)
    shapes = SHAPE_OF_BYTE[np.frombuffer(text, np.uint8)]
    train, evaluation = _split("stdlib_shapes", shapes, window, 1, evaluation_share)
    return Dataset(
        name="stdlib_shapes",
        train=_Windows(train, next_only=True),
        evaluation=_Windows(evaluation, next_only=True),
        fingerprint=fingerprint("stdlib_shapes", digest, window, evaluation_share, SHAPE_OF_BYTE),
        codec=ShapeCodec(),
    )


def _split(
    name: str, symbols: np.ndarray, window: int, stride: int, share: float, unit: str = "bytes"
) -> tuple[np.ndarray, np.ndarray]:
    """Cuts symbols, integers [n], into windows [blocks, windows of a block, window + 1]: training, evaluation.

    No window crosses the border of its block; the last target in one block is the first input of the next. Messages
    have the name of the data set, and what a symbol is.
    """
    check_value(f"{name}.window", window, Window)
    check_value(f"{name}.evaluation_share", share, Share)
    count = max(len(symbols) - 1, 0) // BLOCK
    if count < 2:
        raise UserError(
            f"{name} has {len(symbols):,} {unit} of text and needs {2 * BLOCK + 1:,}, a block of {BLOCK:,} to train on "
            "and one to hold out: take more text"
        )
    held_out = np.diff(np.floor(np.arange(count + 1) * share)) > 0
    if not held_out.any():
        raise UserError(
            f"{name}.evaluation_share={share} of {len(symbols):,} {unit} of text, {count} blocks of {BLOCK:,}, holds "
            f"out none: take at least {math.ceil(1000 / count) / 1000}, or more text"
        )
    blocks = np.lib.stride_tricks.sliding_window_view(symbols, BLOCK + 1)[::BLOCK]
    train, evaluation = (  # views: the text is kept once, however much the windows overlap
        np.lib.stride_tricks.sliding_window_view(blocks[which], window + 1, axis=1)[:, ::stride]
        for which in (~held_out, held_out)
    )
    return train, evaluation


def _text(
    name: str, cache_dir: str | os.PathLike[str] | None, root: str | os.PathLike[str] | None
) -> tuple[str, bytes]:
    """The hex SHA-256 of the source files, and the whole text as the prepared data set holds it."""
    files = _source_files(name, root)
    digest = _digest(files)
    caches = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    cache = Path(cache_dir) if cache_dir else caches / "dist_partial"
    prepared = _prepared(name, cache.expanduser(), digest, files)
    return digest, b"".join(prepared.values())


def _source_files(name: str, root: str | os.PathLike[str] | None = None) -> dict[str, bytes]:
    """Path, relative to the root, to content of the .py files under it, sorted by path; None: the standard library."""
    root = Path(root or sysconfig.get_paths()["stdlib"]).expanduser()
    if not os.path.isdir(root):
        raise UserError(f"no .py files under {str(root)[:300]!r}, which is no folder: bind {name}.root to one")
    paths: list[Path] = []
    for folder, subfolders, names in os.walk(root):
        # config-*/ and _sysconfigdata_*.py are written when Python is built, and differ between machines.
        subfolders[:] = [s for s in subfolders if s not in SKIPPED and not s.startswith("config-")]
        paths += [Path(folder, n) for n in names if n.endswith(".py") and not n.startswith("_sysconfigdata")]
    if not paths:
        raise UserError(f"no .py files under {root}: bind {name}.root to a folder of Python code")
    return dict(sorted((path.relative_to(root).as_posix(), content(name, path)) for path in paths))


def content(name: str, path: Path) -> bytes:
    """Reads a text file of the user's.

    Raises:
        UserError: it cannot be read.

    Examples:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = Path(folder, "mine.py").write_text("pass")
        ...     content("stdlib_corpus", Path(folder, "mine.py"))
        b'pass'
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(
            f"{name}.root: cannot read {path} ({error.strerror}): make it readable, or move it elsewhere"
        ) from None


def _digest(files: dict[str, bytes]) -> str:
    """Hex SHA-256 of paths and contents."""
    return fingerprint(*(part for item in files.items() for part in item))


def _prepared(name: str, cache: Path, digest: str, files: dict[str, bytes]) -> dict[str, bytes]:
    """Reads the files from their tfds data set in the cache, which is prepared first where it is missing."""
    from dist_partial.data.corpus_builder import StdlibCorpus

    def fresh_builder() -> StdlibCorpus:
        return StdlibCorpus(data_dir=cache, digest=digest, files=files)

    try:
        with quiet_tfds():
            builder = fresh_builder()
            if not builder.is_prepared():
                cache.mkdir(parents=True, exist_ok=True)
                with lock(cache / "stdlib_corpus.lock"):
                    builder = fresh_builder()  # another process may have prepared it meanwhile
                    if not builder.is_prepared():
                        # tfds renames the folder once it is whole; what else is here, a killed process left.
                        shutil.rmtree(builder.data_path.parent, ignore_errors=True)
                        builder.download_and_prepare(file_format="array_record")
    except (OSError, RuntimeError, tf.errors.OpError) as error:  # array_record raises RuntimeError
        words = " ".join(str(error).split())
        raise UserError(
            f"cannot prepare the corpus in {cache} ({words}): "
            f"bind {name}.cache_dir to a folder that can be written and has 20 MB left"
        ) from error
    try:
        prepared = builder.read()
    except (OSError, RuntimeError, ValueError, tf.errors.OpError):
        prepared = {}
    if _digest(prepared) != digest:
        raise UserError(f"the corpus in {builder.data_dir} is damaged: delete it, and it is prepared again")
    return prepared
