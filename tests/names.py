"""Whatever files are called, every message about them is one line of printable text.

Every scenario makes files in a folder, both with odd names, and runs a command that has something to say about them.
test_names.py runs all of them with one nasty name, fuzz.py with names at random.
"""

import contextlib
import io
import re
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path

import micro  # noqa: F401
import numpy as np
import torch
from PIL import Image

import eval as evaluation
import test
import train
from SAM2UNeXT import SAM2UNeXT
from tools import check_dataset, contact_sheet, convert_checkpoint, toy_dataset
from unext import checkpoint, files, run

NETWORK = "--hiera_path random --sam2 micro --aux none --size 64 --workers 0 --precision fp32 --epoch 1 --batch_size 9"
BAR = re.compile(r"\d+/\d+ \[")  # of progress: 1/6 [00:01<00:07
NASTY = "a\nb\r\t\x1b[31m\u2028\u202e é"  # line breaks, a colour of terminals, right to left
BYTES = "a\udcff\udc80"  # not UTF-8


@cache
def trained() -> bytes:
    """A whole checkpoint."""
    torch.manual_seed(0)
    buffer = io.BytesIO()
    torch.save(checkpoint.network_content(SAM2UNeXT(sam2="micro", aux="none", size=64), whole=True), buffer)
    return buffer.getvalue()


def pairs(folder: Path, *stems: str, size: tuple[int, int] = (40, 60)) -> tuple[Path, Path]:
    """Folders of images and masks."""
    mask = np.zeros(size, np.uint8)
    mask[9:20, 9:30] = 255
    for kind, pixels in (("im", np.dstack([mask] * 3)), ("gt", mask)):
        (folder / kind).mkdir(exist_ok=True)
        for stem in stems:
            Image.fromarray(pixels).save(folder / kind / f"{stem}.png")
    return folder / "im", folder / "gt"


def call(main: Callable, parser: Callable, *words: object) -> None:
    main(parser().parse_args([str(word) for word in words]))


def run_train(folder: Path, *more: object) -> None:
    words = [*NETWORK.split(), "--train_image_path", folder / "im", "--train_mask_path", folder / "gt"]
    call(train.main, train.get_args_parser, *words, "--save_path", folder / "run", *more)


def run_test(folder: Path, *more: object) -> None:
    (folder / "x.pth").write_bytes(trained())
    words = ["--checkpoint", folder / "x.pth", "--test_image_path", folder / "im", "--precision", "fp32"]
    call(test.main, test.get_args_parser, *words, "--save_path", folder / "maps", *more)


def run_eval(folder: Path, name: str, *more: object) -> None:
    words = ["--pred_path", folder / "im", "--gt_path", folder / "gt", "--dataset_name", name, "--workers", 1]
    call(evaluation.main, evaluation.get_args_parser, *words, "--save_path", folder / "results", *more)


def run_check(*words: object) -> None:
    call(check_dataset.main, check_dataset.get_args_parser, *words, "--workers", 1)


def damage(path: Path, keep: int = 60) -> None:
    path.write_bytes(path.read_bytes()[:keep])


def train_and_resume(folder: Path, name: str) -> None:
    pairs(folder, name)
    run_train(folder, "--resume")
    run_train(folder, "--resume")
    run_train(folder)
    run_train(folder, "--resume", "--lr", "0.5")


def train_unfinished(folder: Path, name: str) -> None:
    pairs(folder, name)
    model = SAM2UNeXT(sam2="micro", aux="none", size=64)
    (folder / "run").mkdir()
    run.save_last(run.State(folder / "run", model, {}, run.Progress(), {"--epoch": 3}))
    run_train(folder)


def train_damaged(folder: Path, name: str) -> None:
    pairs(folder, name)
    (folder / "run").mkdir()
    (folder / "run" / "last.pth").write_bytes(b"PK no more")
    run_train(folder, "--resume")


def odd_masks(folder: Path, name: str) -> None:
    _, masks = pairs(folder, name, "x")
    Image.fromarray(np.ones((9, 9), np.uint8)).save(masks / f"{name}.png")


def train_odd_masks(folder: Path, name: str) -> None:
    odd_masks(folder, name)
    run_train(folder)


def eval_odd_masks(folder: Path, name: str) -> None:
    odd_masks(folder, name)
    run_eval(folder, name, "--resize")


def alone(folder: Path, name: str) -> None:
    pairs(folder, name, "x")
    (folder / "gt" / f"{name}.png").unlink()


def train_alone(folder: Path, name: str) -> None:
    alone(folder, name)
    run_train(folder)


