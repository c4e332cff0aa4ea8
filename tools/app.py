"""Serves a page to try a trained SAM2-UNeXT: drop images, compare each with its cutout, overlay, mask and map, and
download these, one by one or as a zip.

    python tools/app.py runs/mine/SAM2-UNeXT-20.pth
    python tools/app.py runs/mine/SAM2-UNeXT-20.pth --examples images/       offers some of your images
    python tools/app.py runs/mine/SAM2-UNeXT-20.pth --host 0.0.0.0           for other machines too

Its files are those of test.py. Images are processed one at a time, kept while the page is open, and deleted minutes
after it was closed. Ctrl-C ends it.
"""

import argparse
import os
import shutil
import sys
import tempfile
import threading
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import cv2
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from SAM2UNeXT import SAM2UNeXT, stretch
from unext import cli, device, output, pairing
from unext.cutout import plain_background
from unext.errors import InputError, diagnosis
from unext.images import configure_reading, on_white, read_photo
from unext.output import Prediction, Task
from unext.pairing import File

if TYPE_CHECKING:
    import gradio

KINDS = ("cutout", "overlay", "mask", "map")  # on a background, a cutout is a composite
MAX_EXAMPLES = 12
MAX_UPLOAD = "200mb"
LIFETIME = 300  # seconds until uploads, and what a closed page had, are deleted
ONE_AT_A_TIME = threading.Lock()  # images in the network, whatever the number of visitors
# The slider is as large as the image; a checkerboard shows where a cutout is transparent.
CSS = """
#compare .slider-wrap > .wrap { width: fit-content; margin: auto }
#compare img:not(.fixed) { width: auto; max-width: 100% }
#compare img.fixed {
  object-fit: fill;
  background: repeating-conic-gradient(#ccc 0 25%, #fff 0 50%) 0 / 20px 20px !important;
}
.grid-container { grid-template-columns: repeat(auto-fill, 80px) !important }
.tabitem { display: none !important }
"""


@dataclass
class Visitor:
    """What is kept while a page is open."""

    folder: Path
    images: dict[str, Path] = field(default_factory=dict)  # by the path of the thumbnail
    thumbnail: str = ""  # of the image that is shown
    kind: str = KINDS[0]  # that is shown


@lru_cache(maxsize=2)
def predict(model: SAM2UNeXT, path: Path, largest: float | None = None) -> Prediction:
    """The prediction of test.py for an image file, or its largest region at a threshold.

    Its probability is kept in a file beside the image. Raises OSError that names it, and what lack of memory raises.
    """
    image, saved = read_photo(path), path.with_name(f"{path.name}.npy")
    if not saved.exists():
        with ONE_AT_A_TIME:
            np.save(saved, model.predict(image))
    probability = np.load(saved)
    prediction = Prediction(stretch(torch.from_numpy(probability)).numpy(), probability, image)
    return prediction if largest is None else output.keep_largest(prediction, largest)


def options(
    threshold: float | None, largest: bool, cropped: bool, canvas: str | None, filled: bool, colour: str | None
) -> argparse.Namespace:
    """The options of test.py that the page's settings stand for; `largest` is the threshold, see `predict`."""
    args = argparse.Namespace(save_path=Path(), format="png", canvas=None, background=None)
    args.threshold = threshold or 0
    args.largest, args.crop = args.threshold if largest else None, 0.0 if cropped else None
    with suppress(argparse.ArgumentTypeError):  # none, or it is still being typed
        args.canvas = cli.size(canvas or "")
    if filled:
        with suppress(ValueError):
            plain_background(colour or "")  # never a file
            args.background = colour
    return args


def files_of(prediction: Prediction, path: Path, kinds: Sequence[str], args: argparse.Namespace) -> dict[str, bytes]:
    """The content of the files of these kinds, as test.py writes them, by the names to save them. Raises InputError."""
    args.save = ["composite" if kind == "cutout" and args.background else kind for kind in kinds]
    contents = output.files_of(prediction, Task(File(path.parent, path.stem, path.suffix), None), args)
    files = zip(args.save, contents.items(), strict=True)
    return {f"{path.stem}_{kind}{file.suffix}": content for kind, (file, content) in files}


