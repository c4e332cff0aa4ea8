"""The published weights of the encoders, and fetching a file."""

import http.client
import logging
import os
import shutil
import socket
from contextlib import suppress
from pathlib import Path
from urllib.parse import urlparse

from iopath.common.file_io import HTTPURLHandler, PathManager, file_lock, get_cache_dir

from unext.errors import InputError, reason

TRUNK_FILES = {size: f"sam2_hiera_{size}.pt" for size in ("tiny", "small", "base_plus", "large")}
PUBLISHED = {  # addresses of the encoders' weights by file name
    name: f"https://dl.fbaipublicfiles.com/segment_anything_2/072824/{name}" for name in TRUNK_FILES.values()
} | {
    f"vit_{size}_patch14_dinov2.safetensors": (
        f"https://huggingface.co/timm/vit_{size}_patch14_dinov2.lvd142m/resolve/main/model.safetensors"
    )
    for size in ("small", "base", "large", "giant")
}
TIMEOUT = 60  # seconds without data after which a download is abandoned


def fetch(source: str | Path) -> Path:
    """The local path of `source`: a path, or a URL that is downloaded once, with a bar, into iopath's cache.

    A missing file whose name is in PUBLISHED is downloaded to its place if its folder exists or is called weights.
    Raises OSError if there is no such file or the download fails, which leaves nothing behind.
    """
    path = Path(source)
    if is_url(source):  # iopath's own cache ignores the host
        path = download(str(source), Path(get_cache_dir(), urlparse(source).netloc.replace(":", "_")))
    elif not path.exists() and path.name in PUBLISHED and (path.parent.is_dir() or path.parent.name == "weights"):
        path.parent.mkdir(parents=True, exist_ok=True)
        with file_lock(str(path)):  # one of several processes downloads
            if not path.exists():
                print(f"{path} is missing; downloading {PUBLISHED[path.name]}")
                beside = path.with_name(f".{path.name}.download")
                try:
                    os.replace(download(PUBLISHED[path.name], beside), path)
                except OSError as error:
                    raise OSError(f"{error} and save it as {path}") from error
                finally:
                    shutil.rmtree(beside, ignore_errors=True)
    if not path.is_file():
        missing = "is a broken link" if path.is_symlink() else "there is no such file"
        raise FileNotFoundError(f"{source}: {'is not a file' if path.exists() else missing}")
    return path


def is_url(source: str | Path) -> bool:
    """Whether `source` is a URL to download. Raises InputError for a malformed URL or one of another scheme."""
    if "://" not in str(source):
        return False
    with suppress(ValueError):
        if urlparse(source).scheme in ("http", "https", "ftp") and urlparse(source).netloc:
            return True
    raise InputError(f"{source}: is not a URL that can be downloaded, such as https://host/file")


def download(url: str, folder: Path) -> Path:
    """Downloads `url` into the cache below `folder`. Raises OSError, also if the server falls silent."""
    manager = PathManager()
    manager.register_handler(HTTPURLHandler())
    logging.getLogger("iopath").setLevel(logging.CRITICAL)  # it logs what it also raises
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(TIMEOUT)  # iopath has no option for it
    try:
        return Path(manager.get_local_path(url, cache_dir=str(folder)))
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise OSError(f"{url}: cannot be downloaded: {reason(error)}; fetch it by other means") from error
    finally:
        socket.setdefaulttimeout(before)


def address(file: str) -> str:
    """Where a file is published, to follow its name in a message; empty if that is not known."""
    return f" ({PUBLISHED[file]})" if file in PUBLISHED else ""
