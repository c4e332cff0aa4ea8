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
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
from conftest import predict_arguments, program, save_image
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


@pytest.fixture
def handlers(micro_model, monkeypatch):
    """The page's handlers without gradio, of which they only need the sign that nothing changes: None here."""
    monkeypatch.setitem(sys.modules, "gradio", SimpleNamespace(skip=lambda: None))
    return app.Handlers(micro_model, [])


def test_an_answer_has_the_files_of_test_py(handlers, toy, expected):
    visit = app.Visit()
    assert handlers.upload(toy / "test/Image/toy_0001.jpg", visit) == ("", "", "")
    line, whole = handlers.process(visit)
    height, width = expected["map"].shape
    assert re.fullmatch(rf"{width} × {height} pixels in \d+\.\d\d seconds", line)
    cut = handlers.cut(visit, 0.5)
    images = shown(cut) | shown(whole)
    assert images.keys() == set(KINDS)
    for kind, pixels in images.items():
        assert np.array_equal(pixels, expected[kind]), kind
    assert re.findall(r'download="([^"]+)"', cut + whole) == [
        "toy_0001-overlay.jpg", "toy_0001-mask.png", "toy_0001.png", "toy_0001-cutout.png"
    ]  # fmt: skip
    mask = shown(handlers.cut(visit, 0.9))["mask"]
    assert np.array_equal(mask, np.where(expected["map"] >= 0.9 * 255, 255, 0))
    assert not np.array_equal(mask, expected["mask"])


def test_what_is_no_image_gets_a_sentence(handlers, toy, tmp_path):
    (tmp_path / "text.jpg").write_text("no image")
    visit = app.Visit()
    handlers.upload(toy / "test/Image/toy_0001.jpg", visit)
    handlers.process(visit)
    line = "text.jpg: cannot be read as an image: its format is not known to Pillow"
    assert handlers.upload(tmp_path / "text.jpg", visit) == (line, "", "")
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


@pytest.fixture(scope="module")
def server(micro_checkpoint, tmp_path_factory):
    """The page's address and the folder of its temporary files; SIGTERM must end it and empty the folder."""
    folder = tmp_path_factory.mktemp("temporary")
    for _ in range(9):  # until no other program takes the port meanwhile
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        words = program("tools/app.py", micro_checkpoint, "--device", "cpu", "--precision", "fp32", "--port", port)
        environment = os.environ | {"TMPDIR": str(folder), "GRADIO_SHARE": "True"}  # the latter without effect
        process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=environment)
        line = process.stdout.readline()
        if line:
            break
        process.wait()
    with process:
        try:
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


@pytest.mark.slow
@pytest.mark.skipif("gradio" in PACKAGES, reason="bash tools/setup.sh requirements-app.txt was not run")
@pytest.mark.parametrize(
    "words, environment, message",
    [
        (["--host", "::1"], {}, "--host ::1: gradio takes no IPv6 address; give a name or 0.0.0.0"),
        ([], {"http_proxy": "http://127.0.0.1:9", "HTTP_PROXY": "http://127.0.0.1:9"}, "set NO_PROXY=127.0.0.1"),
    ],
)
def test_a_page_that_does_not_open_is_one_line(words, environment, message, micro_checkpoint):
    command = program("tools/app.py", micro_checkpoint, "--device", "cpu", "--port", 8950, *words)
    cleared = dict.fromkeys(("NO_PROXY", "no_proxy"), "")
    ended = subprocess.run(command, capture_output=True, text=True, env=os.environ | cleared | environment)
    assert ended.returncode == 2 and len(ended.stderr.splitlines()) == 1 and message in ended.stderr


@pytest.fixture
def browser(tmp_path):
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    options.add_experimental_option("prefs", {"download.default_directory": str(tmp_path)})
    for word in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1280,900"):
        options.add_argument(word)
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))
    yield Window(driver)
    driver.quit()


