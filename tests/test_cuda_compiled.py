"""--compile on a GPU, with CUDA graphs; test_compiled.py shows more, with a backend that imitates them."""

import numpy as np
import pytest
import torch
from conftest import predict_arguments, read_log, read_maps
from conftest import train_arguments as arguments
from test_cuda import DEVICE, assert_close, loss_and_gradients, network
from torch._dynamo.utils import counters
from torch._inductor.cudagraph_trees import CUDAGraphTreeManager

import test as script
import train
from unext import device

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")]


class Graphs:
    """What torch.compile made since the start of a test: the CUDA graphs that it recorded and replayed, by mode."""

    def __init__(self, monkeypatch):
        self.recorded, self.replayed = [], 0
        record, execute = CUDAGraphTreeManager.record_function, CUDAGraphTreeManager.execute_node

        def record_function(manager, inputs, function_id):
            self.recorded.append(manager.id_to_mode[function_id].name)
            return record(manager, inputs, function_id)

        def execute_node(*args, **options):
            self.replayed += 1
            return execute(*args, **options)

        monkeypatch.setattr(CUDAGraphTreeManager, "record_function", record_function)
        monkeypatch.setattr(CUDAGraphTreeManager, "execute_node", execute_node)

    def assert_single(self, *modes):
        """One graph of the network, of which CUDA graphs for these modes were recorded and most often replayed."""
        assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]
        assert {*self.recorded} == {*modes} and self.replayed > len(self.recorded)


@pytest.fixture
def graphs(monkeypatch):
    torch._dynamo.reset()
    counters.clear()
    yield Graphs(monkeypatch)
    torch._dynamo.reset()


def test_compiled_prediction_has_one_graph_for_all_images_even_of_a_short_batch(
    graphs, micro_checkpoint, toy, tmp_path
):
    for folder, more in (("eager", ()), ("compiled", ("--compile",))):
        options = ("--device", DEVICE, "--batch_size", 4, "--flip", *more)  # six images: the last batch has two
        script.main(predict_arguments(micro_checkpoint, toy / "train/Image", tmp_path / folder, *options))
    graphs.assert_single("INFERENCE")
    eager, compiled = read_maps(tmp_path / "eager"), read_maps(tmp_path / "compiled")
    assert eager.keys() == compiled.keys() and len(eager) == 6
    for name, map_ in eager.items():
        assert np.abs(compiled[name].astype(int) - map_).max() <= 1


# AdamW makes much of the last bits, and bf16 has few of them, hence the small rate.
@pytest.mark.parametrize("more, tolerance", [
    ("--batch_size 4", 1e-2),  # of six images: the second batch has two, and runs uncompiled
    ("--batch_size 1 --accumulate 2 --grad_checkpointing", 1e-2),
    ("--batch_size 4 --precision bf16", 3e-2),
])  # fmt: skip
def test_compiled_training_has_one_graph_and_takes_the_eager_steps(more, tolerance, graphs, toy, tmp_path):
    losses, networks = [], []
    for compiled in ("", "--compile"):
        folder = tmp_path / f"run{compiled}"
        train.main(arguments(f"--device {DEVICE} --epoch 10 --lr 2e-5 --log_every 1 {more} {compiled}", toy, folder))
        losses.append([line["loss"] for line in read_log(folder) if "step" in line])
        networks.append(torch.load(folder / "last.pth")["state_dict"])
    graphs.assert_single("FORWARD", "BACKWARD")
    eager, compiled = losses
    assert compiled == pytest.approx(eager, rel=tolerance) and len(eager) >= 20
    eager, compiled = networks
    statistics = [name for name in eager if "running_" in name or name.endswith("num_batches_tracked")]
    assert len(statistics) == 24
    assert_close(*({name: state[name].double() for name in statistics} for state in (compiled, eager)), 10 * tolerance)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-3), (torch.bfloat16, 0.2)])
def test_a_compiled_network_has_the_gradients_of_the_eager_one(dtype, tolerance, graphs):
    model = network(dtype)
    loss, expected = loss_and_gradients(model)
    device.compile_module(model)
    for _ in range(4):  # the first warms up, the second records
        compiled, gradients = loss_and_gradients(model)
    graphs.assert_single("FORWARD", "BACKWARD")
    assert compiled == pytest.approx(loss, rel=0.1 * tolerance)
    assert_close(gradients, expected, tolerance)
