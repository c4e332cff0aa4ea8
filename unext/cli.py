"""What the commands share: errors as one line, exit statuses, signals, argument types. Free of torch."""

import argparse
import errno
import importlib.util
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn, TextIO

from unext.errors import InputError, diagnosis, message
from unext.files import printable

NOTHING_STARTED = 2  # exit status: the user's input is invalid
NOT_COMPLETED = 1  # started and not completed
INTERRUPTED = 130  # 128 + SIGINT
MAX_PIXELS = 250_000_000  # of an image, unless the user allows more
ANY = 2**32  # the largest number if no other bound is given
PRECISIONS = ("auto", "bf16", "fp16", "fp32")


class Command:
    """A running command, which is told when its work begins: this decides the exit status of an error."""

    status = NOTHING_STARTED
    after_interrupt = ""  # what to add to the line about Ctrl-C

    def started(self) -> None:
        self.status = NOT_COMPLETED


@contextmanager
def one_line_errors(less_memory: str = "") -> Iterator[Command]:
    """Turns what the user can mend (InputError, OSError) and Ctrl-C into one line on stderr and SystemExit.

    Workers that died are treated likewise, and so is running out of memory, where `less_memory` says what helps. In the
    block, standard output and error escape what they cannot encode and ignore that their reader has ended.
    """
    command = Command()
    with redirect_stdout(Output(sys.stdout)), redirect_stderr(Output(sys.stderr)):
        try:
            yield command
        except (InputError, OSError) as error:
            fail(message(error), command.status)
        except Exception as error:  # the libraries raise types of their own
            if line := diagnosis(error, less_memory):
                fail(line, NOT_COMPLETED)
            raise
        except KeyboardInterrupt:
            print(file=sys.stderr)  # behind the bar
            fail(f"interrupted{command.after_interrupt}", INTERRUPTED)


class Output:
    """A standard stream that escapes what its encoding lacks and is silent once its reader, such as head, has ended."""

    def __init__(self, stream: TextIO):
        self.stream = stream
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> None:
        try:
            self.stream.write(text)
            self.stream.flush()
        except OSError as error:
            if error.errno not in (errno.EPIPE, errno.EINVAL):  # the latter on Windows
                raise
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())


def fail(line: str, status: int) -> NoReturn:
    print(f"{Path(sys.argv[0]).name}: {printable(line)}", file=sys.stderr)
    raise SystemExit(status)


@contextmanager
def noted_signals() -> Iterator[list[int]]:
    """Adds SIGTERM and Ctrl-C to the list, so that the current step can be finished; a second one acts as usual."""
    noted: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        noted.append(number)
        signal.signal(number, before[number])

    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield noted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def end_on_signals() -> None:
    """Makes SIGTERM and SIGHUP end the program as an exception, so that its temporary files are removed."""

    def end(number: int, frame: FrameType | None) -> None:
        signal.signal(number, signal.SIG_IGN)
        sys.exit(128 + number)

    for number in (getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup makes it
            signal.signal(number, end)


def require(packages: Iterable[str], requirements: str) -> None:
    """Raises InputError that says how to install the packages of a file of requirements if one is missing."""
    if missing := [name for name in packages if importlib.util.find_spec(name) is None]:
        raise InputError(f"needs {', '.join(missing)}: bash tools/setup.sh {requirements} installs what is missing")


def parser(description: str | None) -> argparse.ArgumentParser:
    """An argument parser that shows defaults, prints the module's docstring as it is, and errors as one line."""
    return _Parser(description=description, formatter_class=_Formatter, allow_abbrev=False)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        fail(f"{message}; --help lists all options", NOTHING_STARTED)


class _Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)


def add_encoders(parser: argparse.ArgumentParser) -> None:
    """Adds the options that say where the encoders of a small checkpoint are."""
    parser.add_argument("--hiera_path", help="SAM 2's weights, if a small checkpoint's are not found")
    parser.add_argument("--dinov2_path", help="the auxiliary encoder's weights, likewise")
    parser.add_argument("--download", action="store_true", help="download encoders that are not found to weights/")


def add_reading(group: argparse._ActionsContainer) -> None:
    """Adds the options that say how masks are called, how large images may be, and what is white in them."""
    group.add_argument("--mask_suffix", default="", help="of masks called NAME_mask.png: _mask")
    group.add_argument("--mask_prefix", default="", help="of masks called gt_NAME.png: gt_")
    group.add_argument(
        "--max_pixels",
        type=number(),
        default=MAX_PIXELS,
        metavar="N",
        help="of the largest image, for which memory must do",
    )
    add_white(group)


def add_white(group: argparse._ActionsContainer) -> None:
    line = "the value that is white in images of more than 8 bits; default: 65535, or 1 of floats"
    group.add_argument("--white", type=number(float, 1e-6), metavar="N", help=line)


def add_device(group: argparse._ActionsContainer) -> None:
    """Adds the options that say where and how the network computes."""
    group.add_argument("--precision", default="auto", choices=PRECISIONS, help="auto: bf16 if native, else fp32")
    group.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, mps, ... or auto: a GPU if there is one")


def path(text: str) -> Path:
    """An argument type: a path to write to. An empty one, such as an unset shell variable, is not this folder."""
    if not text:
        raise argparse.ArgumentTypeError("is empty")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise argparse.ArgumentTypeError(f"{ascii(text)} is not UTF-8; name another path") from None
    return Path(text)


def number(kind: type = int, minimum: float = 1, maximum: float = ANY, multiple: int = 1) -> Callable[[str], float]:
    """An argument type: an int or float from `minimum` to `maximum` and, for sizes, a multiple of `multiple`."""

    def check(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
        if not minimum <= value <= maximum or (multiple > 1 and value % multiple):
            of = f", a multiple of {multiple}" if multiple > 1 else ""
            bounds = f"of at least {minimum:g}" if maximum == ANY else f"from {minimum:g} to {maximum:g}"
            raise argparse.ArgumentTypeError(f"{text} must be a number {bounds}{of}")
        return value

    return check
