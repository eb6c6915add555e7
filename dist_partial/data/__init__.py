"""Data sets with random access, and the pipeline that reads them by position."""

from dist_partial.data.batches import (
    evaluation_batches,
    fetch,
    fetched,
    looks,
    some_targets,
    train_batches,
    train_indices,
    without_lists,
)
from dist_partial.data.codecs import Codec
from dist_partial.data.corpus import stdlib_corpus, stdlib_shapes
from dist_partial.data.kept import keep_examples, kept_examples
from dist_partial.data.prepared import tfds_dataset
from dist_partial.data.source import ArraySource, ClassWeighted, Dataset, Source, check_source, fingerprint
from dist_partial.data.tokens import stdlib_prose, tokenized_text

__all__ = [
    "ArraySource",
    "ClassWeighted",
    "Codec",
    "Dataset",
    "Source",
    "check_source",
    "evaluation_batches",
    "fetch",
    "fetched",
    "fingerprint",
    "keep_examples",
    "kept_examples",
    "looks",
    "some_targets",
    "stdlib_corpus",
    "stdlib_prose",
    "stdlib_shapes",
    "tfds_dataset",
    "tokenized_text",
    "train_batches",
    "train_indices",
    "without_lists",
]
