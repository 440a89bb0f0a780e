"""Datasets of the Hugging Face hub by name; the first use of one needs a network."""

import logging
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from difflib import get_close_matches
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

from fedkd.data.layouts import SINGLE_FILES, what_works
from fedkd.data.settings import DataSettings
from fedkd.data.tables import ArrowTable

if TYPE_CHECKING:
    from datasets import DatasetDict

LOADERS = re.compile(
    "arrow|audiofolder|cache|csv|eval|hdf5|imagefolder|json|lance|niftifolder|pandas|parquet"
    "|pdffolder|sql|text|videofolder|webdataset|xml"
)
"""Names under which `datasets` reads files of the working directory, whatever they are."""

OFTEN_USED: Mapping[str, str] = MappingProxyType(
    {
        "ag_news": "fancyzhx/ag_news",
        "cifar10": "uoft-cs/cifar10",
        "cifar100": "uoft-cs/cifar100",
        "fashion_mnist": "zalando-datasets/fashion_mnist",
        "imdb": "stanfordnlp/imdb",
        "mnist": "ylecun/mnist",
        "svhn": "ufldl-stanford/svhn",
    }
)
"""Names that are mistyped, and what the hub calls these datasets."""

TIMEOUT_S = 5.0
"""For how long the hub is waited for before the cache is used alone."""

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
    if settings.config is None and (meant := near_names(settings.source)):
        raise ValueError(
            f"data.source {settings.source!r} is no file or folder here; did you mean {meant}? "
            "Another dataset of the hub is written with its owner, as in ylecun/mnist"
        )
    import datasets

    trouble = "" if Path(settings.source).exists() else _trouble(settings.source)
    try:
        with _quietly(), _offline() if trouble else nullcontext():
            return datasets.load_dataset(
                settings.source,
                settings.config,
                cache_dir=None if cache_folder is None else os.fspath(cache_folder),
            )
    except Exception as error:  # network, hub, builders and files each raise types of their own
        reason = trouble or (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"data.source {settings.source!r} (data.config {settings.config!r}) is neither an "
            f"existing folder nor a Hugging Face dataset that could be loaded: {reason}. Check the "
            "name and the network, or use 'digits' or a folder with train-*.parquet"
        ) from error


def near_names(source: str) -> str:
    """Return what a bare name may stand for that is neither a source nor a dataset by itself.

    That is ``digits``, a dataset that is often used, or a file or folder of this one.

    Args:
        source: without a path; names with an owner are taken as they are.
    """
    if "/" in source or source in OFTEN_USED:
        return ""
    name = source.casefold()
    here = [
        path.name
        for path in sorted(Path().iterdir())
        if path.suffix.lower() in SINGLE_FILES and path.stem.casefold() == name
    ]
    near = get_close_matches(name, ["digits", *OFTEN_USED], n=1, cutoff=0.75)
    found = [*here, *(OFTEN_USED.get(each, each) for each in near)]
    return " or ".join(f"data.source={each}" for each in found[:3])


def _trouble(source: str) -> str:
    """Return why the hub cannot be asked for a dataset, within seconds; empty where it can.

    ``datasets`` itself asks again and again for half a minute.
    """
    import huggingface_hub
    from datasets import config
    from huggingface_hub.errors import RepositoryNotFoundError

    if config.HF_HUB_OFFLINE:
        return ""
    try:
        huggingface_hub.HfApi(endpoint=config.HF_ENDPOINT).dataset_info(source, timeout=TIMEOUT_S)
    except RepositoryNotFoundError:
        return "the hub has no dataset of this name that everybody may read"
    except Exception as error:  # the network and the hub each raise types of their own
        text = (str(error).splitlines() or [""])[0]
        return f"the hub does not answer ({type(error).__name__}: {text})"
    return ""


@contextmanager
def _offline() -> Iterator[None]:
    """Let ``datasets`` look into its cache alone."""
    from datasets import config
    from huggingface_hub import constants

    before = config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE
    config.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE = before


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
