"""The embedded corpus as a tfds data set. Apart from `corpus` because tfds takes long to import."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds

SPLIT = "files"


class StdlibCorpus(tfds.core.GeneratorBasedBuilder):
    """Builds the tfds data set of the source files, one example each.

    Args:
        data_dir: the tfds folder.
        digest: hex SHA-256 of the files: the tfds config, and so a folder of its own.
        files: path to content, what is written when the data set is prepared.

    Examples:
        >>> import tempfile
        >>> from dist_partial.data.quiet import quiet_tfds
        >>> with tempfile.TemporaryDirectory() as folder, quiet_tfds():
        ...     corpus = StdlibCorpus(data_dir=Path(folder), digest="0" * 64, files={"a.py": b"pass"})
        ...     corpus.download_and_prepare(file_format="array_record")
        ...     files = corpus.read()
        >>> files
        {'a.py': b'pass'}
    """

    VERSION = tfds.core.Version("1.0.0")

    def __init__(self, *, data_dir: Path, digest: str, files: dict[str, bytes]) -> None:
        self._files = files
        self._digest = digest
        config = tfds.core.BuilderConfig(name=digest, version=self.VERSION, description="Files by SHA-256.")
        super().__init__(data_dir=data_dir, config=config)

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description="The Python standard library of a machine, one source file an example.",
            features=tfds.features.FeaturesDict({"path": tfds.features.Text(), "text": tfds.features.Text()}),
            metadata=tfds.core.MetadataDict(sha256=self._digest),
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[str, dict[str, Any]]]]:
        return {SPLIT: self._generate_examples()}

    def _generate_examples(self) -> Iterator[tuple[str, dict[str, Any]]]:
        for path, text in self._files.items():
            yield path, {"path": path, "text": text}

    def read(self) -> dict[str, bytes]:
        """The prepared files, path to content, sorted by path."""
        records = self.as_data_source(SPLIT)
        records = records.__getitems__(range(len(records)))
        return dict(sorted((record["path"].decode(), record["text"]) for record in records))
