"""Folders, names in messages, and files that are written whole or not at all. Free of torch."""

import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from filelock import FileLock, Timeout

from unext.errors import InputError

LISTED = 10  # names in a message; further ones are only counted
PATIENCE = 6.0  # seconds to wait: DataLoader workers inherit the lock and live up to 5 s after their parent is killed


def require_folder(path: str | Path) -> Path:
    """Returns the path. Raises OSError if it is not a folder."""
    path = Path(path)
    if not path.is_dir():
        raise NotADirectoryError(f"{path}: {'is not a folder' if path.exists() else 'there is no such folder'}")
    return path


def count(number: int, noun: str) -> str:
    """The number with its noun: "1 map", "1,024 maps"."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def printable(text: object) -> str:
    """A name or message as text on one line; characters that cannot be printed are escaped."""
    text = str(text)
    return text if text.isprintable() else "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def listing(names: Iterable[object]) -> str:
    """The first names, and the number of the others: "a.png, b.png and 3 more"."""
    names = list(names)
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return ", ".join(map(printable, names[:LISTED])) + more


def require_not_input(path: str | Path, inputs: Iterable[str | Path]) -> None:
    """Raises InputError if writing to `path` would replace one of the inputs."""
    if Path(path).resolve() in {Path(source).resolve() for source in inputs}:
        raise InputError(f"{path}: is one of the inputs and would be replaced; name another place")


@contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """Adds the file's name to the message of an OSError raised in the block."""
    try:
        yield
    except OSError as error:
        raise OSError(f"{path}: cannot be written: {error.strerror or error}") from error


@contextmanager
def replacing(path: str | Path) -> Iterator[BinaryIO]:
    """A temporary file, renamed to `path` once it is whole and on the disk, or removed if the block fails."""
    path = Path(path)
    # Hashed, because the name with a suffix could exceed 255 bytes.
    temporary = path.with_name(f".{hashlib.sha256(os.fsencode(path.name)).hexdigest()[:16]}.tmp")
    try:
        with writing(path):
            with open(temporary, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
    finally:
        with suppress(OSError):  # even the folder may be gone
            temporary.unlink()


def write_json(path: str | Path, content: object) -> None:
    """Writes a JSON file, whole or not at all; values of other types, such as paths, become text."""
    with replacing(path) as file:
        file.write(json.dumps(content, indent=1, default=str).encode() + b"\n")


def output_folder(path: str | Path) -> Path:
    """Makes the folder if it is missing; returns its path. Raises OSError if files cannot be written there."""
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            return path
    except OSError as error:
        raise OSError(f"{path}: nothing can be written there: {error.strerror}") from error


def check_output_file(option: str, path: Path | None) -> None:
    """Raises OSError if no file can be written to the path that an option names; makes its folder."""
    if path and path.exists() and not path.is_file():
        raise OSError(f"{option} {path}: is a folder or a device; name a file")
    if path:
        output_folder(path.parent)


@contextmanager
def locked(path: str | Path) -> Iterator[None]:
    """Locks a folder, which is made if missing. Raises InputError if another process has locked it."""
    lock = FileLock(output_folder(path) / ".lock", timeout=PATIENCE)
    with ExitStack() as stack:
        try:
            stack.enter_context(lock)
        except Timeout:
            raise InputError(f"{path}: another process writes there; wait, or name another folder") from None
        except OSError:  # a file system without locks, or a lock of another user
            pass
        yield