def build_page(model: SAM2UNeXT, title: str, examples: list[File]) -> "gradio.Blocks":
    import gradio

    bar, root = gradio.Progress(), tempfile.mkdtemp()
    visitors: dict[str, Visitor] = {}  # by session
    closed: set[str] = set()  # sessions whose connection has ended
    gradio.set_static_paths(root)  # gradio deletes other files after LIFETIME
    copies = [shutil.copy(path, tempfile.mkdtemp(dir=root)) for path in examples]

    @contextmanager
    def errors_shown() -> Iterator[None]:
        try:
            yield
        except (InputError, OSError, RuntimeError, MemoryError, cv2.error) as error:
            line = diagnosis(error, "try a smaller image") or str(error)
            gradio.Warning(line.rpartition(os.sep)[2])  # without the folder

    def add(visitor: Visitor, upload: Path) -> None:
        """Predicts and keeps an image, under a name that no other has."""
        folder, stem = Path(tempfile.mkdtemp(dir=visitor.folder)), upload.stem
        while stem in {path.stem for path in visitor.images.values()}:
            stem += "_"
        path = Path(shutil.copy(upload, folder / f"{stem}{upload.suffix}"))
        thumbnail = on_white(predict(model, path).image).copy()
        thumbnail.thumbnail((400, 400))
        visitor.thumbnail = str(folder / "thumbnail.jpg")
        thumbnail.save(visitor.thumbnail)
        visitor.images[visitor.thumbnail] = path

    def receive(values: dict, request: gradio.Request, progress: gradio.Progress = bar) -> Sequence:
        """Adds and removes images as the gallery says; its images and what is shown."""
        paths = [path for path, _ in values[images] or ()]
        if request.session_hash not in visitors:
            visitors[request.session_hash] = Visitor(Path(tempfile.mkdtemp(dir=root)))
        visitor = visitors[request.session_hash]
        if request.session_hash in closed:  # it is still open, but gradio will not say when it is closed
            leave(request)
        if paths == [*visitor.images]:
            return [gradio.skip()] * 4  # this function itself changed the gallery
        for thumbnail in visitor.images.keys() - {*paths}:
            del visitor.images[thumbnail]
        uploads = [Path(path) for path in paths if path not in visitor.images]
        for number, upload in enumerate(uploads):
            progress((number, len(uploads)), desc=upload.name, unit="images")
            with errors_shown():
                add(visitor, upload)
        if visitor.thumbnail not in visitor.images:
            visitor.thumbnail = next(iter(visitor.images), "")
        return [*visitor.images], *show(values, request)

    def receive_example(
        values: dict, event: gradio.SelectData, request: gradio.Request, progress: gradio.Progress = bar
    ) -> Sequence:
        added = [*(values[images] or ()), (copies[event.index], None)]
        return receive(values | {images: added}, request, progress)

    def choose(values: dict, event: gradio.SelectData, request: gradio.Request) -> Sequence:
        """Shows another image or kind."""
        if visitor := visitors.get(request.session_hash):
            if event.target in tabs:
                visitor.kind = event.value.lower()
            else:
                visitor.thumbnail = [*visitor.images][event.index]
        return gradio.Gallery(selected_index=None), *show(values, request)  # a selection would hide its buttons

    def show(values: dict, request: gradio.Request) -> Sequence:
        """What the slider compares, the button to download the result, and no zip: its settings may have changed."""
        visitor, no_zip = visitors.get(request.session_hash), gradio.File(visible=False)
        if not visitor and values[images]:
            gradio.Warning("The connection was lost, and your images were deleted. Add them again.")
        if not visitor or not visitor.images:
            return None, gradio.DownloadButton("Download", value=None, interactive=False), no_zip
        with errors_shown():
            path, args = visitor.images[visitor.thumbnail], options(*map(values.get, settings))
            prediction = predict(model, path, args.largest)
            [(name, content)] = files_of(prediction, path, [visitor.kind], args).items()
            image = prediction.image
            if visitor.kind == "cutout":
                image = output.framed(image.convert("RGBA"), prediction.cutout, args)
            image = output.encode(on_white(image), ".jpg", prediction.image.info)
            for folder in sorted(path.parent.glob("shown*"), key=os.path.getmtime)[:-2]:  # the last may be in transfer
                shutil.rmtree(folder, ignore_errors=True)
            folder = Path(tempfile.mkdtemp(prefix="shown", dir=path.parent))
            (folder / "image.jpg").write_bytes(image)
            (folder / name).write_bytes(content)
            button = gradio.DownloadButton(f"Download {name}", value=folder / name, interactive=True)
            return (folder / "image.jpg", folder / name), button, no_zip
        return gradio.skip(), gradio.skip(), no_zip

    def pack(values: dict, request: gradio.Request, progress: gradio.Progress = bar) -> gradio.File:
        """A zip of the files of all images."""
        visitor = visitors.get(request.session_hash)
        if not visitor or not visitor.images or not values[kinds]:
            return gradio.File(visible=False)
        path = Path(tempfile.mkdtemp(dir=visitor.folder)) / "sam2unext.zip"
        with errors_shown(), zipfile.ZipFile(path, "w") as file:
            for image in progress.tqdm([*visitor.images.values()], unit="images"):
                args = options(*map(values.get, settings))
                prediction = predict(model, image, args.largest)
                for name, content in files_of(prediction, image, values[kinds], args).items():
                    file.writestr(name, content)
        return gradio.File(str(path), visible=True)

    def leave(request: gradio.Request) -> None:
        """Deletes what a closed page had, minutes later: a phone closes the connection of an open one, too."""
        closed.add(request.session_hash)
        timer = threading.Timer(LIFETIME, forget, [request.session_hash])
        timer.daemon = True
        timer.start()

    def forget(session: str) -> None:
        predict.cache_clear()
        if visitor := visitors.pop(session, None):
            shutil.rmtree(visitor.folder, ignore_errors=True)

    with gradio.Blocks(title=title, delete_cache=(min(60, LIFETIME), LIFETIME)) as page:
        gradio.Markdown(f"# SAM2-UNeXT\n{title}. Add images to find the object in each.")
        with gradio.Row():
            with gradio.Column(scale=2, min_width=260):
                images = gradio.Gallery(
                    label="Images", show_label=False, file_types=["image"], sources=["upload", "clipboard"], height=200,
                    fit_columns=False, object_fit="contain", allow_preview=False, buttons=[], elem_id="images",
                )  # fmt: skip
            with gradio.Column(scale=4, min_width=320):
                with gradio.Tabs():
                    tabs = [gradio.Tab(kind.capitalize()) for kind in KINDS]
                compare = gradio.ImageSlider(
                    label="Image and result", show_label=False, interactive=False, buttons=["fullscreen"],
                    elem_id="compare",
                )  # fmt: skip
                download = gradio.DownloadButton("Download", interactive=False, elem_id="download")
            with gradio.Column(scale=2, min_width=260):
                threshold = gradio.Slider(0, 1, 0.5, label="Threshold of mask and overlay", elem_id="threshold")
                largest = gradio.Checkbox(label="Keep the largest region of the mask alone", elem_id="largest")
                cropped = gradio.Checkbox(label="Crop the cutout to the object", elem_id="crop")
                canvas = gradio.Dropdown(
                    ["None", "1000x1000", "2000x2000"], label="Canvas of the cutout, px", allow_custom_value=True,
                    elem_id="canvas",
                )  # fmt: skip
                filled = gradio.Checkbox(label="Put the cutout on a background", elem_id="filled")
                colour = gradio.ColorPicker("#ffffff", label="Background of the cutout", elem_id="background")
                kinds = gradio.CheckboxGroup([*KINDS], value=[KINDS[0]], label="Kinds in the zip", elem_id="kinds")
                button = gradio.Button("Make a zip of all images", elem_id="pack")
                packed = gradio.File(show_label=False, interactive=False, visible=False, elem_id="zip")
                offered = gradio.Gallery(
                    [(path, None) for path in copies], label="Examples", interactive=False, visible=bool(copies),
                    fit_columns=False, object_fit="contain", allow_preview=False, buttons=[], elem_id="examples",
                )  # fmt: skip
        settings = [threshold, largest, cropped, canvas, filled, colour]
        inputs, results = {images, *settings}, [compare, download, packed]
        common = {"trigger_mode": "always_last", "concurrency_limit": None, "show_progress_on": compare}
        images.change(receive, inputs, [images, *results], **common)
        offered.select(receive_example, inputs, [images, *results], **common)
        gradio.on([images.select, *(tab.select for tab in tabs)], choose, inputs, [images, *results], **common)
        gradio.on([control.change for control in settings], show, inputs, results, **common)
        button.click(pack, {*inputs, kinds}, packed, concurrency_limit=None)
        page.unload(leave)
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
        for name in ("NO_PROXY", "no_proxy"):  # gradio opens the page itself; the latter would win
            os.environ[name] = f"{os.environ.get(name, '')},localhost,127.0.0.1"
        page = build_page(model, f"{args.checkpoint.name} on {args.device}", examples)
        stack.callback(page.close, verbose=False)
        try:
            _, address, _ = page.launch(
                server_name=args.host, server_port=args.port, share=False, prevent_thread_lock=True, quiet=True,
                show_error=True, footer_links=[], max_file_size=MAX_UPLOAD, ssr_mode=False, css=CSS,
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
