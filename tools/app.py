"""Serves a page on which to try a trained SAM2-UNeXT: drop an image, see and download map, mask, overlay and cutout.

    python tools/app.py runs/mine/SAM2-UNeXT-20.pth
    python tools/app.py runs/mine/SAM2-UNeXT-20.pth --host 0.0.0.0 --port 8000      for other machines too

The page is for this machine alone unless --host, or gradio's own GRADIO_SHARE, says otherwise. Images are processed as
test.py does it, and removed from the disk afterwards. Ctrl-C ends it.
"""

import argparse
import base64
import html
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import cli
import files
import output
from SAM2UNeXT import SAM2UNeXT, stretch

if TYPE_CHECKING:
    import gradio

THRESHOLD = 0.5
EXAMPLES = ROOT / "demo/data/test/Image"
LARGEST_UPLOAD = "200mb"
ABANDONED = 60  # seconds after which an upload is removed, even one that still waits
NOTES = {
    "map": "white where the network is most certain",
    "mask": "the map cut at the threshold",
    "overlay": "the object tinted",
    "cutout": "the object on transparent ground",
}
CSS = """
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(240px, 100%), 1fr)); gap: 16px; }
.cards figure { margin: 0; }
.cards img { width: 100%; border-radius: 8px; }
.cards img[alt=cutout] { background: repeating-conic-gradient(#ddd 0 25%, #fff 0 50%) 0 / 20px 20px; }
.cards figcaption { display: flex; align-items: baseline; justify-content: space-between; gap: 8px; padding: 4px 2px; }
"""


class Answer(NamedTuple):
    """What the network made of an image; kept for an hour, for the threshold."""

    name: str
    image: Image.Image
    grey: np.ndarray  # the map, uint8 (H, W)


def predict(model: SAM2UNeXT, path: Path) -> Answer:
    """The map of an image file. Raises OSError, and RuntimeError or MemoryError if memory runs out."""
    image = files.read_image(path, upright=True)
    return Answer(path.stem, image, stretch(torch.from_numpy(model.predict(image))).numpy())


def card(answer: Answer, kind: str, threshold: float) -> str:
    """A figure with one of output.KINDS and a link that downloads it, without any file."""
    suffix = output.KINDS[kind]
    content = base64.b64encode(output.render(kind, answer.grey, answer.image, threshold)).decode()
    name = html.escape(answer.name + ("" if kind == "map" else f"-{kind}") + suffix)
    source = f"data:image/{'jpeg' if suffix == '.jpg' else 'png'};base64,{content}"
    link = f"""<a href="#" download="{name}" onclick="this.href = this.closest('figure').querySelector('img').src">"""
    caption = f"<span><b>{kind.capitalize()}</b>: {NOTES[kind]}</span>{link}Download</a>"
    return f'<figure id="{kind}"><img src="{source}" alt="{kind}"><figcaption>{caption}</figcaption></figure>'


def cards(answer: Answer | None, kinds: Sequence[str], threshold: float) -> str:
    """HTML of several kinds; nothing before there is an answer."""
    return f'<div class="cards">{"".join(card(answer, kind, threshold) for kind in kinds)}</div>' if answer else ""


def respond(model: SAM2UNeXT, path: Path, threshold: float) -> tuple[Answer | None, str, str, str]:
    """The answer to an image file, what the page says about it, and its cards: (overlay, mask), (map, cutout)."""
    start = time.perf_counter()
    answer = None
    try:
        answer = predict(model, path)
        height, width = answer.grey.shape
        line = f"{width} × {height} pixels in {time.perf_counter() - start:.2f} seconds"
    except OSError as error:
        line = str(error).removeprefix(str(path.parent) + os.sep)
    except (RuntimeError, MemoryError) as error:
        line = cli.diagnosis(f"{type(error).__name__}: {error}", "try a smaller image")
        if not line:
            raise
    return answer, line, cards(answer, ("overlay", "mask"), threshold), cards(answer, ("map", "cutout"), threshold)


def build_page(model: SAM2UNeXT, title: str, examples: Sequence[Path]) -> "gradio.Blocks":
    """The page, which answers one event of a kind at a time; `examples` are image files that it shows."""
    import gradio

    def on_upload(path: Path, threshold: float) -> tuple[Answer | None, str, str, str]:
        try:
            return respond(model, path, threshold)
        finally:
            path.unlink(missing_ok=True)

    def on_example(index: int, threshold: float) -> tuple[Answer | None, str, str, str]:
        return respond(model, examples[index], threshold)

    with gradio.Blocks(title=title, delete_cache=(ABANDONED, ABANDONED)) as page:
        gradio.Markdown(f"# SAM2-UNeXT\nDrop, paste or choose an image to find the object in it. {html.escape(title)}.")
        answer = gradio.State(None, time_to_live=3600)
        with gradio.Row():
            with gradio.Column(scale=1):
                upload = gradio.Image(sources=["upload", "clipboard"], label="Image", height=280, elem_id="upload")
                upload.preprocess = lambda file: file and Path(file.path)  # its own would fail on what is no image
                threshold = gradio.Slider(0, 1, THRESHOLD, step=0.01, label="Threshold", elem_id="threshold")
                line = gradio.Markdown(elem_id="line")
                samples = [[str(path)] for path in examples]
                gallery = gradio.Dataset(
                    label="Examples", components=["image"], samples=samples, type="index", visible=bool(examples)
                )
            with gradio.Column(scale=2):
                cut, whole = gradio.HTML(elem_id="cut"), gradio.HTML(elem_id="whole")
        outputs = [answer, line, cut, whole]
        upload.upload(on_upload, [upload, threshold], outputs)
        upload.clear(lambda: (None, "", "", ""), None, outputs)
        threshold.change(
            lambda answer, threshold: cards(answer, ("overlay", "mask"), threshold), [answer, threshold], cut,
            show_progress="hidden", trigger_mode="always_last",
        )  # fmt: skip
        gallery.click(on_example, [gallery, threshold], outputs)
    return page.queue(default_concurrency_limit=1)


def main(args: argparse.Namespace) -> None:
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # removes the temporary folder
    with cli.exit_on_error(cli.NOTHING_STARTED), tempfile.TemporaryDirectory() as folder:
        cli.require(["gradio"], "requirements-app.txt")
        device = cli.device(args.device)
        cli.keep_freed_memory(device)
        precision = cli.precision(args.precision, device)
        paths = args.checkpoint, args.hiera_path, args.dinov2_path
        model = SAM2UNeXT.from_checkpoint(*paths, precision=precision, download=args.download).to(device)
        os.environ |= {"GRADIO_TEMP_DIR": folder, "GRADIO_ANALYTICS_ENABLED": "False"}
        import gradio

        title = f"{files.shown(args.checkpoint.name)} on {device}"
        page = build_page(model, title, sorted(EXAMPLES.glob("*.jpg"))[:6])
        try:
            _, address, _ = page.launch(
                server_name=args.host, server_port=args.port, prevent_thread_lock=True, quiet=True, css=CSS,
                theme=gradio.themes.Default(font="sans-serif", font_mono="monospace"), footer_links=[],
                max_file_size=LARGEST_UPLOAD, ssr_mode=False,
            )  # fmt: skip
        except OSError as error:
            raise OSError(f"--port {args.port}: is in use or not allowed on {args.host}; give another one") from error
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
