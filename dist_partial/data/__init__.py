"""Data sets with random access, and the pipeline that reads them by position."""

from dist_partial.data.adapt import dataset, source_of
from dist_partial.data.batches import (
    evaluation_batches,
    failing_example,
    looks,
    some_inputs,
    some_targets,
    train_batches,
    train_indices,
)
from dist_partial.data.class_weights import ClassWeighted, class_weighted
from dist_partial.data.codecs import Codec
from dist_partial.data.corpus import stdlib_corpus, stdlib_shapes
from dist_partial.data.held_out import Part, hold_out
from dist_partial.data.images import ImageFolderSource, image_folder
from dist_partial.data.kept import keep_examples, kept_examples
from dist_partial.data.map_source import MapSource
from dist_partial.data.mapped import Mapped
from dist_partial.data.mixed import Joined, Mixed, mix
from dist_partial.data.order import InOrder
from dist_partial.data.prepared import tfds_dataset
from dist_partial.data.py_dataset import PyDatasetSource
from dist_partial.data.readers import faster, reading, started
from dist_partial.data.reading import fetch, fetched, trait, without_lists
from dist_partial.data.source import ArraySource, Dataset, Source, check_source, fingerprint
from dist_partial.data.stream import Stream
from dist_partial.data.tables import csv_dataset, parquet_dataset
from dist_partial.data.tfrecords import TFRecordSource, tfrecord_dataset
from dist_partial.data.tokens import stdlib_prose, tokenized_text

__all__ = [
    "ArraySource",
    "ClassWeighted",
    "Codec",
    "Dataset",
    "ImageFolderSource",
    "InOrder",
    "Joined",
    "MapSource",
    "Mapped",
    "Mixed",
    "Part",
    "PyDatasetSource",
    "Source",
    "Stream",
    "TFRecordSource",
    "check_source",
    "class_weighted",
    "csv_dataset",
    "dataset",
    "evaluation_batches",
    "failing_example",
    "faster",
    "fetch",
    "fetched",
    "fingerprint",
    "hold_out",
    "image_folder",
    "keep_examples",
    "kept_examples",
    "looks",
    "mix",
    "parquet_dataset",
    "reading",
    "some_inputs",
    "some_targets",
    "source_of",
    "started",
    "stdlib_corpus",
    "stdlib_prose",
    "stdlib_shapes",
    "tfds_dataset",
    "tfrecord_dataset",
    "tokenized_text",
    "train_batches",
    "train_indices",
    "trait",
    "without_lists",
]
