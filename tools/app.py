"""Serves a page on which to try a trained SAM2-UNeXT: drop an image, see and download map, mask, overlay and cutout.

    python tools/app.py runs/mine/SAM2-UNeXT-20.pth
    python tools/app.py runs/mine/SAM2-UNeXT-20.pth --host 0.0.0.0 --port 8000      for other machines too

The page is for this machine alone unless --host says otherwise. Images are processed as test.py does it, one at a
time, and an upload stays on the disk for seconds only. Ctrl-C ends it.
"""

import argparse
import base64
import errno
import html
import os
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from SAM2UNeXT import SAM2UNeXT, stretch
from unext import cli, files, output, weights

if TYPE_CHECKING:
    import gradio

THRESHOLD = 0.5
EXAMPLES = ROOT / "demo/data/test/Image"
LARGEST_UPLOAD = "200mb"
KEPT = 10  # seconds that an upload stays on the disk, at least; the page reads it at once
WAITING = 20  # images that may wait for their turn
NOTES = {
    "map": "white where the network is most certain",
    "mask": "the map cut at the threshold",
    "overlay": "the object tinted",
    "cutout": "the object on a transparent background",
}
CSS = """
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(240px, 100%), 1fr)); gap: 16px; }
.cards figure { margin: 0; }
.cards img { width: 100%; border-radius: 8px; }
.cards img[alt=cutout] { background: repeating-conic-gradient(#ddd 0 25%, #fff 0 50%) 0 / 20px 20px; }
.cards figcaption { display: flex; align-items: baseline; justify-content: space-between; gap: 8px; padding: 4px 2px; }
"""


class Picture(NamedTuple):
    """An image that a visitor chose."""

    name: str
    image: Image.Image


class Answer(NamedTuple):
    """What the network made of it."""

    picture: Picture
    grey: np.ndarray  # the map, uint8 (H, W)


@dataclass
class Visit:
    """What the page remembers of a visitor, until an hour after the visit."""

    choice: object = None  # a new one for each image, set before the image is read
    picture: Picture | None = None
    answer: Answer | None = None  # shown only if it belongs to `picture`


def read(path: Path) -> tuple[Picture | None, str]:
    """The image in a file, or a sentence that says why it cannot be read."""
    try:
        return Picture(path.stem, files.read_image(path, upright=True)), ""
    except OSError as error:
        return None, str(error).removeprefix(str(path.parent) + os.sep)


def card(answer: Answer, kind: str, threshold: float) -> str:
    """A figure with one of output.KINDS and a link that downloads it, without any file."""
    suffix = output.KINDS[kind]
    content = base64.b64encode(output.render(kind, answer.grey, answer.picture.image, threshold)).decode()
    name = html.escape(answer.picture.name + ("" if kind == "map" else f"-{kind}") + suffix)
    source = f"data:image/{'jpeg' if suffix == '.jpg' else 'png'};base64,{content}"
    link = f"""<a href="#" download="{name}" onclick="this.href = this.closest('figure').querySelector('img').src">"""
    caption = f"<span><b>{kind.capitalize()}</b>: {NOTES[kind]}</span>{link}Download</a>"
    return f'<figure id="{kind}"><img src="{source}" alt="{kind}"><figcaption>{caption}</figcaption></figure>'


def cards(answer: Answer | None, kinds: Sequence[str], threshold: float = THRESHOLD) -> str:
    """HTML of several kinds, or a sentence if memory runs out; nothing before there is an answer."""
    if answer is None:
        return ""
    try:
        return f'<div class="cards">{"".join(card(answer, kind, threshold) for kind in kinds)}</div>'
    except Exception as error:  # OpenCV has a class of its own
        return sentence(error)


def sentence(error: Exception) -> str:
    """What the page says if memory ran out; any other error is a bug and raised."""
    line = cli.diagnosis(f"{type(error).__name__}: {error}", "try a smaller image")
    if not line:
        raise error
    return line


def respond(model: SAM2UNeXT, picture: Picture) -> tuple[Answer | None, str, str]:
    """The answer to an image, what the page says about it, and the cards that need no threshold.

    The map is that of test.py. Without memory there is no answer, only a sentence.
    """
    start = time.perf_counter()
    try:
        answer = Answer(picture, stretch(torch.from_numpy(model.predict(picture.image))).numpy())
    except (RuntimeError, MemoryError) as error:
        return None, sentence(error), ""
    height, width = answer.grey.shape
    line = f"{width} × {height} pixels in {time.perf_counter() - start:.2f} seconds"
    return answer, line, cards(answer, ("map", "cutout"))


class Handlers:
    """What the page does on its events: each changes a visit and returns what to show, (line, cut, whole) or a part.

    Those that choose an image also return the visit: gradio expires only what an event has returned.
    """

    def __init__(self, model: SAM2UNeXT, examples: Sequence[Path]):
        self.model = model
        self.examples = examples
        self.turn = threading.Lock()  # gradio's own limit does not count an event whose visitor has left

    def upload(self, path: Path | None, visit: Visit) -> tuple[Visit, str, str, str]:
        """Reads the image, unless the field was emptied meanwhile or another image was chosen."""
        self.clear(visit)
        choice = visit.choice
        picture, line = read(path) if path else (None, "")
        if visit.choice is not choice:
            return visit, "", "", ""
        visit.picture = picture
        return visit, line, "", ""

    def example(self, index: int, visit: Visit) -> tuple[None, Visit, str, str, str]:
        return None, *self.upload(self.examples[index], visit)  # empties the field of uploads

    def clear(self, visit: Visit) -> tuple[Visit, str, str, str]:
        visit.choice, visit.picture, visit.answer = object(), None, None
        return visit, "", "", ""

    def process(self, visit: Visit) -> tuple[str, str] | dict:
        """Finds the object; shows nothing if the visitor has chosen another image meanwhile, or none."""
        import gradio

        with self.turn:
            picture = visit.picture
            if picture is None or (visit.answer and visit.answer.picture is picture):
                return gradio.skip()
            answer, line, whole = respond(self.model, picture)
        if visit.picture is not picture:
            return gradio.skip()
        visit.answer = answer
        return line, whole

    def cut(self, visit: Visit, threshold: float) -> str:
        answer = visit.answer
        shown = cards(answer, ("overlay", "mask"), threshold)
        return shown if answer and answer.picture is visit.picture else ""


