"""Whether everything that ImageNet's preparation needs is there: asked first, because it works for hours.

The archives, of the published sizes, and room on the disk. Nothing is imported or read for that.
"""

from __future__ import annotations

import pathlib
import shlex
import shutil

from cimjax.data.folder import DataError

TRAIN, VALIDATION = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"
# Bytes, as published on image-net.org.
SIZES = {TRAIN: 147_897_477_120, VALIDATION: 6_744_924_160}
# The records, and as much again while they are put into their order.
ROOM = 2.1


def require_archives(root: pathlib.Path, command: str) -> pathlib.Path:
    """The folder of the archives.

    Args:
      root: the folder of all data sets.
      command: what prepares them.

    Raises:
      DataError: an archive is missing or not whole, or there is not enough room, in one line.
    """
    manual = root / "downloads" / "manual"
    for name, size in SIZES.items():
        try:
            found = (manual / name).stat().st_size
        except OSError:
            raise DataError(
                f"{manual / name} is missing: cimjax cannot download ImageNet. Register at "
                f"https://image-net.org/download-images, put {' and '.join(SIZES)} "
                f"({sum(SIZES.values()) / 1e9:.0f} GB, ILSVRC 2012, tasks 1 and 2) into "
                f"{shlex.quote(str(manual))}, then run: {command}"
            ) from None
        if found != size:
            raise DataError(
                f"{manual / name} has {found:,} bytes instead of {size:,}; download it again, then run: {command}"
            )
    needed, free = ROOM * sum(SIZES.values()), shutil.disk_usage(root).free
    if free < needed:
        raise DataError(
            f"preparing ImageNet needs {needed / 1e9:.0f} GB, and {root} has {free / 1e9:.0f} GB left; make room or "
            "give another folder by `--data_dir`"
        )
    return manual
