"""Errors as one line, exit statuses, signals, and options, for all commands. Free of torch."""

import argparse
import importlib.util
import inspect
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from unext.errors import InputError, diagnosis, message
from unext.files import printable

NOTHING_STARTED = 2  # exit status: the user's input is invalid
NOT_COMPLETED = 1  # started and not completed
MAX_PIXELS = 250_000_000  # of an image, unless the user allows more
LARGEST = 2**32  # unless another bound is given
PRECISIONS = ("auto", "bf16", "fp16", "fp32")


class Command:
    """Records whether work has started; decides the exit status of an error."""

    status = NOTHING_STARTED
    after_interrupt = ""  # what to add to the line about Ctrl-C

    def started(self) -> None:
        self.status = NOT_COMPLETED


@contextmanager
def one_line_errors(less_memory: str = "") -> Iterator[Command]:
    """Turns what the user can fix (InputError, OSError) and Ctrl-C into one line on stderr and SystemExit.

    Likewise dead workers and lack of memory (`less_memory` is the remedy). A closed pipe (`| head`) ends the command
    silently. From here on, the output escapes characters that its encoding lacks.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a notebook's have no encoding
            stream.reconfigure(errors="backslashreplace", line_buffering=True)
    command = Command()
    try:
        yield command
    except BrokenPipeError:
        for stream in (sys.stdout, sys.stderr):  # otherwise Python flushes again at exit
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        raise SystemExit(command.status) from None
    except (InputError, OSError) as error:
        fail(message(error), command.status)
    except Exception as error:  # the libraries raise types of their own
        if line := diagnosis(error, less_memory):
            fail(line, NOT_COMPLETED)
        raise
    except KeyboardInterrupt:
        print(file=sys.stderr)  # ends the bar's line
        fail(f"interrupted{command.after_interrupt}", 128 + signal.SIGINT)


def fail(line: str, status: int) -> NoReturn:
    """Prints the line, after the command's name, and exits."""
    print(f"{Path(sys.argv[0]).name}: {printable(line)}", file=sys.stderr)
    raise SystemExit(status)


@contextmanager
def noted_signals() -> Iterator[list[int]]:
    """Collects SIGTERM and Ctrl-C in the list, so that the current step can be finished; a second one acts as usual."""
    numbers: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        numbers.append(number)
        signal.signal(number, handlers[number])
        with suppress(OSError):  # there may be no standard error
            os.write(2, b"\nending after this step; a second signal ends at once\n")  # sys.stderr may be in use

    handlers = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield numbers
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def end_on_signals() -> None:
    """Makes SIGTERM and SIGHUP end the program as an exception, so that its temporary files are removed."""
    for number in (getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup makes it
            signal.signal(number, lambda number, frame: sys.exit(128 + number))


def require(packages: Iterable[str], requirements: str) -> None:
    """Raises InputError that says how to install the packages of a file of requirements if one is missing."""
    if missing := [name for name in packages if importlib.util.find_spec(name) is None]:
        raise InputError(f"needs {', '.join(missing)}: bash tools/setup.sh {requirements} installs what is missing")


def parser(description: str | None) -> argparse.ArgumentParser:
    """An argument parser that shows defaults, keeps the lines of the description, and reports errors on one line."""
    return _Parser(description=description, formatter_class=_Formatter, allow_abbrev=False)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        fail(f"{message}; --help lists all options", NOTHING_STARTED)


class _Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)


def add_encoders(parser: argparse.ArgumentParser) -> None:
    """Adds the options that say where the encoders of a small checkpoint are."""
    parser.add_argument("--hiera_path", help="SAM 2's weights, if those of a small checkpoint are not found")
    parser.add_argument("--dinov2_path", help="the auxiliary encoder's weights, likewise")
    parser.add_argument("--download", action="store_true", help="download encoders that are not found to weights/")


def add_network(group: argparse._ActionsContainer, trunks: Iterable[str]) -> None:
    """Adds the options that describe a network: the arguments of SAM2UNeXT that give its shape."""
    group.add_argument("--sam2", default="large", choices=list(trunks), help="size of the trunk")
    group.add_argument("--aux", default="vit_large_patch14_dinov2", help="auxiliary encoder: a timm model, or none")
    group.add_argument("--aux_size", type=number(), default=448, help="side of the auxiliary encoder's input, px")
    group.add_argument("--size", type=number(multiple=32, minimum=32), default=1024, help="side of the input, px")


def add_reading(group: argparse._ActionsContainer) -> None:
    """Adds the options that say how masks are named, how large images may be, and what is white in them."""
    group.add_argument("--mask_suffix", default="", help="of masks called NAME_mask.png: _mask")
    group.add_argument("--mask_prefix", default="", help="of masks called gt_NAME.png: gt_")
    add_pixels(group)


def add_pixels(group: argparse._ActionsContainer) -> None:
    """Adds the options that say how large images may be, and what is white in them."""
    group.add_argument("--max_pixels", type=number(), default=MAX_PIXELS, help="largest image to read, in pixels")
    line = "the value that is white in images of more than 8 bits; default: 65535, or 1 of floats"
    group.add_argument("--white", type=number(float, 1e-6), metavar="N", help=line)


def add_device(group: argparse._ActionsContainer) -> None:
    """Adds the options that say where and how the network computes."""
    group.add_argument("--precision", default="auto", choices=PRECISIONS, help="auto: bf16 if native, else fp32")
    group.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, mps, ... or auto: a GPU if there is one")


def options_of(function: Callable, args: argparse.Namespace) -> dict[str, Any]:
    """The options that are arguments of a function too, by name."""
    return {name: getattr(args, name) for name in inspect.signature(function).parameters if name in args}


def path(text: str) -> Path:
    """An argument type: a path to write to. Path("") of an unset shell variable would be the current folder."""
    if not text:
        raise argparse.ArgumentTypeError("is empty")
    if text.encode(errors="replace").decode() != text:
        raise argparse.ArgumentTypeError(f"{ascii(text)} is not UTF-8; name another path")
    return Path(text)


def number(kind: type = int, minimum: float = 1, maximum: float = LARGEST, multiple: int = 1) -> Callable[[str], float]:
    """An argument type: an int or float from `minimum` to `maximum`, and a multiple of `multiple`."""

    def check(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
        if not minimum <= value <= maximum or (multiple > 1 and value % multiple):
            of = f", a multiple of {multiple}" if multiple > 1 else ""
            bounds = f"of at least {minimum:g}" if maximum == LARGEST else f"from {minimum:g} to {maximum:g}"
            raise argparse.ArgumentTypeError(f"{text} must be a number {bounds}{of}")
        return value

    return check


def size(text: str) -> tuple[int, int]:
    """An argument type: (width, height) in pixels, given as WIDTHxHEIGHT."""
    width, _, height = text.partition("x")
    if not (width.isdecimal() and height.isdecimal() and 0 < int(width) * int(height) <= MAX_PIXELS):
        raise argparse.ArgumentTypeError(f"{text!r} is not WIDTHxHEIGHT in pixels, such as 2000x2000")
    return int(width), int(height)
