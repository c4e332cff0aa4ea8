"""What a process holds on to without need goes back to the system. Elsewhere than on Linux nothing happens."""

import ctypes
import os
import sys
from pathlib import Path

MADV_DONTNEED = 4  # of Linux's madvise


def let_go(*sources: str | Path) -> None:
    """Takes the mapped pages of local files out of this process's memory.

    They come back from the files when they are next looked at. Nothing happens to mappings that were written to.
    """
    smaps = Path("/proc/self/smaps")
    if not sources or not smaps.exists():
        return
    libc, names = ctypes.CDLL(None), {os.path.realpath(source) for source in sources}
    place = None
    for line in smaps.read_text(errors="surrogateescape").splitlines():
        words = line.split(maxsplit=5)
        if "-" in words[0]:  # start-end, rights, offset, device, inode and name of the next mapping
            place = [int(end, 16) for end in words[0].split("-")] if words[-1] in names else None
        elif place and words[:2] == ["Anonymous:", "0"]:  # kB of copies that belong to this process alone
            start, end = place
            libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), MADV_DONTNEED)


def trim() -> None:
    """Gives back what malloc, if it is glibc's, keeps of freed arrays: holes in which the next ones may not fit."""
    if sys.platform == "linux" and (malloc_trim := getattr(ctypes.CDLL(None), "malloc_trim", None)):
        malloc_trim(ctypes.c_size_t(0))
