"""tools/app.py: the page gives the files of test.py and keeps them while it is open; the service of docs/deploy.md."""

import fnmatch
import importlib.util
import io
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
import zipfile
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, predict_arguments, program
from PIL import Image
from processes import free_port

import test
from tools import app

LIFETIME = 3  # seconds, of the page's
PAGE = f"""
import sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
import micro
from tools import app
app.LIFETIME = {LIFETIME}
app.main(app.get_args_parser().parse_args())
"""
PACKAGES = [name for name in ("gradio", "selenium") if not importlib.util.find_spec(name)]
PROGRAMS = [name for name in ("chromium", "chromedriver") if not shutil.which(name)]
needs_gradio = pytest.mark.skipif("gradio" in PACKAGES, reason="requirements-app.txt is not installed")
needs_a_browser = pytest.mark.skipif(bool(PACKAGES + PROGRAMS), reason=f"needs {', '.join(PACKAGES + PROGRAMS)}")


@pytest.fixture(scope="module")
def photo(toy, tmp_path_factory) -> Path:
    return Path(shutil.copy(toy / "test/Image/toy_0001.jpg", tmp_path_factory.mktemp("photo") / "IMG_1003.jpg"))


@pytest.fixture(scope="module")
def written(micro_checkpoint, photo, tmp_path_factory):
    """A function: the content of the files that test.py writes for the photo with more options, by kind."""

    def write(*more: str) -> dict[str, bytes]:
        folder = tmp_path_factory.mktemp("written")
        test.main(predict_arguments(micro_checkpoint, photo, folder, *more))
        files = folder.rglob("IMG_1003.*")
        return {"map" if file.parent == folder else file.parent.name: file.read_bytes() for file in files}

    return write


def test_the_files_of_the_page_are_those_of_test_py(micro_model, photo, written):
    for settings, more in (
        ((0.6, False, False, "None", True, "#ff8000"), ()),
        ((0.6, True, True, "90x70", True, "#ff8000"), ("--largest", "--crop", "--canvas", "90x70")),
    ):
        args, cutout = app.options(*settings), app.options(*settings[:-2], False, None)
        prediction = app.predict(micro_model, photo, args.largest)
        files = app.files_of(prediction, photo, app.KINDS, args) | app.files_of(prediction, photo, ["cutout"], cutout)
        assert list(files)[0] == "IMG_1003_composite.jpg" and list(files)[-1] == "IMG_1003_cutout.png"
        more += ("--save", "map,mask,overlay,cutout,composite", "--background", "#ff8000", "--threshold", "0.6")
        assert {Path(name).stem.removeprefix("IMG_1003_"): content for name, content in files.items()} == written(*more)


def test_a_background_is_a_colour_and_never_a_file(photo):
    assert app.options(0.5, False, False, None, True, "red").background == "red"
    for colour in (str(photo), "#ff", "", None):
        assert app.options(0.5, False, False, "9x", True, colour).background is None


def test_the_web_service_of_the_documents_gives_cutouts(micro_checkpoint, photo, written, monkeypatch):
    for name in ("fastapi", "httpx", "python_multipart"):
        pytest.importorskip(name)
    from fastapi.testclient import TestClient

    [code] = re.findall(r"```python\n(import io\n.*?)```", (ROOT / "docs/deploy.md").read_text(), re.DOTALL)
    service = {}
    exec(code.replace("demo/run/SAM2-UNeXT-6.pth", str(micro_checkpoint)), service)
    client = TestClient(service["app"])
    response = client.post("/cutout", files={"file": photo.read_bytes()})
    expected = written("--save", "cutout")["cutout"]
    assert np.array_equal(*(Image.open(io.BytesIO(content)) for content in (response.content, expected)))
    negative, large = (io.BytesIO() for _ in range(2))
    Image.fromarray(np.float32([[-1, 1]])).save(negative, "TIFF")
    Image.new("1", (200, 200)).save(large, "PNG")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10_000)
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"
    for content in (b"no image", eps, negative.getvalue(), large.getvalue()):
        response = client.post("/cutout", files={"file": content})
        assert response.status_code == 400 and response.json()["detail"] == "cannot be read as an image"


@pytest.fixture(scope="module")
def server(micro_checkpoint, toy, tmp_path_factory):
    """The page's address and the folder of its temporary files; SIGTERM must end it and empty the folder."""
    folder, port = tmp_path_factory.mktemp("temporary"), free_port()
    command = [sys.executable, "-c", PAGE, micro_checkpoint, "--device", "cpu", "--precision", "fp32"]
    command += ["--port", str(port), "--examples", toy / "test/Image"]
    environment = os.environ | {"TMPDIR": str(folder), "GRADIO_SHARE": "True"}  # the latter without effect
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
@needs_gradio
def test_a_port_in_use_is_one_line_and_status_2(server, micro_checkpoint):
    port = server[0].rpartition(":")[2].strip("/")
    command = program("tools/app.py", micro_checkpoint, "--device", "cpu", "--port", port)
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr == f"app.py: --host 127.0.0.1 --port {port}: no page can be served there; give others\n"


