"""tools/app.py: the page answers as test.py does, and explains what it cannot read."""

import importlib.util
import io
import os
import shutil
import signal
import subprocess
import time
import urllib.request

import numpy as np
import pytest
from conftest import predict_arguments, program
from PIL import Image
from processes import free_port

import test as script
from tools import app
from unext import output
from unext.output import Prediction

MISSING = [name for name in ("gradio", "selenium") if not importlib.util.find_spec(name)]
MISSING += [name for name in ("chromium", "chromedriver") if not shutil.which(name)]


@pytest.fixture(scope="module")
def expected_files(micro_checkpoint, toy, tmp_path_factory):
    """What test.py writes for an image of the toy data, toy_0001, by kind."""
    folder, image = tmp_path_factory.mktemp("expected"), toy / "test/Image/toy_0001.jpg"
    more = ("--save", ",".join(output.KINDS), "--background", "white")
    script.main(predict_arguments(micro_checkpoint, image, folder, *more))
    files = {kind: folder / kind for kind in output.KINDS} | {"map": folder}
    return {kind: np.array(Image.open(next(place.glob("toy_0001.*")))) for kind, place in files.items()}


def test_the_page_shows_the_pixels_of_test_py(micro_model, toy, expected_files):
    prediction = app.predict(micro_model, str(toy / "test/Image/toy_0001.jpg"))
    overlay, mask = map(np.array, app.overlay_and_mask(prediction, 0.5))
    assert np.array_equal(prediction.grey, expected_files["map"]) and np.array_equal(mask, expected_files["mask"])
    assert np.array_equal(app.cutout(prediction, False, False, "#ffffff"), expected_files["cutout"])
    composite = np.array(app.cutout(prediction, False, True, "#ffffff"), int)
    for shown, kind in ((composite, "composite"), (overlay.astype(int), "overlay")):  # which are JPEG
        assert np.abs(shown - expected_files[kind]).mean() < 8
    assert np.array_equal(app.overlay_and_mask(prediction, 0.9)[1], np.where(prediction.grey >= 0.9 * 255, 255, 0))
    assert app.overlay_and_mask(None, 0.5) == app.overlay_and_mask(prediction, None) == [None, None]
    assert app.cutout(None, True, True, "#ffffff") is None


def test_a_cutout_is_cropped_and_put_on_a_colour_but_on_no_file(tmp_path):
    prediction = Prediction(np.zeros((40, 50), np.uint8))
    prediction.cutout = Image.new("RGBA", (50, 40))
    prediction.cutout.paste((9, 8, 7, 255), (10, 20, 30, 35))
    assert app.cutout(prediction, True, False, None).size == (20, 15)
    assert (np.array(app.cutout(prediction, True, True, "red")) == (9, 8, 7)).all()
    assert app.cutout(prediction, False, True, "red").getpixel((0, 0)) == (255, 0, 0)
    Image.new("RGB", (5, 5), "red").save(tmp_path / "secret.png")
    assert app.cutout(prediction, False, True, str(tmp_path / "secret.png")).mode == "RGBA"


@pytest.fixture(scope="module")
def server(micro_checkpoint, toy, tmp_path_factory):
    """The page's address and the folder of its temporary files; SIGTERM must end it and empty the folder."""
    folder, port = tmp_path_factory.mktemp("temporary"), free_port()
    command = program("tools/app.py", micro_checkpoint, "--device", "cpu", "--precision", "fp32", "--port", port)
    environment = os.environ | {"TMPDIR": str(folder), "GRADIO_SHARE": "True"}  # the latter without effect
    command += ["--examples", str(toy / "test/Image")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    with process:
        try:
            assert process.stdout.readline() == (
                f"http://127.0.0.1:{port}/ shows SAM2-UNeXT-1.pth on cpu; Ctrl-C ends it\n"
            )
            yield f"http://127.0.0.1:{port}/", folder
        finally:
            process.send_signal(signal.SIGTERM)
            assert process.wait(30) == 143
    assert not list(folder.iterdir())


@pytest.mark.slow
@pytest.mark.posix
@pytest.mark.skipif("gradio" in MISSING, reason="requirements-app.txt is not installed")
def test_a_port_in_use_is_one_line_and_status_2(server, micro_checkpoint):
    port = server[0].rpartition(":")[2].strip("/")
    command = program("tools/app.py", micro_checkpoint, "--device", "cpu", "--port", port)
    result = subprocess.run(command, capture_output=True, text=True)
    line = f"app.py: --host 127.0.0.1 --port {port}: no page can be served there; give others\n"
    assert (result.returncode, result.stderr) == (2, line)


@pytest.fixture
def browser():
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1280,900"):
        options.add_argument(argument)
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


def images(browser) -> dict[str, np.ndarray]:
    """What the page shows, by kind."""
    sources = browser.execute_script(
        "return ['map', 'mask', 'overlay', 'cutout'].map(kind => [kind, document.querySelector(`#${kind} img`)?.src])"
    )
    urls = {kind: url for kind, url in sources if url}
    return {kind: np.array(Image.open(io.BytesIO(urllib.request.urlopen(url).read()))) for kind, url in urls.items()}


@pytest.mark.slow
@pytest.mark.posix
@pytest.mark.skipif(bool(MISSING), reason=f"needs {', '.join(MISSING)}")
def test_a_visitor_gets_maps_moves_the_threshold_and_is_told_what_is_no_image(
    server, browser, toy, expected_files, tmp_path
):
    def find(selector):
        return wait_for(lambda: browser.find_elements("css selector", selector))[0]

    address, _ = server
    browser.get(address)
    find("#upload input[type=file]").send_keys(str(toy / "test/Image/toy_0001.jpg"))
    shown = wait_for(lambda: len(images(browser)) == 4 and images(browser))
    assert all(np.array_equal(shown[kind], expected_files[kind]) for kind in ("map", "mask", "cutout"))

    number = find("#threshold input[type=number]")
    number.clear()
    number.send_keys("0.9\n")
    mask = np.where(expected_files["map"] >= 0.9 * 255, 255, 0)
    wait_for(lambda: np.array_equal(images(browser).get("mask"), mask))

    find("#filled input").click()
    wait_for(lambda: images(browser)["cutout"].shape[-1] == 3)  # on white
    find("#filled input").click()
    wait_for(lambda: np.array_equal(images(browser)["cutout"], expected_files["cutout"]))

    find("#upload button[aria-label='Remove Image']").click()
    wait_for(lambda: not images(browser))
    browser.execute_script("document.querySelectorAll('.gallery-item, .gallery button')[1].click()")
    wait_for(lambda: len(images(browser)) == 4)

    (tmp_path / "text.jpg").write_text("no image")
    browser.get(address)
    find("#upload input[type=file]").send_keys(str(tmp_path / "text.jpg"))
    wait_for(lambda: "text.jpg: cannot be read as an image: its format is not known" in browser.page_source)
