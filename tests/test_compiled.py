"""--compile makes one graph, once, and takes the same steps as the eager network; for CUDA graphs, see graphs.py."""

import pytest
import recipe
import torch
from conftest import MICRO, close_maps, failure, predict, predict_arguments, read_log, validation
from conftest import train_arguments as arguments
from torch.amp import GradScaler

import test as script
import train
from SAM2UNeXT import SAM2UNeXT
from unext import device

# In float64, where the order of sums does not show.
IMAGES, MASKS = recipe.image("compiled", (6, 3, 64, 64)).double(), recipe.mask("compiled", (6, 1, 64, 64)).double()


def run(epochs: int, accumulate: int, checkpointed: bool, compiled: bool) -> tuple[list, dict[str, torch.Tensor]]:
    """The steps of training in batches of two, the last of them smaller, and the network after them."""
    model = recipe.fill(SAM2UNeXT(**MICRO), 0).double()
    model.sam.grad_checkpointing = checkpointed
    objective = train.Objective(model)
    if compiled:
        device.compile_module(objective)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    steps = []
    for _ in range(epochs):
        batches = [(IMAGES[i], MASKS[i], ["a"]) for i in (slice(0, 2), slice(2, 4), slice(4, 5))]
        scaler = GradScaler("cpu", enabled=False)
        steps += train.train_one_epoch(objective, batches, optimizer, scaler, accumulate)
        with torch.no_grad():
            model.eval()(IMAGES[:1])  # as validation does
    return steps, model.state_dict()


@pytest.mark.slow
@pytest.mark.parametrize("epochs, accumulate, checkpointed", [(7, 1, False), (2, 3, True)])
def test_compiled_training_is_a_single_graph_and_takes_the_eager_steps(epochs, accumulate, checkpointed, graphs):
    eager, expected = run(epochs, accumulate, checkpointed, compiled=False)
    assert graphs.graphs == 0
    steps, state = run(epochs, accumulate, checkpointed, compiled=True)
    assert (graphs.graphs, graphs.forward_passes, graphs.backward_passes) == (1, 1, 1)
    assert graphs.runs == 2 * epochs  # the smaller batches ran without it
    assert len(steps) == len(eager) >= 2
    for ours, theirs in zip(steps, eager, strict=True):
        assert ours.images == theirs.images and ours.grad_norm == pytest.approx(theirs.grad_norm, rel=1e-9)
        assert ours.terms == pytest.approx(theirs.terms, rel=1e-9)
    for name, tensor in expected.items():  # weights, and BatchNorm's statistics
        assert torch.allclose(state[name].double(), tensor.double(), rtol=1e-9, atol=1e-12), name


@pytest.mark.slow
def test_a_compiled_run_is_validated_and_resumed(graphs, toy, from_files, tmp_path, capsys):
    text = f"--epoch 2 --batch_size 4 --log_every 1 --lr 1e-5 {validation(toy)}"
    train.main(arguments(text, toy, tmp_path / "eager", from_files))
    assert "compiling" not in capsys.readouterr().out
    text += " --compile"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train.Run, "end_epoch", lambda *_: exit(9))  # before the first epoch is counted as done
        with pytest.raises(SystemExit):
            train.main(arguments(text, toy, tmp_path / "compiled", from_files))
    assert graphs.graphs == graphs.forward_passes == graphs.runs == 1
    train.main(arguments(f"{text} --resume", toy, tmp_path / "compiled", from_files))
    assert "compiling: the first batch takes a minute or two" in capsys.readouterr().out
    assert graphs.runs == 2  # one of two batches in each epoch
    logs = [read_log(tmp_path / name) for name in ("compiled", "eager")]
    steps, eager = ([line for line in log if "step" in line] for log in logs)
    assert len(eager) == 4
    for ours, theirs in zip(steps, eager, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-3)  # AdamW makes much of last bits
    assert steps[0]["loss"] == pytest.approx(eager[0]["loss"], rel=1e-5)


@pytest.mark.slow
def test_compiled_prediction_has_one_graph_for_all_images(graphs, micro_checkpoint, toy, tmp_path):
    options = "--batch_size", 3, "--flip"  # four images: the last batch has one
    eager = predict(micro_checkpoint, toy / "test/Image", tmp_path / "eager", *options)
    compiled = predict(micro_checkpoint, toy / "test/Image", tmp_path / "compiled", *options, "--compile")
    assert graphs.graphs == 1 and graphs.runs == 4
    assert close_maps(compiled, eager) and len(eager) == 4


def test_precisions_that_torch_compiles_wrongly_are_refused(toy, micro_checkpoint, tmp_path, capsys):
    options = "--precision", "bf16", "--device", "cpu", "--compile"
    for main, args in (
        (train.main, arguments(" ".join(options), toy, tmp_path / "run")),
        (script.main, predict_arguments(micro_checkpoint, toy / "test/Image", tmp_path / "maps", *options)),
    ):
        status, line = failure(main, args, capsys)
        assert status == 2 and "--compile: torch is not reliable in bf16" in line and "--precision fp32" in line
    assert not [*tmp_path.iterdir()]