def eval_alone(folder: Path, name: str) -> None:
    alone(folder, name)
    run_eval(folder, "set")


def eval_allowed(folder: Path, name: str) -> None:
    alone(folder, name)
    run_eval(folder, name, "--allow_missing")


def check_alone(folder: Path, name: str) -> None:
    alone(folder, name)
    run_check(folder / "im", folder / "gt")


def train_nothing_in_common(folder: Path, name: str) -> None:
    alone(folder, name)
    (folder / "gt" / "x.png").rename(folder / "gt" / "y.png")
    run_train(folder)


def train_unreadable(folder: Path, name: str) -> None:
    images, _ = pairs(folder, name)
    damage(images / f"{name}.png", 0)
    run_train(folder)


def test_unreadable(folder: Path, name: str) -> None:
    images, _ = pairs(folder, name)
    damage(images / f"{name}.png")
    run_test(folder)


def eval_unreadable(folder: Path, name: str) -> None:
    _, masks = pairs(folder, name)
    damage(masks / f"{name}.png")
    run_eval(folder, "set")


def check_everything(folder: Path, name: str) -> None:
    images, _ = pairs(folder, name, "x")
    odd_masks(folder, name)
    damage(images / "x.png")
    (images / f"{name}.txt").touch()
    run_check(folder / "im", folder / "gt", "--json", folder / "found.json")


def two_of_one_name(folder: Path, name: str) -> None:
    images, _ = pairs(folder, name)
    Image.new("L", (9, 9)).save(images / f"{name}.jpg")
    run_train(folder)


def test_all(folder: Path, name: str) -> None:
    pairs(folder, name)
    run_test(folder)
    run_test(folder, "--flip")


def test_without_truth(folder: Path, name: str) -> None:
    pairs(folder, name)
    (folder / "gt" / f"{name}.png").rename(folder / "gt" / "y.png")
    run_test(folder, "--test_gt_path", folder / "gt")


def test_over_its_input(folder: Path, name: str) -> None:
    pairs(folder, name)
    run_test(folder, "--save_path", folder / "im")


def test_of_one_name(folder: Path, name: str) -> None:
    pairs(folder, name)
    shutil.copy(folder / "im" / f"{name}.png", folder)
    run_test(folder, "--test_image_path", folder / "im", folder / f"{name}.png")


def no_folder(folder: Path, name: str) -> None:
    for main in (run_train, run_test):
        with contextlib.suppress(SystemExit):
            main(folder)
    with contextlib.suppress(SystemExit):
        run_eval(folder, "set")
    run_check(folder / "im", folder / "gt")


def not_to_be_written(folder: Path, name: str) -> None:
    pairs(folder, name)
    for part in ("run", "maps", "results"):
        (folder / part).touch()
    for main in (run_train, run_test, lambda folder: run_eval(folder, "set")):
        with contextlib.suppress(SystemExit):
            main(folder)
    with contextlib.suppress(SystemExit):
        run_eval(folder, "set", "--json", folder)
    call(toy_dataset.main, toy_dataset.get_args_parser, folder / "run" / name)


def weights_of_other_kinds(folder: Path, name: str) -> None:
    pairs(folder, name)
    path = folder / f"{name}.pt"
    for content in (None, b"", b"<html>", b"text", b"PK cut", {name: torch.ones(3)}, {name: 3}, {"format": 3}):
        if isinstance(content, dict):
            torch.save(content, path)
        elif content is not None:
            path.write_bytes(content)
        for option in ("--hiera_path", "--init"):
            with contextlib.suppress(SystemExit):
                run_train(folder, option, path)
        with contextlib.suppress(SystemExit):
            run_test(folder, "--checkpoint", path)


def checkpoints(folder: Path, name: str) -> None:
    pairs(folder, name)
    path = folder / f"{name}.pth"
    record = {"name": name, "path": str(folder / "sam2_hiera_micro.pt"), "fingerprint": name}
    header = {"format": 3, "network": {"sam2": "micro", "aux": "none", "size": 64}, "encoders": {"hiera_path": record}}
    state = torch.load(io.BytesIO(trained()), weights_only=True)["state_dict"]
    for content in (header, header | {"format": name}, header | {"network": {name: 3}}, header | {"encoders": 3}):
        for more in ({}, {name: torch.ones(3)}):
            torch.save(content | {"state_dict": state | more}, path)
            with contextlib.suppress(SystemExit):
                run_test(folder, "--checkpoint", path)
    words = [path, path, "--to", "original"]
    with contextlib.suppress(SystemExit):
        call(convert_checkpoint.main, convert_checkpoint.get_args_parser, *words)
    path.write_bytes(trained())
    words = [path, folder / "new" / f"{name}.pth", "--to"]
    with contextlib.suppress(SystemExit):
        call(convert_checkpoint.main, convert_checkpoint.get_args_parser, *words, "small")
    call(convert_checkpoint.main, convert_checkpoint.get_args_parser, *words, "whole")


