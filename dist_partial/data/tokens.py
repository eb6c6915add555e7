"""Text in the tokens of any codec: the standard library's source, or the user's own files."""

import dataclasses
import hashlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

import numpy as np

from dist_partial.data.codecs import ByteCodec, Codec
from dist_partial.data.corpus import Share, Window, _source_files, _split, _Windows, content
from dist_partial.data.source import Dataset, fingerprint
from dist_partial.errors import UserError
from dist_partial.validation import AtLeast, Factory, check_arguments

_FACTORY = "give what makes a codec, such as smollm2_tokenizer, in a gin file @smollm2_tokenizer without ()"


def tokenized_text(
    tokenizer: Annotated[Callable[[], Codec], Factory("@smollm2_tokenizer"), _FACTORY],
    window: Window = 128,
    root: str | os.PathLike[str] | None = None,
    pattern: str = "*.txt",
    limit: Annotated[int | None, AtLeast(1)] = None,
    evaluation_share: Share = 0.02,
) -> Dataset:
    """Makes language modelling of text files in the tokens of a pretrained model.

    Args:
        tokenizer: factory of the codec, such as `smollm2_tokenizer`.
        window: tokens of an example.
        root: a folder whose files are the text, in UTF-8; None: the Python standard library's source.
        pattern: of the names of the files under `root`.
        limit: bytes of text that are read at most, as whole files drawn by their names; None reads all.
        evaluation_share: the part of the text, in (0, 1), that is held out, in blocks of 4096 tokens spread over it.

    Returns:
        x int32 [window], tokens; y int32 [window], for each the token that follows. Every token is the target of at
        most one example.

    Raises:
        UserError: no such text, or too little of it for the window; ids that the codec does not have; the
            tokenizer's own.

    Examples:
        >>> data = tokenized_text(ByteCodec, window=32, limit=500_000, evaluation_share=0.1)
        >>> data.train.spec[0].shape
        TensorShape([32])
    """
    check_arguments(tokenized_text, locals())
    codec = tokenizer()
    if not all(hasattr(codec, name) for name in ("encode", "decode", "size")):
        raise UserError(f"tokenized_text.tokenizer made a {type(codec).__name__}, which is no codec: {_FACTORY}")
    if root is None:
        chosen = _drawn(_source_files("tokenized_text"), limit)
        texts = [code.decode("utf-8", "replace") for code in chosen.values()]
    else:
        chosen = _drawn(_files(root, pattern), limit)
        texts = [_decoded(name, code) for name, code in chosen.items()]
    return _of_texts("tokenized_text", codec, texts, window, evaluation_share)


def stdlib_prose(window: Window = 128, evaluation_share: Share = 0.1) -> Dataset:
    """Makes byte-level language modelling of prose: the 0.7 MB of language reference behind `help()`.

    Args:
        window: bytes of an example.
        evaluation_share: as for `tokenized_text`.

    Examples:
        >>> data = stdlib_prose(window=32)
        >>> data.train.spec[0].shape
        TensorShape([32])
    """
    from pydoc_data import topics  # 0.7 MB, which no other data set needs

    texts = [topics.topics[name] for name in sorted(topics.topics)]
    return dataclasses.replace(_of_texts("stdlib_prose", ByteCodec(), texts, window, evaluation_share), unit="byte")


def _of_texts(name: str, codec: Codec, texts: Sequence[str], window: int, evaluation_share: float) -> Dataset:
    ids = np.concatenate([np.asarray(codec.encode(text)).reshape(-1) for text in texts])
    if not np.issubdtype(ids.dtype, np.integer):
        raise UserError(f"{name}: {type(codec).__name__}.encode gives {ids.dtype}: it must give integer ids [n]")
    if len(ids) and not 0 <= ids.min() <= ids.max() < codec.size:  # which a narrower type would wrap
        raise UserError(
            f"{name}: {type(codec).__name__}.encode gives ids from {ids.min()} to {ids.max()}, and its size says 0 to "
            f"{codec.size - 1}: its size must count all ids, added tokens too"
        )
    tokens = ids.astype(np.uint16 if codec.size <= 2**16 else np.int32)
    unit = "bytes" if isinstance(codec, ByteCodec) else "tokens"
    train, evaluation = _split(name, tokens, window, window, evaluation_share, unit)
    return Dataset(
        name=name,
        train=_Windows(train, next_only=False),
        evaluation=_Windows(evaluation, next_only=False),
        fingerprint=fingerprint(name, tokens, window, evaluation_share),
        codec=codec,
    )


def _files(root: str | os.PathLike[str], pattern: str) -> dict[str, bytes]:
    """Path, relative to the root, to content of the files of that pattern, sorted by path."""
    root = Path(root).expanduser()
    if not os.path.isdir(root):
        what = "is a file: bind the folder that it is in" if os.path.isfile(root) else "is no folder: bind it to one"
        raise UserError(f"tokenized_text.root {str(root)[:300]!r} {what}")
    try:
        paths = sorted(path for path in root.rglob(pattern) if path.is_file())
    except (NotImplementedError, ValueError) as error:  # an absolute path, an empty pattern
        raise UserError(
            f"tokenized_text.pattern is {pattern!r} ({error}): write what file names under the root look like, such as "
            "'*.txt'"
        ) from None
    if not paths:
        endings = sorted({path.suffix for path in root.rglob("*") if path.suffix and path.is_file()})[:8]
        near = f"; files there end in {', '.join(endings)}" if endings else ""
        raise UserError(f"no file {pattern!r} under {root}{near}: bind tokenized_text.pattern")
    return {path.relative_to(root).as_posix(): content("tokenized_text", path) for path in paths}


def _decoded(name: str, text: bytes) -> str:
    try:
        return text.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"tokenized_text: {name} is not text in UTF-8 (byte {text[error.start]:#04x} at {error.start:,}): convert "
            "it, or bind tokenized_text.pattern to the files that are"
        ) from None


def _drawn(files: dict[str, bytes], limit: int | None) -> dict[str, bytes]:
    """Whole files up to the limit, in the order of their paths."""
    if limit is None:
        return files
    # By a hash of the name: neighbours are alike, and a draw does not depend on what else is there.
    order = sorted(files, key=lambda name: hashlib.sha256(name.encode()).digest())
    sizes = np.cumsum([len(files[name]) for name in order])
    chosen = set(order[: int(np.searchsorted(sizes, limit, side="right"))])
    if not chosen:
        raise UserError(f"tokenized_text.limit = {limit} is less than the first file, {sizes[0]} bytes: raise it")
    return {name: text for name, text in files.items() if name in chosen}
