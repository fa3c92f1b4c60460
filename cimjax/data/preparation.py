"""`prepare`: makes, downloads or mends a data set on disk; the function behind `cimjax data prepare`."""

from __future__ import annotations

import os
import pathlib
import shutil
import uuid

from cimjax.data.bridge import builder_of, quiet
from cimjax.data.cache import cached_splits
from cimjax.data.catalog import Source, find
from cimjax.data.folder import (
    DamagedDataError,
    DataError,
    folder_of,
    is_there,
    prepare_command,
    require_folder_of_all,
    resolve,
    unprepared,
    unreachable,
)
from cimjax.data.imagenet_archives import require_archives
from cimjax.data.shards import stored_records


def prepare(name: str, data_dir: str | os.PathLike[str] | None = None, *, progress: bool = False) -> pathlib.Path:
    """Makes sure that a data set is on disk and whole; what is whole already stays untouched.

    The new folder appears in one step, after it has been read back: other processes, which may prepare the same data
    at the same time, see a whole data set or none. A damaged folder is replaced by the new one.

    Args:
      name: one of `names()`. CIFAR is downloaded (160 MB, kept in `data_dir/downloads`), unless the archive lies there.
        ImageNet's archives must lie in `data_dir/downloads/manual`, which is asked first; it then takes hours.
      data_dir: where data sets lie; tensorflow-datasets' default, `$TFDS_DATA_DIR` or `~/tensorflow_datasets`, when
        not given.
      progress: show tensorflow-datasets' bars on stderr; nothing is printed otherwise.

    Returns:
      The data set's folder, `data_dir/NAME/VERSION`.

    Raises:
      ValueError: an unknown name.
      DataError: no network (within seconds), a folder that cannot be written, a full disk, a package not installed.
    """
    source = find(name)
    root = resolve(data_dir)
    require_folder_of_all(source, root)
    folder = folder_of(source, root)
    if _is_whole(source, root):
        return folder
    # tensorflow-datasets also writes into a folder of its own and renames it, but draws the name from `random`, which
    # two processes may have seeded alike, and fails if the other was first. So it works in a folder that is ours alone.
    staging = folder.parent / f"incomplete.cimjax-{uuid.uuid4().hex}"
    try:
        with quiet(progress):
            _build(source, root, staging)
        _read_back(source, staging)
        _publish(source, root, staging)
    except DamagedDataError as error:
        raise unprepared(source, root, error.__cause__ or error) from error
    except (DataError, MemoryError, ImportError, AttributeError, TypeError):
        # The last three come from code that does not fit together, not from the place or the network.
        raise
    except Exception as error:
        # Whatever the system, requests, tensorflow-datasets or Riegeli raise when writing or downloading fails.
        raise unprepared(source, root, error) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return folder


def _build(source: Source, root: pathlib.Path, staging: pathlib.Path) -> None:
    """Lets tensorflow-datasets prepare under `staging`; downloads go to `root`, where they are kept."""
    builder = builder_of(source, staging, file_format="array_record")
    downloads = (root if source.downloads else staging) / "downloads"
    if source.streamed:
        require_archives(root, prepare_command(source, root))
    elif source.downloads and (reason := builder.unreachable(downloads)):
        raise unreachable(source, root, reason, builder.archive)
    staging.mkdir(parents=True)
    builder.download_and_prepare(download_dir=downloads)


def _publish(source: Source, root: pathlib.Path, staging: pathlib.Path) -> None:
    """Renames the new folder to its place, unless another process has put the same data there meanwhile.

    A damaged folder is moved to `staging`, which is deleted afterwards.
    """
    folder = folder_of(source, root)
    if is_there(source, root) and not _is_whole(source, root):
        folder.rename(staging / "damaged")
    try:
        folder_of(source, staging).rename(folder)
    except OSError:
        if not _is_whole(source, root):
            raise


def _read_back(source: Source, root: pathlib.Path) -> None:
    """Reads every example; of a stream, which fills a disk, the list of its files, the first and the last image."""
    if not source.streamed:
        cached_splits(source, root)
        return
    for split in ("train", "validation"):
        records = stored_records(source, root, split)
        for index in (0, len(records) - 1):
            records[index]


def _is_whole(source: Source, root: pathlib.Path) -> bool:
    """Whether every example can be read."""
    if not is_there(source, root):
        return False
    try:
        _read_back(source, root)
    except DamagedDataError:
        return False
    return True
