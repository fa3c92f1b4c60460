"""Large memory pages for arrays on the host, which make training steps on CPU quicker.

XLA's CPU backend asks for the memory of a whole step at once, and the kernel hands it over page by page. glibc can ask
for large pages, but reads that wish only when a process starts; so the process starts itself again, once.
"""

from __future__ import annotations

import contextlib
import os
import platform
import sys
from pathlib import Path

_SETTING = "glibc.malloc.hugetlb=1"
_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def start_again_with_large_pages() -> None:
    """Replace this process by the same command with large pages, where Linux and glibc can have them and do not yet.

    Does nothing where `GLIBC_TUNABLES` already says something of `hugetlb`: set `glibc.malloc.hugetlb=0` there to
    leave pages as they are. To be called before anything else is done.
    """
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    if "glibc.malloc.hugetlb" in tunables or not _on_request():
        return
    os.environ["GLIBC_TUNABLES"] = ":".join(filter(None, [tunables, _SETTING]))
    with contextlib.suppress(OSError):
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def _on_request() -> bool:
    """Whether the kernel gives large pages to those who ask, and glibc (2.35 or later) can ask."""
    name, version = platform.libc_ver()
    if sys.platform != "linux" or name != "glibc" or tuple(map(int, version.split(".")[:2])) < (2, 35):
        return False
    with contextlib.suppress(OSError):
        return "[madvise]" in _PAGES.read_text()
    return False
