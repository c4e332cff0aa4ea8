"""Serves a page to try a trained SAM2-UNeXT: drop an image, see and download its map, mask, overlay and cutout. The
cutout can be cropped and put on a colour.

    python tools/app.py runs/mine/SAM2-UNeXT-20.pth
    python tools/app.py runs/mine/SAM2-UNeXT-20.pth --examples images/       offers some of your images
    python tools/app.py runs/mine/SAM2-UNeXT-20.pth --host 0.0.0.0           for other machines too

Images are processed as by test.py, one at a time. Uploads and results are deleted after minutes. Ctrl-C ends it.
"""

import argparse
import os
import sys
import tempfile
import threading
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from SAM2UNeXT import SAM2UNeXT, stretch
from unext import cli, device, pairing
from unext.cutout import composite, crop, plain_background
from unext.errors import diagnosis
from unext.images import configure_reading, in_srgb, read_photo
from unext.output import KINDS, Prediction
from unext.pairing import File

if TYPE_CHECKING:
    import gradio

MAX_EXAMPLES = 12
MAX_UPLOAD = "200mb"
LIFETIME = 300  # seconds until files and predictions are deleted


def predict(model: SAM2UNeXT, path: str) -> Prediction:
    """The prediction for an image file, in sRGB. Raises OSError that names it, and what lack of memory raises."""
    image = in_srgb(read_photo(path))
    probability = model.predict(image)
    return Prediction(stretch(torch.from_numpy(probability)).numpy(), probability, image)


def overlay_and_mask(prediction: Prediction | None, threshold: float | None) -> list[Image.Image | np.ndarray | None]:
    """Overlay and mask; None without a prediction, or while the field of the threshold is empty."""
    if prediction is None or threshold is None:
        return [None, None]
    return [KINDS[kind].render(prediction, argparse.Namespace(threshold=threshold)) for kind in ("overlay", "mask")]


def cutout(prediction: Prediction | None, cropped: bool, filled: bool, colour: str | None) -> Image.Image | None:
    """The cutout, cropped and on a background of the colour if asked for; None without a prediction."""
    if prediction is None:
        return None
    shown = crop(prediction.cutout, 0 if cropped else None)
    if filled:
        with suppress(ValueError):  # it is still being typed
            shown = composite(shown, plain_background(colour or ""))
    return shown


def build_page(model: SAM2UNeXT, title: str, examples: list[File]) -> "gradio.Blocks":
    """The page; whatever the number of visitors, one image is in the network at a time."""
    import gradio

    def show(path: str | None) -> tuple[Prediction | None, np.ndarray | None]:
        """The prediction for an uploaded file, and its map."""
        try:
            if path:
                prediction = predict(model, path)
                return prediction, prediction.grey
        except (OSError, RuntimeError, MemoryError) as error:
            line = diagnosis(error, "try a smaller image") or str(error)
            gradio.Warning(line.rpartition(os.sep)[2])  # without the folder
        return None, None

    with gradio.Blocks(title=title, delete_cache=(60, LIFETIME)) as page:
        gradio.Markdown(f"# SAM2-UNeXT\n{title}. Drop, paste or choose an image to find the object in it.")
        prediction = gradio.State(time_to_live=LIFETIME)
        with gradio.Row():
            with gradio.Column(scale=1):
                upload = gradio.Image(
                    label="Image", type="filepath", image_mode=None, sources=["upload", "clipboard"], elem_id="upload"
                )
                upload.preprocess = lambda file: file and file.path  # gradio's fails on what is no image
                threshold = gradio.Slider(0, 1, 0.5, step=0.01, label="Threshold", elem_id="threshold")
                cropped = gradio.Checkbox(label="Crop the cutout", elem_id="crop")
                filled = gradio.Checkbox(label="Put it on a background", elem_id="filled")
                colour = gradio.ColorPicker("#ffffff", label="Background", elem_id="background")
                if examples:
                    gradio.Examples([[str(path)] for path in examples], upload, cache_examples=False)
            with gradio.Column(scale=2):
                shown = {}
                for row in (("overlay", "mask"), ("cutout", "map")):
                    with gradio.Row():
                        for kind in row:
                            shown[kind] = gradio.Image(
                                label=kind.capitalize(), interactive=False, elem_id=kind, image_mode=None,
                                format=KINDS[kind].extension.removeprefix(".").replace("jpg", "jpeg"),
                                buttons=["download", "fullscreen"],
                            )  # fmt: skip
        masks = [shown["overlay"], shown["mask"]]
        update_mask = {"fn": overlay_and_mask, "inputs": [prediction, threshold], "outputs": masks}
        update_cutout = {"fn": cutout, "inputs": [prediction, cropped, filled, colour], "outputs": shown["cutout"]}
        event = upload.change(show, upload, [prediction, shown["map"]], concurrency_limit=1, trigger_mode="always_last")
        event.then(**update_mask)
        event.then(**update_cutout)
        threshold.change(**update_mask, trigger_mode="always_last", show_progress="hidden")
        for control in (cropped, filled, colour):
            control.change(**update_cutout, trigger_mode="always_last", show_progress="hidden")
    return page


def main(args: argparse.Namespace) -> None:
    cli.end_on_signals()
    with cli.one_line_errors("--precision bf16 needs less"), ExitStack() as stack:
        cli.require(["gradio"], "requirements-app.txt")
        precision = device.start(args)
        configure_reading(cli.MAX_PIXELS, args.white)
        examples = pairing.images_in(args.examples)[:MAX_EXAMPLES] if args.examples else []
        paths = args.checkpoint, args.hiera_path, args.dinov2_path
        model = SAM2UNeXT.from_checkpoint(*paths, precision=precision, download=args.download).to(args.device)
        tempfile.tempdir = stack.enter_context(tempfile.TemporaryDirectory())  # where uploads are collected
        os.environ |= {"GRADIO_TEMP_DIR": tempfile.tempdir, "GRADIO_ANALYTICS_ENABLED": "False"}
        os.environ["NO_PROXY"] = f"{os.environ.get('NO_PROXY', '')},localhost,127.0.0.1"  # gradio opens the page itself
        page = build_page(model, f"{args.checkpoint.name} on {args.device}", examples)
        stack.callback(page.close, verbose=False)
        try:
            _, address, _ = page.launch(
                server_name=args.host, server_port=args.port, share=False, prevent_thread_lock=True, quiet=True,
                show_error=True, footer_links=[], max_file_size=MAX_UPLOAD, ssr_mode=False,
            )  # fmt: skip
        except OSError as error:
            raise OSError(f"--host {args.host} --port {args.port}: no page can be served there; give others") from error
        print(f"{address} shows {args.checkpoint.name} on {args.device}; Ctrl-C ends it", flush=True)
        threading.Event().wait()


def get_args_parser() -> argparse.ArgumentParser:
    parser = cli.parser(__doc__)
    parser.add_argument("checkpoint", type=Path, help="SAM2-UNeXT-<epoch>.pth, of this program or the original")
    parser.add_argument("--examples", metavar="DIR", help="a folder, whose first images are offered")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 for other machines too")
    parser.add_argument("--port", type=cli.number(maximum=65535), default=7860, help="of the page")
    cli.add_white(parser)
    cli.add_device(parser)
    cli.add_encoders(parser)
    return parser


if __name__ == "__main__":
    main(get_args_parser().parse_args())