class Browser:
    """Chromium with a page of the server."""

    def __init__(self, address: str, downloads: Path):
        from selenium import webdriver

        options = webdriver.ChromeOptions()
        options.binary_location = shutil.which("chromium")
        for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1280,900"):
            options.add_argument(argument)
        options.add_experimental_option("prefs", {"download.default_directory": str(downloads)})
        self.driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))
        self.downloads = downloads
        self.open(address)

    def open(self, address: str, width: int = 1280) -> None:
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 1000}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        self.driver.get(address)

    def find(self, selector: str, number: int = 0):
        """The element, once there is one."""
        return wait_for(lambda: self.driver.find_elements("css selector", selector)[number:])[0]

    def add(self, *files: Path) -> None:
        self.find("#images input[type=file]").send_keys("\n".join(map(str, files)))

    def tab(self, kind: str) -> None:
        self.find("button[role=tab]", app.KINDS.index(kind)).click()

    def urls(self) -> list[str]:
        """The image and the result that the slider compares."""
        script = "return [...document.querySelectorAll('#compare img')].map(image => image.src)"
        return self.driver.execute_script(script)

    def shows(self, name: str, content: bytes) -> bool:
        """Whether the slider shows this result."""
        urls = self.urls()
        return len(urls) == 2 and urls[1].endswith(f"/{name}") and download(urls[1]) == content

    def top(self, selector: str) -> float:
        return self.driver.execute_script(f"return document.querySelector('{selector}').getBoundingClientRect().top")

    def downloaded(self, name: str) -> bytes:
        return wait_for(lambda: (self.downloads / name).exists() and (self.downloads / name).read_bytes())


def download(url: str) -> bytes:
    try:
        return urllib.request.urlopen(url).read()
    except urllib.error.HTTPError:  # replaced meanwhile
        return b""


def wait_for(condition):
    """The condition's value as soon as it is true; at most a minute."""
    deadline = time.monotonic() + 60
    while not (value := condition()):
        assert time.monotonic() < deadline, "nothing happened for a minute"
        time.sleep(0.1)
    return value


@pytest.fixture
def browser(server, tmp_path):
    (tmp_path / "downloads").mkdir()
    browser = Browser(server[0], tmp_path / "downloads")
    yield browser
    browser.driver.quit()


@pytest.mark.slow
@pytest.mark.posix
@needs_a_browser
def test_a_visitor_compares_and_downloads_files_of_test_py(browser, photo, written):
    expected = written("--save", "map,mask,overlay,cutout")
    browser.add(photo)
    for kind, suffix in {"cutout": "png", "overlay": "jpg", "mask": "png", "map": "png"}.items():
        browser.tab(kind)
        wait_for(lambda name=f"IMG_1003_{kind}.{suffix}", kind=kind: browser.shows(name, expected[kind]))
    time.sleep(1.5 * LIFETIME)
    browser.tab("mask")
    threshold = browser.find("#threshold input[type=number]")
    threshold.clear()
    threshold.send_keys("0.6\n")
    mask = written("--save", "mask", "--threshold", "0.6")["mask"]
    wait_for(lambda: browser.shows("IMG_1003_mask.png", mask))
    time.sleep(1.5 * LIFETIME)
    browser.find("#download").click()
    assert browser.downloaded("IMG_1003_mask.png") == mask

    browser.tab("cutout")
    browser.find("#largest input").click()
    browser.find("#crop input").click()
    browser.find("#filled input").click()
    more = ("--save", "composite", "--background", "white", "--crop", "--largest", "--threshold", "0.6")
    composite = written(*more)["composite"]
    wait_for(lambda: browser.shows("IMG_1003_composite.jpg", composite))


@pytest.mark.slow
@pytest.mark.posix
@needs_a_browser
def test_several_images_give_one_zip_and_nothing_stays_of_a_visitor(browser, server, photo, written, toy, tmp_path):
    (tmp_path / "text.jpg").write_text("no image")
    browser.add(photo)
    wait_for(lambda: len(browser.urls()) == 2)
    browser.add(tmp_path / "text.jpg", toy / "test/Image/toy_0002.jpg", toy / "test/Image/toy_0003.jpg")
    wait_for(lambda: "text.jpg: cannot be read as an image: its format is not known" in browser.driver.page_source)
    wait_for(lambda: len(browser.urls()) == 2)
    wait_for(lambda: len(browser.driver.find_elements("css selector", "#images .thumbnail-item")) == 3)
    browser.find("#kinds input", app.KINDS.index("map")).click()
    browser.find("#pack").click()
    browser.find("#zip a").click()
    browser.downloaded("sam2unext.zip")
    with zipfile.ZipFile(browser.downloads / "sam2unext.zip") as file:
        names = [f"{stem}_{kind}.png" for stem in ("IMG_1003", "toy_0002", "toy_0003") for kind in ("cutout", "map")]
        assert file.namelist() == names
        expected = written("--save", "cutout,map")
        assert [file.read(name) for name in names[:2]] == [expected["cutout"], expected["map"]]

    browser.find("#images .thumbnail-item").click()
    wait_for(lambda: browser.shows("IMG_1003_cutout.png", expected["cutout"]))
    patterns = ("IMG_1003*", "text.jpg", "*.npy", "*.zip", "thumbnail.jpg")

    def remaining() -> list[str]:
        names = [name for _, _, names in os.walk(server[1]) for name in names]  # passes over folders that disappear
        return [name for pattern in patterns for name in fnmatch.filter(names, pattern)]

    assert remaining()  # as long as the page is open
    browser.driver.quit()
    wait_for(lambda: not remaining())


@pytest.mark.slow
@pytest.mark.posix
@needs_a_browser
def test_on_a_phone_the_result_follows_the_image(browser, server):
    browser.open(server[0], width=400)
    browser.driver.execute_script("arguments[0].click()", browser.find("#examples .thumbnail-item"))
    wait_for(lambda: len(browser.urls()) == 2)
    tops = [browser.top(selector) for selector in ("#images", "#compare", "#download", "#threshold", "#pack")]
    assert tops == sorted(tops) and tops[1] < 450
    assert browser.driver.execute_script("return document.documentElement.scrollWidth") == 400
