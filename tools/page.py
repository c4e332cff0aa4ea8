"""The page of app.py, made with gradio: its components, and what happens at each event.

gradio calls the methods below `add_events`. It fills in parameters that are annotated as a request or an event, or that
have a Progress as default; the others are the values of components.
"""

import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import cv2
import gradio

from unext.errors import InputError, diagnosis
from unext.pairing import File

if TYPE_CHECKING:
    from tools.app import Visitor

GALLERY = {"fit_columns": False, "object_fit": "contain", "allow_preview": False, "buttons": []}
PROGRESS = gradio.Progress()
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


class Page:
    """The page and its visitors. A visitor's files are deleted `lifetime` seconds after the page was closed."""

    def __init__(self, new_visitor: Callable[[str], "Visitor"], kinds: Sequence[str], lifetime: int):
        self.new_visitor, self.kinds, self.lifetime = new_visitor, kinds, lifetime
        self.folder = tempfile.mkdtemp()
        gradio.set_static_paths(self.folder)  # gradio deletes other files, while the page is open
        self.visitors: dict[str, Visitor] = {}  # by session
        self.closed: set[str] = set()  # sessions whose connection has ended

    def build(self, title: str, examples: Sequence[File]) -> gradio.Blocks:
        """Lays out the components. On a phone, the columns follow each other."""
        self.examples = [shutil.copy(path, tempfile.mkdtemp(dir=self.folder)) for path in examples]
        with gradio.Blocks(title=title, delete_cache=(min(60, self.lifetime), self.lifetime)) as page:
            gradio.Markdown(f"# SAM2-UNeXT\n{title}. Add images to find the object in each.")
            with gradio.Row():
                with gradio.Column(scale=2, min_width=260):
                    self.images = gradio.Gallery(
                        label="Images", show_label=False, file_types=["image"], sources=["upload", "clipboard"],
                        height=200, elem_id="images", **GALLERY,
                    )  # fmt: skip
                with gradio.Column(scale=4, min_width=320):
                    self.add_result()
                with gradio.Column(scale=2, min_width=260):
                    self.add_settings()
                    self.add_zip()
                    self.offered = gradio.Gallery(
                        self.examples, label="Examples", interactive=False, visible=bool(examples),
                        elem_id="examples", **GALLERY,
                    )  # fmt: skip
            self.add_events()
            page.unload(self.leave)
        return page

    def add_result(self) -> None:
        self.shown, self.kind = gradio.State(""), gradio.State(self.kinds[0])  # a thumbnail's path, a kind
        with gradio.Tabs():
            self.tabs = [gradio.Tab(kind.capitalize()) for kind in self.kinds]
        self.compare = gradio.ImageSlider(
            label="Image and result", show_label=False, interactive=False, buttons=["fullscreen"], elem_id="compare"
        )
        self.download = gradio.DownloadButton("Download", interactive=False, elem_id="download")

    def add_settings(self) -> None:
        canvases = ["None", "1000x1000", "2000x2000"]
        self.settings = [  # the arguments of app.options
            gradio.Slider(0, 1, 0.5, label="Threshold of mask and overlay", elem_id="threshold"),
            gradio.Checkbox(label="Keep the largest region of the mask alone", elem_id="largest"),
            gradio.Checkbox(label="Crop the cutout to the object", elem_id="crop"),
            gradio.Dropdown(canvases, label="Canvas of the cutout, px", allow_custom_value=True, elem_id="canvas"),
            gradio.Checkbox(label="Put the cutout on a background", elem_id="filled"),
            gradio.ColorPicker("#ffffff", label="Background of the cutout", elem_id="background"),
        ]

    def add_zip(self) -> None:
        kinds = [*self.kinds]
        self.packed_kinds = gradio.CheckboxGroup(kinds, value=kinds[:1], label="Kinds in the zip", elem_id="kinds")
        self.button = gradio.Button("Make a zip of all images", elem_id="pack")
        self.zip = gradio.File(show_label=False, interactive=False, visible=False, elem_id="zip")

    def add_events(self) -> None:
        common = {"trigger_mode": "always_last", "concurrency_limit": None, "show_progress_on": self.compare}
        images = [self.images, self.shown]
        gradio.on(self.images.change, self.receive, images, [*images, self.zip], **common)
        gradio.on(self.offered.select, self.receive_example, images, [*images, self.zip], **common)
        gradio.on(self.images.select, self.choose_image, self.images, images, **common)
        gradio.on([tab.select for tab in self.tabs], self.choose_kind, None, self.kind, **common)
        controls = [self.shown, self.kind, *self.settings]
        results = [self.compare, self.download, self.zip]
        gradio.on([control.change for control in controls], self.show, controls, results, **common)
        self.button.click(self.pack, [self.packed_kinds, *self.settings], self.zip, concurrency_limit=None)

    def receive(
        self,
        request: gradio.Request,
        progress: gradio.Progress = PROGRESS,
        gallery: list | None = None,
        shown: str = "",
    ) -> Sequence:
        """Adds and removes images as the gallery says. Returns its thumbnails, the one to show, and no zip.

        gradio calls this twice for an upload, at the same time: a gallery may have an upload that was added already.
        """
        visitor, paths = self.visitor(request), [path for path, _ in gallery or ()]
        with visitor.lock:
            visitor.keep(paths)
            uploads = [path for path in paths if path not in visitor.images]
            for upload in progress.tqdm(uploads, unit="images"):
                with errors_shown():
                    shown = visitor.add(upload)
            thumbnails = [*visitor.images]
        if shown not in thumbnails:
            shown = thumbnails[0] if thumbnails else ""
        return thumbnails if thumbnails != paths else gradio.skip(), shown, gradio.File(visible=False)

    def receive_example(
        self,
        event: gradio.SelectData,
        request: gradio.Request,
        progress: gradio.Progress = PROGRESS,
        gallery: list | None = None,
        shown: str = "",
    ) -> Sequence:
        return self.receive(request, progress, [*(gallery or ()), (self.examples[event.index], None)], shown)

    def choose_image(self, event: gradio.SelectData, gallery: list) -> Sequence:
        return gradio.Gallery(selected_index=None), gallery[event.index][0]  # a selection would hide its buttons

    def choose_kind(self, event: gradio.SelectData) -> str:
        return event.value.lower()

    def show(self, request: gradio.Request, shown: str, kind: str, *settings) -> Sequence:
        """What the slider compares, the button to download the result, and no zip: its settings may have changed."""
        visitor, no_zip = self.visitor(request), gradio.File(visible=False)
        if shown not in visitor.images:
            if shown and not os.path.exists(shown):
                gradio.Warning("The connection was lost, and your images were deleted. Add them again.")
            return None, gradio.DownloadButton("Download", value=None, interactive=False), no_zip
        with errors_shown():
            image, result = visitor.show(shown, kind, settings)
            button = gradio.DownloadButton(f"Download {result.name}", value=result, interactive=True)
            return (image, result), button, no_zip
        return gradio.skip(), gradio.skip(), no_zip

    def pack(
        self, request: gradio.Request, progress: gradio.Progress = PROGRESS, kinds: Sequence[str] = (), *settings
    ) -> gradio.File:
        """A zip of the files of all images."""
        visitor = self.visitor(request)
        with errors_shown():
            if visitor.images and kinds:
                return gradio.File(str(visitor.pack(kinds, settings, progress.tqdm)), visible=True)
        return gradio.File(visible=False)

    def visitor(self, request: gradio.Request) -> "Visitor":
        session = request.session_hash
        if session not in self.visitors:
            self.visitors[session] = self.new_visitor(self.folder)
            if session in self.closed:  # the page is still open, but gradio will not say when it is closed
                self.leave(request)
        return self.visitors[session]

    def leave(self, request: gradio.Request) -> None:
        """Deletes what a closed page had, minutes later: a phone closes the connection of an open one, too."""
        self.closed.add(request.session_hash)
        timer = threading.Timer(self.lifetime, self.forget, [request.session_hash])
        timer.daemon = True
        timer.start()

    def forget(self, session: str) -> None:
        if visitor := self.visitors.pop(session, None):
            visitor.forget()


@contextmanager
def errors_shown() -> Iterator[None]:
    """Shows what is wrong with an image; other errors are bugs."""
    try:
        yield
    except (InputError, OSError, RuntimeError, MemoryError, cv2.error) as error:
        line = diagnosis(error, "try a smaller image") or str(error)
        gradio.Warning(line.rpartition(os.sep)[2])  # without the folder
