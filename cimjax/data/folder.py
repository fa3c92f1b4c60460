"""Where prepared data lies, and the one-line errors about it. No data is read here."""

from __future__ import annotations

import os
import pathlib
import shlex

from cimjax.data.catalog import Source, find, names


class DataError(ValueError):
    """A data set cannot be had; the message is one line that says what, where, and which command mends it."""


class DamagedDataError(DataError):
    """The prepared files of a data set are there but incomplete or broken; preparing again mends it."""


def resolve(data_dir: str | os.PathLike[str] | None) -> pathlib.Path:
    """The folder that holds all data sets: `data_dir`, else tensorflow-datasets' own default.

    That default, `$TFDS_DATA_DIR` or `~/tensorflow_datasets`, is repeated here because importing tensorflow-datasets
    for it would cost more time than reading the data.
    """
    data_dir = data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
    if "://" in str(data_dir):
        raise DataError(f"`data_dir` must be a folder of this machine, got {str(data_dir)!r}")
    try:
        return pathlib.Path(data_dir).expanduser().absolute()
    except RuntimeError as error:  # a user of a container may have no home
        raise DataError(
            f"there is no home for {str(data_dir)!r}; give the folder of all data sets as `data_dir` or TFDS_DATA_DIR"
        ) from error


def own_path(name: str, prefix: str, data_dir: str | os.PathLike[str] | None) -> pathlib.Path:
    """The path that the name of a user's own data, `prefix` and a path, means; a relative one lies in `data_dir`, if
    that is given."""
    try:
        given = pathlib.Path(name.removeprefix(prefix)).expanduser()
        return (pathlib.Path(data_dir or "").expanduser() / given).absolute()
    except RuntimeError as error:  # a user of a container may have no home
        raise DataError(f"there is no home for {name!r}; give the whole path") from error


def require_folder_of_all(source: Source, root: pathlib.Path) -> None:
    """`DataError` with the folder that is meant, where `root` is the folder of one data set, which holds no others."""
    of_one = {(known.folder, known.version) for known in map(find, names())}
    if root.parts[-2:] in of_one:
        meant = root.parents[1]
    elif root.name == source.folder and is_there(source, root.parent) and not is_there(source, root):
        meant = root.parent
    else:
        return
    raise DataError(
        f"{root} is the folder of one data set, not of all: give {shlex.quote(str(meant))} as `data_dir` (--data_dir)"
    )


def folder_of(source: Source, root: pathlib.Path) -> pathlib.Path:
    """Where tensorflow-datasets keeps this data set under `root`."""
    return root / source.folder / source.version


def is_there(source: Source, root: pathlib.Path) -> bool:
    """Whether there is a folder of prepared data, whole or not; `DataError` where that cannot be told."""
    try:
        return folder_of(source, root).is_dir()
    except OSError as error:
        raise unreadable(source, root, error) from error


def prepare_command(source: Source, root: pathlib.Path) -> str:
    """The command line that makes or mends the data set."""
    return f"cimjax data prepare {source.name} --data_dir {shlex.quote(str(root))}"


def absent(source: Source, root: pathlib.Path) -> DataError:
    """There is no prepared data."""
    return DataError(
        f"{source.name} is not prepared: found no folder {folder_of(source, root)}; "
        f"download and prepare it with: {prepare_command(source, root)}"
    )


def damaged(source: Source, root: pathlib.Path, reason: object) -> DamagedDataError:
    """There is prepared data, and it cannot be read."""
    return DamagedDataError(
        f"{source.name} in {folder_of(source, root)} is damaged ({one_line(reason)}); "
        f"mend it with: {prepare_command(source, root)}"
    )


def unreadable(source: Source, root: pathlib.Path, reason: object) -> DataError:
    """The data may be whole, but this user, or this machine, cannot read it."""
    return DataError(
        f"{source.name} in {folder_of(source, root)} cannot be read ({one_line(reason)}); "
        "mend that or give another folder with `--data_dir`"
    )


def unreachable(source: Source, root: pathlib.Path, reason: str, archive: str) -> DataError:
    """The data would have to be downloaded, and cannot be."""
    return DataError(
        f"{source.name} is not prepared in {folder_of(source, root)}, and {one_line(reason)}; with a network, or with "
        f"{archive} put into {root / 'downloads' / 'manual'}, run: {prepare_command(source, root)}"
    )


def unprepared(source: Source, root: pathlib.Path, reason: object) -> DataError:
    """Preparing failed: the folder cannot be written, the disk is full, the download broke off or is damaged."""
    return DataError(
        f"{source.name} could not be prepared in {folder_of(source, root)} ({one_line(reason)}); "
        f"mend that or give another folder, then run: {prepare_command(source, root)}"
    )


def one_line(reason: object, limit: int = 300) -> str:
    """The words of an error without its line breaks, cut to `limit` characters."""
    if isinstance(reason, OSError) and reason.strerror:
        reason = reason.strerror
    text = " ".join(str(reason).split()) or type(reason).__name__
    return text if len(text) <= limit else text[: limit - 3] + "..."
