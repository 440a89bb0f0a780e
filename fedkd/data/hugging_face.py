"""Datasets of the Hugging Face hub by name; the first use of one needs a network."""

import logging
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from fedkd.data.layouts import what_works
from fedkd.data.settings import DataSettings
from fedkd.data.tables import ArrowTable

if TYPE_CHECKING:
    from datasets import DatasetDict

LOADERS = re.compile(
    "arrow|audiofolder|cache|csv|eval|hdf5|imagefolder|json|lance|niftifolder|pandas|parquet"
    "|pdffolder|sql|text|videofolder|webdataset|xml"
)
"""Names under which `datasets` reads files of the working directory, whatever they are."""

NAME = re.compile(r"[\w.-]{1,96}(/[\w.-]{1,96})?")


def hugging_face_tables(
    settings: DataSettings, cache_folder: Path | None = None
) -> Mapping[str, ArrowTable]:
    """Load the splits of a dataset with ``datasets``.

    Args:
        settings: ``source`` and ``config`` as ``datasets.load_dataset`` takes them.
        cache_folder: where the dataset is kept; ``None``: where ``datasets`` keeps all of them.

    Raises:
        ValueError: if it cannot be loaded.
    """
    return {
        str(name): ArrowTable(split.data.table, f"split {name}", split.features.to_dict())
        for name, split in _load_dataset(settings, cache_folder).items()
    }


def hugging_face_files(
    settings: DataSettings, cache_folder: Path | None = None
) -> tuple[Path, ...]:
    """List the cached files of a dataset's training and test splits."""
    splits = _load_dataset(settings, cache_folder)
    return tuple(
        Path(file["filename"])
        for name in ("train", "test")
        if name in splits
        for file in splits[name].cache_files
    )


def _load_dataset(settings: DataSettings, cache_folder: Path | None) -> "DatasetDict":
    is_name = NAME.fullmatch(settings.source) and not LOADERS.fullmatch(settings.source)
    if not is_name and not Path(settings.source).exists():
        raise ValueError(
            f"data.source {settings.source!r} is neither a folder nor a name: {what_works()}"
        )
    import datasets

    try:
        with _quietly():
            return datasets.load_dataset(
                settings.source,
                settings.config,
                cache_dir=None if cache_folder is None else os.fspath(cache_folder),
            )
    except Exception as error:  # network, hub, builders and files each raise types of their own
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"data.source {settings.source!r} (data.config {settings.config!r}) is neither an "
            f"existing folder nor a Hugging Face dataset that could be loaded: {reason}. Check the "
            "name and the network, or use 'digits' or a folder with train-*.parquet"
        ) from error


@contextmanager
def _quietly() -> Iterator[None]:
    """Keep ``datasets`` from reporting each load to a download counter, and from chatting."""
    from datasets import config

    before = config.HF_UPDATE_DOWNLOAD_COUNTS
    config.HF_UPDATE_DOWNLOAD_COUNTS = False
    # The hub client logs each retry; the error that follows says what matters in one line.
    log = logging.getLogger("huggingface_hub")
    level = log.level
    log.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        config.HF_UPDATE_DOWNLOAD_COUNTS = before
        log.setLevel(level)
