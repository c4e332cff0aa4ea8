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
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from SAM2UNeXT import SAM2UNeXT, stretch
from unext import cli, device, output, pairing
from unext.cutout import plain_background
from unext.images import configure_reading, on_white, read_photo
from unext.output import Prediction, Task
from unext.pairing import File

KINDS = ("cutout", "overlay", "mask", "map")  # on a background, a cutout is a composite
MAX_EXAMPLES = 12
MAX_UPLOAD = "200mb"
LIFETIME = 300  # seconds until uploads, and what a closed page had, are deleted
ONE_AT_A_TIME = threading.Lock()  # images in the network, whatever the number of visitors


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


class Visitor:
    """The images of an open page and their files, in a new folder, which `forget` deletes."""

    def __init__(self, model: SAM2UNeXT, parent: str):
        self.model = model
        self.folder = tempfile.TemporaryDirectory(dir=parent, ignore_cleanup_errors=True)
        self.images: dict[str, Path] = {}  # by the path of the thumbnail
        self.thumbnails: dict[str, str] = {}  # by upload
        self.lock = threading.Lock()  # of both
        self.results: list[Path] = []  # files that the browser may still fetch

    def new_folder(self) -> Path:
        return Path(tempfile.mkdtemp(dir=self.folder.name))

    def keep(self, paths: Sequence[str]) -> None:
        """Forgets the images of which neither upload nor thumbnail is among the paths."""
        paths = {*paths, *(self.thumbnails.get(path) for path in paths)}
        self.images = {thumbnail: path for thumbnail, path in self.images.items() if thumbnail in paths}

    def add(self, upload: str) -> str:
        """Predicts an image and keeps it, under a name that no other has; once. Returns the path of its thumbnail."""
        if self.thumbnails.get(upload) in self.images:
            return self.thumbnails[upload]
        folder, (stem, extension) = self.new_folder(), os.path.splitext(os.path.basename(upload))
        while stem in {path.stem for path in self.images.values()}:
            stem += "_"
        path = Path(shutil.copy(upload, folder / f"{stem}{extension}"))
        thumbnail = on_white(predict(self.model, path).image).copy()  # of TIFF and HEIC, too
        thumbnail.thumbnail((400, 400))
        thumbnail.save(folder / "thumbnail.jpg")
        self.thumbnails[upload] = str(folder / "thumbnail.jpg")
        self.images[self.thumbnails[upload]] = path
        return self.thumbnails[upload]

    def show(self, thumbnail: str, kind: str, settings: Sequence) -> tuple[Path, Path]:
        """Writes what the slider compares: the image, framed as its cutout, and the result."""
        path, args = self.images[thumbnail], options(*settings)
        prediction = predict(self.model, path, args.largest)
        [(name, content)] = files_of(prediction, path, [kind], args).items()
        image = prediction.image
        if kind == "cutout":
            image = output.framed(image.convert("RGBA"), prediction.cutout, args)
        folder = self.new_folder()
        (folder / "image.jpg").write_bytes(output.encode(on_white(image), ".jpg", prediction.image.info))
        (folder / name).write_bytes(content)
        self.results += folder / "image.jpg", folder / name
        while len(self.results) > 6:
            with suppress(OSError):
                self.results.pop(0).unlink()
        return folder / "image.jpg", folder / name

    def pack(self, kinds: Sequence[str], settings: Sequence, progress: Callable) -> Path:
        """Writes a zip of the files of all images; `progress` is called as tqdm is."""
        path, args = self.new_folder() / "sam2unext.zip", options(*settings)
        with zipfile.ZipFile(path, "w") as file:
            for image in progress([*self.images.values()], unit="images"):
                for name, content in files_of(predict(self.model, image, args.largest), image, kinds, args).items():
                    file.writestr(name, content)
        return path

    def forget(self) -> None:
        predict.cache_clear()
        self.folder.cleanup()


def main(args: argparse.Namespace) -> None:
    cli.end_on_signals()
    with cli.one_line_errors("--precision bf16 needs less"), ExitStack() as stack:
        cli.require(["gradio"], "requirements-app.txt")
        precision = device.start(args)
        configure_reading(args.max_pixels, args.white)
        examples = pairing.images_in(args.examples)[:MAX_EXAMPLES] if args.examples else []
        paths = args.checkpoint, args.hiera_path, args.dinov2_path
        model = SAM2UNeXT.from_checkpoint(*paths, precision=precision, download=args.download).to(args.device)
        tempfile.tempdir = stack.enter_context(tempfile.TemporaryDirectory())  # where uploads are collected
        os.environ |= {"GRADIO_TEMP_DIR": tempfile.tempdir, "GRADIO_ANALYTICS_ENABLED": "False"}
        for name in ("NO_PROXY", "no_proxy"):  # gradio opens the page itself; the latter would win
            os.environ[name] = f"{os.environ.get(name, '')},localhost,127.0.0.1"
        from tools.page import CSS, Page  # gradio is optional, and reads the environment

        title = f"{args.checkpoint.name} on {args.device}"
        page = Page(partial(Visitor, model), KINDS, LIFETIME).build(title, examples)
        stack.callback(page.close, verbose=False)
        try:
            _, address, _ = page.launch(
                server_name=args.host, server_port=args.port, share=False, prevent_thread_lock=True, quiet=True,
                show_error=True, footer_links=[], max_file_size=MAX_UPLOAD, ssr_mode=False, css=CSS,
            )  # fmt: skip
        except OSError as error:
            raise OSError(f"--host {args.host} --port {args.port}: no page can be served there; give others") from error
        print(f"{address} shows {title}; Ctrl-C ends it", flush=True)
        threading.Event().wait()


def get_args_parser() -> argparse.ArgumentParser:
    parser = cli.parser(__doc__)
    parser.add_argument("checkpoint", type=Path, help="SAM2-UNeXT-<epoch>.pth, of this program or the original")
    parser.add_argument("--examples", metavar="DIR", help="a folder, whose first images are offered")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 for other machines too")
    parser.add_argument("--port", type=cli.number(maximum=65535), default=7860, help="of the page")
    cli.add_pixels(parser)
    cli.add_device(parser)
    cli.add_encoders(parser)
    return parser


if __name__ == "__main__":
    main(get_args_parser().parse_args())