class Window:
    """The page in a browser."""

    def __init__(self, driver):
        self.driver = driver

    def open(self, address):
        self.driver.get(address)

    def found(self, selector):
        return self.driver.find_elements("css selector", selector)

    def run(self, script):
        return self.driver.execute_script(f"return {script}")

    def upload(self, path):
        wait_for(lambda: self.found("#upload input[type=file]"))[0].send_keys(str(path))

    def line(self):
        return self.run("document.querySelector('#line')?.innerText ?? ''")

    def images(self):
        """What the cards show, by kind."""
        pairs = self.run("[...document.querySelectorAll('figure img')].map(image => [image.alt, image.src])")
        return {kind: decoded(source) for kind, source in pairs}


def same(images, expected):
    return images.keys() == set(KINDS) and all(np.array_equal(images[kind], expected[kind]) for kind in KINDS)


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
    browser.open(address)
    browser.upload(shutil.copy(toy / "test/Image/toy_0001.jpg", tmp_path / "visitor.jpg"))
    wait_for(lambda: same(browser.images(), expected))
    assert re.fullmatch(r"\d+ × \d+ pixels in \d+\.\d\d seconds", browser.line())

    browser.found("figure[id=cutout] a")[0].click()
    wait_for((tmp_path / "visitor-cutout.png").exists)
    assert np.array_equal(np.array(Image.open(tmp_path / "visitor-cutout.png")), expected["cutout"])

    browser.driver.set_window_size(400, 900)
    wait_for(lambda: browser.run("document.documentElement.scrollWidth") <= 400)
    number = browser.found("#threshold input[type=number]")[0]
    number.clear()
    number.send_keys("0.9\n")
    mask = np.where(expected["map"] >= 0.9 * 255, 255, 0)
    wait_for(lambda: np.array_equal(browser.images().get("mask"), mask))

    (tmp_path / "text.jpg").write_text("no image")
    browser.open(address)
    browser.upload(tmp_path / "text.jpg")
    wait_for(lambda: "its format is not known to Pillow" in browser.line())
    assert not browser.images()
    examples = {path.name for path in app.EXAMPLES.glob("*")}  # if the demo was run here
    wait_for(lambda: {path.name for path in folder.rglob("*") if path.is_file()} <= examples)


@pytest.mark.slow
@needs_a_browser
def test_a_visitor_may_clear_upload_again_and_click_an_example(
    browser, micro_model, toy, expected, tmp_path, monkeypatch
):
    gate, seen, predict = threading.Event(), [], SAM2UNeXT.predict

    def wait(model, image):
        seen.append(image.size)
        gate.wait(60)
        return predict(model, image)

    monkeypatch.setattr(SAM2UNeXT, "predict", wait)
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "gradio"))
    monkeypatch.setenv("GRADIO_ANALYTICS_ENABLED", "False")
    save_image(tmp_path / "other.png", np.zeros((40, 50, 3), np.uint8))
    example = toy / "test/Image/toy_0001.jpg"
    page = app.build_page(app.Handlers(micro_model, [example]), "title")
    _, address, _ = page.launch(server_name="127.0.0.1", prevent_thread_lock=True, quiet=True, ssr_mode=False)
    try:
        browser.open(address)
        browser.upload(tmp_path / "other.png")
        wait_for(lambda: seen == [(50, 40)])
        wait_for(lambda: browser.found("#upload button[aria-label='Remove Image']"))[0].click()
        browser.upload(example)  # while the other one is being processed
        gate.set()
        wait_for(lambda: same(browser.images(), expected))
        assert seen == [(50, 40), Image.open(example).size]

        browser.found("#upload button[aria-label='Remove Image']")[0].click()
        wait_for(lambda: not browser.images() and not browser.line())
        browser.upload(tmp_path / "other.png")
        wait_for(lambda: "50 × 40 pixels" in browser.line())
        browser.run("document.querySelector('.gallery-item').click()")
        wait_for(lambda: same(browser.images(), expected))
        assert not browser.found("#upload button[aria-label='Remove Image']")  # the example is not what was uploaded
    finally:
        gate.set()
        page.close(verbose=False)
