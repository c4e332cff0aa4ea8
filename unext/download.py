"""The published weights of the encoders, and fetching a file."""

import logging
import os
import re
import shutil
import socket
from contextlib import ExitStack, suppress
from pathlib import Path
from tempfile import TemporaryDirectory

from filelock import FileLock
from iopath.common.download import download as download_file
from iopath.common.file_io import get_cache_dir

from unext.errors import reason

TRUNK_FILES = {size: f"sam2_hiera_{size}.pt" for size in ("tiny", "small", "base_plus", "large")}
# Addresses of the encoders' weights by file name.
PUBLISHED = {name: f"https://dl.fbaipublicfiles.com/segment_anything_2/072824/{name}" for name in TRUNK_FILES.values()}
PUBLISHED |= {
    f"{name}.safetensors": f"https://huggingface.co/timm/{name}.lvd142m/resolve/main/model.safetensors"
    for name in (f"vit_{size}_patch14_dinov2" for size in ("small", "base", "large", "giant"))
}
HUB = re.compile(r"https://huggingface\.co/(?P<repo_id>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<filename>[^?]+)")
TIMEOUT = 60  # seconds without data after which a download is abandoned


def fetch(source: str | Path) -> Path:
    """The path of a file; a URL is downloaded once, with a bar, into iopath's cache. Raises OSError."""
    path = Path(source)
    if is_url(source):
        path = Path(get_cache_dir(), re.sub("[:?]", "_", str(source).partition("://")[2]))
        download(str(source), path)
    if not path.is_file():
        missing = "is a broken link" if path.is_symlink() else f"there is no such file{address(path.name)}"
        raise FileNotFoundError(f"{source}: {'is not a file' if path.exists() else missing}")
    return path


def fetch_published(source: str | Path) -> str | Path:
    """Returns `source`, first downloading it if it is a missing file of PUBLISHED in a folder called weights."""
    path = Path(source)
    if path.name in PUBLISHED and path.parent.name == "weights" and not path.exists() and not is_url(source):
        print(f"{path} is missing; downloading {PUBLISHED[path.name]}")
        download(PUBLISHED[path.name], path)
    return source


def is_url(source: str | Path) -> bool:
    return re.match("(https?|ftp)://", str(source)) is not None


def download(url: str, path: Path) -> None:
    """Downloads a file to `path`, whole or not at all, unless it exists. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        with suppress(OSError):  # a file system without locks: each process downloads for itself
            stack.enter_context(FileLock(f"{path}.lock"))
        if path.exists():
            return
        temporary = Path(stack.enter_context(TemporaryDirectory(prefix=".", dir=path.parent)), path.name)
        try:
            retrieve(url, temporary)
        except Exception as error:  # the libraries raise many types
            problem = f"cannot be downloaded: {reason(error)}; download it manually and save it as {path}"
            raise OSError(f"{url}: {problem}") from error
        os.replace(temporary, path)


def retrieve(url: str, path: Path) -> None:
    """Downloads a file; from Hugging Face's hub with its library, which has mirrors, a cache and an offline mode."""
    if hub := HUB.fullmatch(url):
        from huggingface_hub import hf_hub_download

        shutil.copyfile(hf_hub_download(**hub.groupdict()), path)
        return
    logging.getLogger("iopath").setLevel(logging.CRITICAL)  # it logs what it also raises
    with ExitStack() as stack:
        stack.callback(socket.setdefaulttimeout, socket.getdefaulttimeout())
        socket.setdefaulttimeout(TIMEOUT)  # iopath has no such option
        download_file(url, str(path.parent), filename=path.name)


def address(file: str) -> str:
    """The published address of a file, in parentheses for messages; empty if it is unknown."""
    return f" ({PUBLISHED[file]})" if file in PUBLISHED else ""