def benchmarks_of_ones_own(folder: Path, name: str) -> None:
    path = folder / f"{name}.yaml"
    for text in (None, "- no", "test: {'a\\nb': {folder: x}}", "train: {folder: x}", "test: {a: {folders: x}}"):
        if text:
            path.write_text(text)
        for words in (["--benchmark", path, folder], ["--benchmark", path, folder / "none"]):
            with contextlib.suppress(SystemExit):
                call(train.main, train.get_args_parser, *NETWORK.split(), *words, "--save_path", folder / "run")
            with contextlib.suppress(SystemExit):
                call(evaluation.main, evaluation.get_args_parser, *words, "--pred_path", folder)
        with contextlib.suppress(SystemExit):
            run_check(path, folder)
    pairs(folder, name)
    path.write_text("{train: {folder: ., count: 7}, test: {a: {folder: .}}}")
    words = ["--benchmark", path, folder, "--pred_path", folder / "im", "--save_path", folder / "results"]
    with contextlib.suppress(SystemExit):
        call(evaluation.main, evaluation.get_args_parser, *words, "--sets", name)
    call(evaluation.main, evaluation.get_args_parser, *words, "--workers", 1)


def sheets(folder: Path, name: str) -> None:
    images, masks = pairs(folder, name)
    words = ["--images", images, "--masks", masks, "--maps", masks, "--output"]
    for output in (folder / f"{name}.png", folder / f"{name}.zip", folder / "none" / f"{name}.png"):
        with contextlib.suppress(SystemExit):
            call(contact_sheet.main, contact_sheet.get_args_parser, *words, output)
    (masks / f"{name}.png").rename(masks / "y.png")
    call(contact_sheet.main, contact_sheet.get_args_parser, *words, folder / "x.png")


SCENARIOS: dict[str, Callable[[Path, str], None]] = {
    function.__name__: function
    for function in (
        train_and_resume, train_unfinished, train_damaged, train_odd_masks, eval_odd_masks, train_alone, eval_alone,
        eval_allowed, check_alone, train_nothing_in_common, train_unreadable, test_unreadable, eval_unreadable,
        check_everything, two_of_one_name, test_all, test_without_truth, test_over_its_input, test_of_one_name,
        no_folder, not_to_be_written, weights_of_other_kinds, checkpoints, benchmarks_of_ones_own, sheets,
    )
}  # fmt: skip


def amiss(scenario: str, name: str, folder: Path) -> str:
    """What is wrong with what a scenario prints about files called `name`; empty if nothing is."""
    lines = printed_lines(scenario, name, folder / "odd")
    if odd := [line for line in lines if not line.isprintable()]:
        return f"{scenario}: prints {odd[0]!r}"
    if not any(files.shown(name) in line for line in lines):
        return f"{scenario}: does not name {name!r}: {lines}"
    expected = printed_lines(scenario, files.shown(name), folder / "plain")  # has to be escaped nowhere
    refused = not is_utf8(name) and any("not UTF-8" in line for line in lines)
    same = len(lines) == len(expected) if refused else alike(lines) == alike(expected)
    return "" if same else f"{scenario}: prints {lines} instead of {expected}"


def is_utf8(name: str) -> bool:
    return not any("\udc80" <= c <= "\udcff" for c in name)


def alike(lines: list[str]) -> list[str]:
    """The lines sorted and without numbers, some of which are times."""
    return sorted(re.sub(r"\d", "#", line) for line in lines)


def printed_lines(scenario: str, name: str, folder: Path) -> list[str]:
    """What a scenario prints, without progress bars, with `name` for its folder and files.

    torch reads and writes nothing below a folder whose name is not UTF-8: only the files have such a name.
    """
    folder /= name if is_utf8(name) else files.shown(name)
    folder.mkdir(parents=True)
    printed = io.TextIOWrapper(io.BytesIO(), "utf-8")  # strict, as standard output is
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed), contextlib.suppress(SystemExit):
        SCENARIOS[scenario](folder, name)
    printed.flush()
    lines = re.split("[\r\n]", re.sub(r"usage: .*\n( .*\n)*", "", printed.buffer.getvalue().decode()))
    return [line.replace(str(folder.parent), "") for line in lines if line.strip() and not BAR.search(line)]