def build_page(handlers: Handlers, title: str) -> "gradio.Blocks":
    """The page, on which one image is processed at a time."""
    import gradio

    with gradio.Blocks(title=title, delete_cache=(KEPT, KEPT)) as page:
        gradio.Markdown(f"# SAM2-UNeXT\nDrop, paste or choose an image to find the object in it. {html.escape(title)}.")
        visit = gradio.State(Visit())  # each visitor gets a copy
        with gradio.Row():
            with gradio.Column(scale=1):
                upload = gradio.Image(sources=["upload", "clipboard"], label="Image", height=280, elem_id="upload")
                upload.preprocess = lambda file: file and Path(file.path)  # its own would fail on what is no image
                threshold = gradio.Slider(0, 1, THRESHOLD, step=0.01, label="Threshold", elem_id="threshold")
                threshold.preprocess = lambda value: THRESHOLD if value is None else value  # the field may be empty
                line = gradio.Markdown(elem_id="line")
                samples = [[str(path)] for path in handlers.examples]
                gallery = gradio.Dataset(
                    label="Examples", components=["image"], samples=samples, type="index", visible=bool(samples)
                )
            with gradio.Column(scale=2):
                cut, whole = gradio.HTML(elem_id="cut"), gradio.HTML(elem_id="whole")
        quick = {"queue": False, "trigger_mode": "always_last", "show_progress": "hidden"}
        chosen = upload.upload(handlers.upload, [upload, visit], [visit, line, cut, whole], **quick)
        clicked = gallery.click(handlers.example, [gallery, visit], [upload, visit, line, cut, whole], **quick)
        for event in (chosen, clicked):
            done = event.then(
                handlers.process, visit, [line, whole], concurrency_id="network", trigger_mode="always_last"
            )
            done.then(handlers.cut, [visit, threshold], cut, **quick)
        upload.clear(handlers.clear, visit, [visit, line, cut, whole], **quick)
        threshold.change(handlers.cut, [visit, threshold], cut, **quick)
    return page.queue(default_concurrency_limit=1, max_size=WAITING)


def check_address(host: str, port: int) -> None:
    """Raises ValueError or OSError that names the option if the page cannot be served there."""
    if ":" in host:
        raise ValueError(f"--host {files.shown(host)}: gradio takes no IPv6 address; give a name or 0.0.0.0")
    try:
        socket.create_server((host, port)).close()
    except OSError as error:
        if isinstance(error, socket.gaierror) or error.errno == errno.EADDRNOTAVAIL:
            raise OSError(
                f"--host {files.shown(host)}: is no address of this machine; 0.0.0.0 is all of them"
            ) from error
        raise OSError(f"--port {port}: is in use or not allowed on {host}; give another one") from error


def main(args: argparse.Namespace) -> None:
    cli.end_on_signals()
    with ExitStack() as held, cli.exit_on_error(cli.NOTHING_STARTED, "--precision bf16 needs less"):
        cli.require(["gradio"], "requirements-app.txt")
        check_address(args.host, args.port)
        device = cli.device(args.device)
        cli.keep_freed_memory(device)
        precision = cli.precision(args.precision, device)
        paths = args.checkpoint, args.hiera_path, args.dinov2_path
        model = SAM2UNeXT.from_checkpoint(*paths, precision=precision, download=args.download).to(device)
        folder = held.enter_context(tempfile.TemporaryDirectory())
        tempfile.tempdir = folder  # where gradio collects an upload, perhaps never completed
        os.environ |= {"GRADIO_TEMP_DIR": folder, "GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_RUN_HISTORY": "False"}
        import gradio

        title = f"{files.shown(args.checkpoint.name)} on {device}"
        page = build_page(Handlers(model, sorted(EXAMPLES.glob("*.jpg"))[:6]), title)
        held.callback(page.close, verbose=False)
        try:
            _, address, _ = page.launch(
                server_name=args.host, server_port=args.port, share=False, prevent_thread_lock=True, quiet=True,
                css=CSS, theme=gradio.themes.Default(font="sans-serif", font_mono="monospace"), footer_links=[],
                max_file_size=LARGEST_UPLOAD, ssr_mode=False,
            )  # fmt: skip
        except Exception as error:  # gradio opens the page once itself, and httpx has errors of many classes
            remedy = "with a proxy, set NO_PROXY=localhost,127.0.0.1"
            raise ValueError(f"the page does not open ({weights.reason(error)}); {remedy}") from error
        print(f"{address} shows {title}; Ctrl-C ends it", flush=True)
        threading.Event().wait()


def get_args_parser() -> argparse.ArgumentParser:
    parser = cli.parser(__doc__)
    parser.add_argument("checkpoint", type=Path, help="SAM2-UNeXT-<epoch>.pth, of this program or the original")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 for other machines too")
    parser.add_argument("--port", type=cli.number(least=1, most=65535), default=7860, help="of the page")
    parser.add_argument("--precision", default="auto", choices=cli.PRECISIONS, help="auto: bf16 if native, else fp32")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, ... or auto")
    cli.add_encoders(parser)
    return parser


if __name__ == "__main__":
    main(get_args_parser().parse_args())
