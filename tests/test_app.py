"""tools/app.py: the page answers as test.py does, explains what it cannot read, and leaves nothing on the disk."""

import base64
import importlib.util
import io
import os
import re
import shutil
import signal
import socket
import subprocess
import time

import numpy as np
import pytest
from conftest import predict_arguments, program
from PIL import Image

import test as script
from SAM2UNeXT import SAM2UNeXT
from tools import app

PACKAGES = [name for name in ("gradio", "selenium") if not importlib.util.find_spec(name)]
PROGRAMS = [name for name in ("chromium", "chromedriver") if not shutil.which(name)]
needs_a_browser = pytest.mark.skipif(bool(PACKAGES + PROGRAMS), reason=f"needs {', '.join(PACKAGES + PROGRAMS)}")
KINDS = ("overlay", "mask", "map", "cutout")


def decoded(source: str) -> np.ndarray:
    """The pixels in a data URL."""
    return np.array(Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))))


def shown(page: str) -> dict[str, np.ndarray]:
    """The images in HTML by kind."""
    return {kind: decoded(source) for source, kind in re.findall(r'<img src="([^"]+)" alt="(\w+)">', page)}


@pytest.fixture(scope="module")
def expected(micro_checkpoint, toy, tmp_path_factory):
    """What test.py writes for an image, by kind."""
    folder, image = tmp_path_factory.mktemp("expected"), toy / "test/Image/toy_0001.jpg"
    script.main(predict_arguments(micro_checkpoint, image, folder, "--save", ",".join(KINDS)))
    files = {kind: folder / kind for kind in KINDS} | {"map": folder}
    return {kind: np.array(Image.open(next(place.glob("toy_0001.*")))) for kind, place in files.items()}


def test_an_answer_has_the_files_of_test_py(micro_model, toy, expected):
    answer, line, cut, whole = app.respond(micro_model, toy / "test/Image/toy_0001.jpg", 0.5)
    height, width = answer.grey.shape
    assert re.fullmatch(rf"{width} × {height} pixels in \d+\.\d\d seconds", line)
    images = shown(cut) | shown(whole)
    assert images.keys() == set(KINDS)
    for kind, pixels in images.items():
        assert np.array_equal(pixels, expected[kind]), kind
    assert re.findall(r'download="([^"]+)"', cut + whole) == [
        "toy_0001-overlay.jpg", "toy_0001-mask.png", "toy_0001.png", "toy_0001-cutout.png"
    ]  # fmt: skip


def test_another_threshold_changes_the_mask(micro_model, toy):
    answer, _, cut, _ = app.respond(micro_model, toy / "test/Image/toy_0001.jpg", 0.5)
    mask = shown(app.cards(answer, ["mask"], 0.9))["mask"]
    assert np.array_equal(mask, np.where(answer.grey >= 0.9 * 255, 255, 0))
    assert not np.array_equal(mask, shown(cut)["mask"])


def test_what_is_no_image_gets_a_sentence(micro_model, tmp_path):
    (tmp_path / "text.jpg").write_text("no image")
    answer, line, *cards = app.respond(micro_model, tmp_path / "text.jpg", 0.5)
    assert answer is None and cards == ["", ""]
    assert line == "text.jpg: cannot be read as an image: its format is not known to Pillow"


def test_running_out_of_memory_gets_a_sentence(micro_model, toy, monkeypatch):
    def fail(model, image):
        raise MemoryError("not enough memory")

    monkeypatch.setattr(SAM2UNeXT, "predict", fail)
    _, line, *_ = app.respond(micro_model, toy / "test/Image/toy_0001.jpg", 0.5)
    assert line == "out of memory: try a smaller image"


def test_odd_names_are_escaped(toy, tmp_path, micro_model):
    path = tmp_path / '"><script>.jpg'
    shutil.copy(toy / "test/Image/toy_0001.jpg", path)
    *_, cut, whole = app.respond(micro_model, path, 0.5)
    assert "<script>" not in cut + whole


@pytest.fixture(scope="module")
def server(micro_checkpoint, tmp_path_factory):
    """The page's address and the folder of its temporary files; SIGTERM must end it and empty the folder."""
    folder = tmp_path_factory.mktemp("temporary")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [micro_checkpoint, "--device", "cpu", "--precision", "fp32", "--port", port]
    with subprocess.Popen(
        program("tools/app.py", *words), stdout=subprocess.PIPE, text=True, env=os.environ | {"TMPDIR": str(folder)}
    ) as process:
        try:
            line = process.stdout.readline()
            assert line == f"http://127.0.0.1:{port}/ shows SAM2-UNeXT-1.pth on cpu; Ctrl-C ends it\n"
            yield line.split()[0], folder
        finally:
            process.send_signal(signal.SIGTERM)
            assert process.wait(30) == 143
    assert not list(folder.iterdir())


@pytest.mark.slow
@pytest.mark.skipif("gradio" in PACKAGES, reason="bash tools/setup.sh requirements-app.txt was not run")
def test_a_port_in_use_is_one_line_and_status_2(server, micro_checkpoint):
    port = server[0].rpartition(":")[2].strip("/")
    words = program("tools/app.py", micro_checkpoint, "--device", "cpu", "--port", port)
    ended = subprocess.run(words, capture_output=True, text=True)
    assert ended.returncode == 2 and ended.stderr == (
        f"app.py: --port {port}: is in use or not allowed on 127.0.0.1; give another one\n"
    )


@pytest.fixture
def browser():
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for word in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1280,900"):
        options.add_argument(word)
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))
    yield driver
    driver.quit()


def wait_for(condition):
    """The condition's value as soon as it is true; at most a minute."""
    deadline = time.monotonic() + 60
    while not (value := condition()):
        assert time.monotonic() < deadline, "nothing happened for a minute"
        time.sleep(0.1)
    return value


@pytest.mark.slow
@needs_a_browser
def test_a_browser_shows_the_maps_moves_the_threshold_and_gets_a_sentence_for_text(
    server, browser, toy, expected, tmp_path
):
    address, folder = server
    browser.get(address)

    def found(selector):
        return browser.find_elements("css selector", selector)

    def image(kind):
        return decoded(browser.execute_script(f"return document.querySelector('#{kind} img').src"))

    def upload(path):
        wait_for(lambda: found("#upload input[type=file]"))[0].send_keys(str(path))

    upload(shutil.copy(toy / "test/Image/toy_0001.jpg", tmp_path / "visitor.jpg"))
    wait_for(lambda: len(found("figure img")) == len(KINDS))
    for kind in KINDS:
        assert np.array_equal(image(kind), expected[kind]), kind
    browser.set_window_size(400, 900)
    assert browser.execute_script("return document.documentElement.scrollWidth") <= 400

    number = found("#threshold input[type=number]")[0]
    number.clear()
    number.send_keys("0.9\n")
    mask = np.where(expected["map"] >= 0.9 * 255, 255, 0)
    assert not np.array_equal(mask, expected["mask"])
    wait_for(lambda: np.array_equal(image("mask"), mask))

    (tmp_path / "text.jpg").write_text("no image")
    browser.get(address)
    upload(tmp_path / "text.jpg")
    wait_for(lambda: "its format is not known to Pillow" in found("#line")[0].text)
    assert not found("figure")
    examples = {path.name for path in app.EXAMPLES.glob("*")}  # if the demo was run here
    assert {path.name for path in folder.rglob("*") if path.is_file()} <= examples
