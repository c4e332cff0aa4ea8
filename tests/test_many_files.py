"""What starting costs for each file of a folder: a few hundred bytes, and no question to the system."""

import os
import tracemalloc
from unittest import mock

import numpy as np
import pytest
from conftest import eval_arguments, predict_arguments, save_image, train_arguments

import eval as evaluation
import test as prediction
import train
from unext import output

ASKING = ("stat", "lstat", "scandir", "listdir", "readlink")


def start_prediction(folder):
    args = predict_arguments("x", folder / "images", folder / "out", "--save", "map,overlay")
    tasks = prediction.tasks_of(args)
    output.check_folders(tasks, args)
    output.check_settings(tasks, args, {"size": 64})
    output.prepare(tasks, args, {"size": 64})
    assert len(output.remaining(tasks, args)) == len(tasks)
    return tasks


def start_evaluation(folder):
    args = eval_arguments("--dataset_name", "many", "--pred_path", folder / "maps", "--gt_path", folder / "masks")
    _, datasets = evaluation.find_datasets(args)
    return evaluation.images_to_score(datasets, allow_missing=False)


def start_training(folder):
    args = train_arguments("", folder, folder / "run")
    args.train_image_path, args.train_mask_path = [folder / "images"], [folder / "masks"]
    return train.find_pairs(args)


PROGRAMS = {start_prediction: 1, start_evaluation: 2, start_training: 2}  # and the files of an image


@pytest.fixture
def folder_of(tmp_path):
    """Makes a folder of so many images, masks and maps."""

    def make(count):
        for kind in ("images", "masks", "maps"):
            first = save_image(tmp_path / str(count) / kind / "photograph_00000.png", np.full((4, 6), 255, np.uint8))
            for i in range(1, count):
                os.link(first, first.with_name(f"photograph_{i:05}.png"))
        return tmp_path / str(count)

    return make


@pytest.mark.parametrize("start", PROGRAMS)
def test_the_system_is_asked_about_folders_not_about_each_file(start, folder_of):
    asked = []
    for folder in (folder_of(4), folder_of(40)):
        with mock.patch.multiple(os, **{name: mock.Mock(wraps=getattr(os, name)) for name in ASKING}):
            start(folder)
            asked.append([getattr(os, name).call_count for name in ASKING])
    assert asked[0] == asked[1]


@pytest.mark.parametrize("start", PROGRAMS)
def test_a_file_takes_few_bytes(start, folder_of):
    peaks = []
    for folder in (folder_of(100), folder_of(600)):
        tracemalloc.start()
        kept = start(folder)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert kept
    assert (peaks[1] - peaks[0]) / 500 < 600 * PROGRAMS[start]
