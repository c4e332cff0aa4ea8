"""tools/app.py: the page answers as test.py does, explains what it cannot read, and shows no answer too late."""

import re
import shutil
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
from conftest import decoded

from SAM2UNeXT import SAM2UNeXT
from tools import app
from unext import output


def shown(page: str) -> dict[str, np.ndarray]:
    """The images in HTML by kind."""
    return {kind: decoded(source) for source, kind in re.findall(r'<img src="([^"]+)" alt="(\w+)">', page)}


@pytest.fixture
def handlers(micro_model, monkeypatch):
    """The page's handlers without gradio, of which they only need the sign that nothing changes: None here."""
    monkeypatch.setitem(sys.modules, "gradio", SimpleNamespace(skip=lambda: None))
    return app.Handlers(micro_model, [])


def test_an_answer_has_the_files_of_test_py(handlers, toy, expected_files):
    visit = app.Visit()
    assert handlers.upload(toy / "test/Image/toy_0001.jpg", visit) == (visit, "", "", "")
    line, whole = handlers.process(visit)
    height, width = expected_files["map"].shape
    assert re.fullmatch(rf"{width} × {height} pixels in \d+\.\d\d seconds", line)
    cut = handlers.cut(visit, 0.5)
    images = shown(cut) | shown(whole)
    assert images.keys() == output.KINDS.keys()
    for kind, pixels in images.items():
        assert np.array_equal(pixels, expected_files[kind]), kind
    assert re.findall(r'download="([^"]+)"', cut + whole) == [
        "toy_0001-overlay.jpg", "toy_0001-mask.png", "toy_0001.png", "toy_0001-cutout.png"
    ]  # fmt: skip
    mask = shown(handlers.cut(visit, 0.9))["mask"]
    assert np.array_equal(mask, np.where(expected_files["map"] >= 0.9 * 255, 255, 0))
    assert not np.array_equal(mask, expected_files["mask"])


def test_what_is_no_image_gets_a_sentence(handlers, toy, tmp_path):
    (tmp_path / "text.jpg").write_text("no image")
    visit = app.Visit()
    handlers.upload(toy / "test/Image/toy_0001.jpg", visit)
    handlers.process(visit)
    line = "text.jpg: cannot be read as an image: its format is not known to Pillow"
    assert handlers.upload(tmp_path / "text.jpg", visit) == (visit, line, "", "")
    assert handlers.process(visit) is None and handlers.cut(visit, 0.5) == ""


@pytest.mark.parametrize("error", [MemoryError("not enough memory"), cv2.error("(-4:Insufficient memory) Failed")])
def test_running_out_of_memory_gets_a_sentence(error, handlers, toy, monkeypatch):
    def fail(*words):
        raise error

    visit = app.Visit()
    handlers.upload(toy / "test/Image/toy_0001.jpg", visit)
    with monkeypatch.context() as patch:
        patch.setattr(app.output, "render", fail)
        assert handlers.process(visit)[1] == "out of memory: try a smaller image"
        assert handlers.cut(visit, 0.5) == "out of memory: try a smaller image"
    visit.answer = None
    if isinstance(error, MemoryError):
        monkeypatch.setattr(SAM2UNeXT, "predict", fail)
        assert handlers.process(visit) == ("out of memory: try a smaller image", "")


def test_odd_names_are_escaped(handlers, toy, tmp_path):
    path = tmp_path / '"><script>.jpg'
    shutil.copy(toy / "test/Image/toy_0001.jpg", path)
    visit = app.Visit()
    handlers.upload(path, visit)
    _, whole = handlers.process(visit)
    assert "<script>" not in whole + handlers.cut(visit, 0.5)


@pytest.mark.parametrize("other", ["toy_0002.jpg", None])
def test_an_answer_that_comes_too_late_is_not_shown(other, handlers, toy, monkeypatch):
    visit, predict = app.Visit(), SAM2UNeXT.predict

    def change_the_mind(model, image):
        if other:
            handlers.upload(toy / "test/Image" / other, visit)
        else:
            handlers.clear(visit)
        return predict(model, image)

    handlers.upload(toy / "test/Image/toy_0001.jpg", visit)
    with monkeypatch.context() as patch:
        patch.setattr(SAM2UNeXT, "predict", change_the_mind)
        assert handlers.process(visit) is None and visit.answer is None
    assert bool(handlers.process(visit)) == bool(other)  # its own turn
    assert handlers.process(visit) is None  # answered


@pytest.mark.parametrize("field", ["emptied", "filled again"])
def test_an_image_that_is_read_too_late_is_forgotten(field, handlers, toy, monkeypatch):
    visit, read = app.Visit(), app.read

    def change_the_mind(path):
        picture = read(path)
        monkeypatch.setattr(app, "read", read)
        if field == "emptied":
            handlers.clear(visit)
        else:
            handlers.upload(toy / "test/Image/toy_0002.jpg", visit)
        return picture

    monkeypatch.setattr(app, "read", change_the_mind)
    handlers.upload(toy / "test/Image/toy_0001.jpg", visit)
    assert (visit.picture and visit.picture.name) == (None if field == "emptied" else "toy_0002")
    assert handlers.upload(None, visit) == (visit, "", "", "") and visit.picture is None  # a field emptied meanwhile


def test_cards_of_another_image_are_not_shown(handlers, toy, monkeypatch):
    visit, render = app.Visit(), app.output.render
    handlers.upload(toy / "test/Image/toy_0001.jpg", visit)
    handlers.process(visit)
    assert handlers.cut(visit, 0.5)
    monkeypatch.setattr(app.output, "render", lambda *words: handlers.clear(visit) and render(*words))
    assert handlers.cut(visit, 0.5) == ""


def test_images_are_processed_one_at_a_time(handlers, toy, monkeypatch):
    running, predict = threading.Semaphore(1), SAM2UNeXT.predict

    def watched(model, image):
        assert running.acquire(blocking=False)
        time.sleep(0.05)
        running.release()
        return predict(model, image)

    monkeypatch.setattr(SAM2UNeXT, "predict", watched)
    visits = [app.Visit(), app.Visit(), app.Visit()]
    for visit in visits:
        handlers.upload(toy / "test/Image/toy_0001.jpg", visit)
    with ThreadPoolExecutor(3) as pool:
        assert all(pool.map(handlers.process, visits))
