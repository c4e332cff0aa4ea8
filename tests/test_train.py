"""train.py: loss, steps and checkpoints are those of the original, and bad input is refused at the start."""

import shutil

import numpy as np
import pytest
import recipe
import torch
from conftest import MICRO, contents, failure, golden, same_tensors
from conftest import train_arguments as arguments

import dataset
import train
from SAM2UNeXT import SAM2UNeXT
from unext import pairing
from unext.run import Step

PLAIN = torch.amp.GradScaler("cpu", enabled=False)


def one_step(model, optimizer, images, masks, **options) -> float:
    """A training step on one batch; its loss."""
    batches = [(images, masks, ["a"] * len(images))]
    [step] = train.train_one_epoch(train.Objective(model), batches, optimizer, PLAIN, **options)
    return sum(step.terms.values())


@pytest.mark.parametrize("seed", ["0", "1"])
@pytest.mark.parametrize("variant", ["published_code", "edge_weighted_bce"])
def test_loss_and_gradient_are_those_of_the_original(seed, variant):
    expected = golden("loss.json")[seed][variant]
    logits = (recipe.image("loss", (2, 3, 96, 160), int(seed))[:, :1] * 3).requires_grad_()
    mask = recipe.mask("loss", (2, 1, 96, 160), int(seed))
    loss = train.structure_loss(logits, mask, edge_weighted_bce=variant == "edge_weighted_bce")
    loss.backward()
    assert loss.item() == pytest.approx(expected["loss"], abs=1e-5)
    assert logits.grad.abs().sum().item() == pytest.approx(expected["grad_abs_sum"], rel=1e-5)
    assert logits.grad.flatten()[:4].tolist() == pytest.approx(expected["grad_first"], rel=1e-4)


def assert_steps_of_the_original(model):
    """Two steps of the full network with the parameters of seed 3.

    In float64: AdamW divides by gradients near 0, which in float32 would compare one processor's rounding with
    another's.
    """
    model, expected, device = model.double(), golden("training.json"), model.head.weight.device
    optimizer, scheduler = train.make_optimizer(model, lr=2e-4, weight_decay=5e-4, epochs=2)
    for epoch in range(2):
        images = recipe.image(f"train{epoch}-0", (2, 3, 128, 128), 3).to(device, torch.float64)
        masks = recipe.mask(f"train{epoch}-0", (2, 1, 128, 128), 3).to(device, torch.float64)
        assert optimizer.param_groups[0]["lr"] == pytest.approx(expected["lr"][epoch], rel=1e-9)
        assert one_step(model, optimizer, images, masks) == pytest.approx(expected["loss"][epoch], abs=1e-8)
        scheduler.step()
    state = model.state_dict()
    assert expected["final"].keys() <= state.keys()
    for key, figures in expected["final"].items():
        tensor, scale = state[key].cpu(), figures["abs"]
        assert tensor.abs().mean().item() == pytest.approx(scale, rel=1e-6), key
        assert tensor.mean().item() == pytest.approx(figures["mean"], abs=1e-6 * scale), key
        assert tensor.flatten()[:4].tolist() == pytest.approx(figures["first"], abs=1e-6 * scale), key


@pytest.mark.slow
def test_training_steps_are_those_of_the_original(full_model):
    """In float32 the first loss, which holds everywhere."""
    model = full_model(3).train()
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    with torch.no_grad():
        logits = model(recipe.image("train0-0", (2, 3, 128, 128), 3))
    loss = train.structure_loss(logits, recipe.mask("train0-0", (2, 1, 128, 128), 3))
    assert loss.item() == pytest.approx(golden("training.json")["loss"][0], abs=1e-5)
    model.load_state_dict(buffers, strict=False)
    assert_steps_of_the_original(model)


def test_a_step_changes_exactly_the_trained_tensors():
    model = recipe.fill(SAM2UNeXT(**MICRO), 0)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    optimizer, _ = train.make_optimizer(model, lr=1e-3, weight_decay=0, epochs=1)
    batch = recipe.image("step", (2, 3, 64, 64)), recipe.mask("step", (2, 1, 64, 64))
    one_step(model, optimizer, *batch)
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    statistics = {key for key in before if key.endswith(("running_mean", "running_var", "num_batches_tracked"))}
    assert trained >= {"sam.blocks.0.prompt_learn.0.weight", "align1.weight", "reduce4.bias", "head.weight"}
    assert changed == trained | statistics


def test_learning_rate_follows_a_cosine_to_1e_7():
    optimizer, scheduler = train.make_optimizer(torch.nn.Linear(1, 1), lr=2e-4, weight_decay=0, epochs=20)
    rates = []
    for _ in range(21):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    expected = [1e-7 + (2e-4 - 1e-7) * (1 + np.cos(np.pi * epoch / 20)) / 2 for epoch in range(21)]
    assert rates == pytest.approx(expected)


def test_defaults_are_those_of_the_original():
    text = "--hiera_path a --dinov2_path b --train_image_path c --train_mask_path d --save_path e"
    args = train.get_args_parser().parse_args(text.split())
    assert (args.epoch, args.batch_size, args.lr, args.weight_decay) == (20, 1, 2e-4, 5e-4)
    assert (args.size, args.aux_size, args.sam2, args.aux) == (1024, 448, "large", "vit_large_patch14_dinov2")


def test_the_same_seed_gives_the_same_weights_and_another_seed_others(toy, tmp_path):
    states = []
    for folder, seed in (("first", 0), ("again", 0), ("other", 1)):
        train.main(arguments(f"--epoch 1 --batch_size 6 --seed {seed}", toy, tmp_path / folder))
        states.append(torch.load(tmp_path / folder / "SAM2-UNeXT-1.pth")["state_dict"])
    first, again, other = states
    assert same_tensors(first, again)
    assert not torch.equal(first["reduce1.weight"], other["reduce1.weight"])


