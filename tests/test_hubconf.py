"""hubconf.py: the network through torch.hub, from a program that is somewhere else."""

import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, same_network
from test_layout import PROJECT, imported_with

import hubconf
from SAM2UNeXT import SAM2UNeXT

PROGRAM = """
import sys
import numpy as np
import torch
root = sys.argv[1]
model = torch.hub.load(root, "sam2unext_random", source="local", sam2="tiny", aux="test_vit", aux_size=64, size=64)
assert root not in sys.path
assert not model.training
probability = model.predict(np.zeros((50, 60, 3), np.uint8))
assert probability.shape == (50, 60) and 0 <= probability.min() <= probability.max() <= 1
assert model.cutout(np.zeros((50, 60, 3), np.uint8)).size == (60, 50)
"""


@pytest.mark.slow
def test_a_random_network_predicts_after_torch_hub_has_left_the_path(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    subprocess.run([sys.executable, "-c", PROGRAM, str(ROOT)], cwd=tmp_path, env=environment, check=True)


def test_the_dependencies_are_the_packages_that_the_network_imports():
    packages = imported_with(ROOT / "hubconf.py", in_functions=True) - PROJECT - set(sys.stdlib_module_names)
    assert packages - {"pillow_heif"} == set(hubconf.dependencies)


def load(checkpoint, **options):
    return torch.hub.load(str(ROOT), "sam2unext", source="local", checkpoint=str(checkpoint), **options)


def test_a_file_gives_the_trained_network(small, encoders, model):
    loaded = load(small, **encoders)
    assert same_network(loaded, model) and not loaded.training


@pytest.mark.parametrize("name, loader", [("user/model", "from_pretrained"), (ROOT / "tests", "from_checkpoint")])
def test_two_words_are_a_name_on_the_hub_unless_they_are_a_folder(name, loader, monkeypatch):
    monkeypatch.setattr(SAM2UNeXT, loader, lambda name, **options: (name, options))
    assert load(name, download=True) == (str(name), {"download": True})


@pytest.mark.parametrize("name", ["runs/SAM2-UNeXT-20.pth", "typo", "a/b/c"])
def test_what_is_neither_a_file_nor_on_the_hub_is_named(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OSError, match=f"{name}: there is no such file"):
        load(name)
