"""The page in a browser: upload, maps, threshold, download, a change of mind; and how it starts and ends."""

import importlib.util
import os
import re
import shutil
import signal
import subprocess
import threading
import time

import numpy as np
import pytest
from conftest import decoded, program, save_image
from PIL import Image
from processes import free_port

from SAM2UNeXT import SAM2UNeXT
from tools import app
from unext.output import KINDS

PACKAGES = [name for name in ("gradio", "selenium") if not importlib.util.find_spec(name)]
PROGRAMS = [name for name in ("chromium", "chromedriver") if not shutil.which(name)]
needs_a_browser = pytest.mark.skipif(bool(PACKAGES + PROGRAMS), reason=f"needs {', '.join(PACKAGES + PROGRAMS)}")


@pytest.fixture(scope="module")
def server(micro_checkpoint, tmp_path_factory):
    """The page's address and the folder of its temporary files; SIGTERM must end it and empty the folder."""
    folder = tmp_path_factory.mktemp("temporary")
    for _ in range(9):  # until no other program takes the port meanwhile
        port = free_port()
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
        (["--host", "192.0.2.7"], {}, "--host 192.0.2.7: is no address of this machine; 0.0.0.0 is all of them"),
        (
            [],
            {"http_proxy": "http://127.0.0.1:9", "HTTP_PROXY": "http://127.0.0.1:9"},
            "set NO_PROXY=localhost,127.0.0.1",
        ),
    ],
)
def test_a_page_that_does_not_open_is_one_line(words, environment, message, micro_checkpoint):
    command = program("tools/app.py", micro_checkpoint, "--device", "cpu", "--port", free_port(), *words)
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


def same(images, expected_files):
    return images.keys() == KINDS.keys() and all(np.array_equal(images[kind], expected_files[kind]) for kind in KINDS)


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
    server, browser, toy, expected_files, tmp_path
):
    address, folder = server
    browser.open(address)
    browser.upload(shutil.copy(toy / "test/Image/toy_0001.jpg", tmp_path / "visitor.jpg"))
    wait_for(lambda: same(browser.images(), expected_files))
    assert re.fullmatch(r"\d+ × \d+ pixels in \d+\.\d\d seconds", browser.line())

    browser.found("figure[id=cutout] a")[0].click()
    wait_for((tmp_path / "visitor-cutout.png").exists)
    assert np.array_equal(np.array(Image.open(tmp_path / "visitor-cutout.png")), expected_files["cutout"])

    browser.driver.set_window_size(400, 900)
    wait_for(lambda: browser.run("document.documentElement.scrollWidth") <= 400)
    number = browser.found("#threshold input[type=number]")[0]
    number.clear()
    number.send_keys("0.9\n")
    mask = np.where(expected_files["map"] >= 0.9 * 255, 255, 0)
    wait_for(lambda: np.array_equal(browser.images().get("mask"), mask))

    (tmp_path / "text.jpg").write_text("no image")
    browser.open(address)
    browser.upload(tmp_path / "text.jpg")
    wait_for(lambda: "its format is not known to Pillow" in browser.line())
    examples = {path.name for path in app.EXAMPLES.glob("*")}  # if the demo was run here
    wait_for(lambda: {path.name for path in folder.rglob("*") if path.is_file()} <= examples)


@pytest.mark.slow
@needs_a_browser
def test_a_visitor_may_clear_upload_again_and_click_an_example(
    browser, micro_model, toy, expected_files, tmp_path, monkeypatch
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
        wait_for(lambda: same(browser.images(), expected_files))
        assert seen == [(50, 40), Image.open(example).size]

        browser.found("#upload button[aria-label='Remove Image']")[0].click()
        wait_for(lambda: not browser.images() and not browser.line())
        browser.upload(tmp_path / "other.png")
        wait_for(lambda: "50 × 40 pixels" in browser.line())
        browser.run("document.querySelector('.gallery-item').click()")
        wait_for(lambda: same(browser.images(), expected_files))
        assert not browser.found("#upload button[aria-label='Remove Image']")  # the example is not what was uploaded
        for session in page.app.state_holder.session_data.values():
            assert list(session.state_components)  # gradio forgets the visit in time
    finally:
        gate.set()
        page.close(verbose=False)