@pytest.mark.slow
def test_training_lowers_the_loss(toy):
    torch.manual_seed(0)
    model = SAM2UNeXT(sam2="micro", aux="none")
    pairs = pairing.pair([toy / "train/Image"], [toy / "train/Mask"])
    dataset = train.SegmentationDataset(pairs, 64)
    batch = [torch.stack(tensors) for tensors in zip(*(dataset[1, i][:2] for i in range(6)), strict=True)]
    optimizer, _ = train.make_optimizer(model, lr=2e-3, weight_decay=0, epochs=1)
    losses = [one_step(model, optimizer, *batch) for _ in range(20)]
    assert np.mean(losses[-3:]) < 0.6 * losses[0]


def test_the_start_prints_pairs_parameters_and_device(toy, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")  # the bar's width, where tqdm asks for both
    monkeypatch.setenv("LINES", "50")
    train.main(arguments("--epoch 1 --batch_size 1 --device cpu", toy, tmp_path))
    output = capsys.readouterr()
    trained = sum(p.numel() for p in SAM2UNeXT(**MICRO).parameters() if p.requires_grad)
    assert f"6 pairs; {trained:,} trainable parameters; training on cpu" in output.out
    assert "\n1 image per step: 1 (processes) x 1 (--batch_size) x 1 (--accumulate)\n" in output.out
    assert "loss=" in output.err and "wiou=" in output.err and "lr=0.0002" in output.err and "img/s" in output.err


def test_the_recipe_goes_through_the_whole_program(toy, tmp_path, monkeypatch):
    """What each epoch trains on and with: the order of the images, their flips, learning rate and weight decay."""
    epochs = []

    def record(objective, batches, optimizer, scaler, *options):
        group = optimizer.param_groups[0]
        epochs.append((group["lr"], group["weight_decay"], torch.cat([images for images, _, _ in batches])))
        optimizer.step()
        yield from [Step(3, {"bce": 0}, 0, group["lr"])] * 2

    monkeypatch.setattr(train, "train_one_epoch", record)
    train.main(arguments("--epoch 2 --batch_size 4 --lr 3e-3 --weight_decay 0.25 --seed 5", toy, tmp_path))
    assert [(rate, decay) for rate, decay, _ in epochs] == [(3e-3, 0.25), (pytest.approx((3e-3 + 1e-7) / 2), 0.25)]
    dataset = train.SegmentationDataset(pairing.pair([toy / "train/Image"], [toy / "train/Mask"]), 64, seed=5)
    orders = []
    for epoch, (_, _, images) in enumerate(epochs, 1):
        as_drawn = [dataset[epoch, i][0] for i in range(6)]
        orders.append([i for image in images for i in range(6) if torch.equal(image, as_drawn[i])])
        assert sorted(orders[-1]) == list(range(6))  # each image once, flipped as drawn for this epoch
    assert orders[0] != orders[1] and orders[0] != list(range(6))


def test_an_unreadable_image_in_a_worker_process_is_one_line(toy, tmp_path, monkeypatch, capsys):
    shutil.copytree(toy / "train", tmp_path / "train")
    mask = tmp_path / "train/Mask/toy_0003.png"
    mask.write_bytes(mask.read_bytes()[:100])  # its header is whole
    monkeypatch.setattr(dataset, "MASKS_CHECKED", 1)
    status, line = failure(train.main, arguments("--workers 1", tmp_path, tmp_path / "run"), capsys)
    assert status == 1
    assert line.split(": ", 1)[1].startswith(f"{tmp_path}/train/Mask/toy_0003.png: cannot be read as an image")


@pytest.mark.parametrize("option", ["", "--edge_weighted_bce"])
def test_the_papers_loss_is_an_option(option, toy, tmp_path, monkeypatch):
    seen = []

    def loss_terms(logits, mask, edge_weighted_bce=False):
        seen.append(edge_weighted_bce)
        return {"bce": logits.mean()}

    monkeypatch.setattr(train, "loss_terms", loss_terms)
    train.main(arguments(f"--epoch 1 --batch_size 6 {option}", toy, tmp_path))
    assert seen == [bool(option)]


@pytest.mark.parametrize(
    "options, message",
    [
        ("--dinov2_path=", "--dinov2_path is missing"),
        ("--hiera_path=", "--hiera_path or --dinov2_path is missing"),
        ("--hiera_path none.pt", "none.pt: there is no such file"),
        ("--aux_size 60", "60 is not a multiple"),
        ("--device cuda:97", "--device cuda:97: torch cannot compute there"),
        ("--device gpu", "--device gpu: torch cannot compute there"),
        ("--sync_bn --device cpu", "--sync_bn works on GPUs only, and not with --compile"),
        ("--save_path=", "argument --save_path: is empty"),
        ("--size 100", "argument --size: "),
        ("--size 0", "argument --size: "),
        ("--epoch 0", "argument --epoch: "),
        ("--lr -1", "argument --lr: "),
        ("--lr nan", "argument --lr: "),
        ("--seed 99999999999999", "argument --seed: "),
    ],
)
def test_input_that_needs_mending_is_one_line_and_status_2(options, message, toy, tmp_path, capsys):
    status, line = failure(lambda options: train.main(arguments(options, toy, tmp_path)), options, capsys)
    assert status == 2 and message in line and len(line) < 400 and not contents(tmp_path)
