"""The way into tensorflow-datasets: imported late, with a clear error where it is missing, and kept silent.

Nothing of cimjax but `cimjax.data` builders, and no caller but `records` and `preparation`, goes through here.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import pathlib
from collections.abc import Iterator
from typing import Any

from cimjax.data.catalog import Source
from cimjax.data.folder import DataError

# tensorflow-datasets needs importlib_resources and pillow without declaring them, and array_record only on Linux.
INSTALL_COMMAND = "pip install tensorflow-datasets array_record importlib_resources pillow scikit-learn"
_PACKAGES = ("array_record.python.array_record_module", "importlib_resources", "PIL.Image", "tensorflow_datasets")


def require(*modules: str) -> None:
    """Imports modules; `DataError` with the pip command for the first that is not installed."""
    for module in modules:
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise DataError(
                f"{module.partition('.')[0]} cannot be imported ({error}); install what this data set needs with: "
                f"{INSTALL_COMMAND}"
            ) from error


def builder_of(source: Source, root: pathlib.Path, **options: Any) -> Any:
    """The tensorflow-datasets builder of a data set whose folders are under `root`."""
    require(*_PACKAGES)
    module, _, name = source.builder.partition(":")
    return getattr(importlib.import_module(module), name)(data_dir=root, **options)


@contextlib.contextmanager
def quiet(progress: bool = False) -> Iterator[None]:
    """No notices of tensorflow-datasets, and no bars unless `progress`; as it was before on leaving.

    The switches are the process's own: another thread that prepares data meanwhile is silent too.
    """
    require(*_PACKAGES)
    tqdm_utils = importlib.import_module("tensorflow_datasets.core.utils.tqdm_utils")
    notices = logging.getLogger("absl")
    before = (tqdm_utils._active, notices.disabled)
    tqdm_utils.display_progress_bar(progress)
    notices.disabled = True
    try:
        yield
    finally:
        tqdm_utils.display_progress_bar(before[0])
        notices.disabled = before[1]


class SilentBuilder:
    """Mixed into our builders: keeps tensorflow-datasets from printing where it prepares."""

    def _log_download_bytes(self) -> None:
        pass

    def _log_download_done(self) -> None:
        pass
