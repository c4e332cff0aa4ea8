"""The optimiser step of train.py: accumulation, clipping, what it reports, and what stops it."""

import math

import pytest
import recipe
import torch
from conftest import MICRO, read_log
from conftest import train_arguments as arguments
from torch.amp import GradScaler

import train
from SAM2UNeXT import SAM2UNeXT

PLAIN = GradScaler("cpu", enabled=False)
# Gradients are compared in float64, where the order of sums does not matter.
IMAGES, MASKS = recipe.image("steps", (6, 3, 64, 64)).double(), recipe.mask("steps", (6, 1, 64, 64)).double()


class Still(SAM2UNeXT):
    """With BatchNorm in eval mode, so that the images of a batch do not affect each other."""

    def train(self, mode=True):
        return super().train(False)


@pytest.fixture
def model():
    return recipe.fill(Still(**MICRO), 0).double()


def batches(*sizes):
    start = 0
    for size in sizes:
        stop = start + size
        yield IMAGES[start:stop], MASKS[start:stop], [f"{i}.png" for i in range(start, stop)]
        start = stop


def steps(model, optimizer, sizes, scaler=None, **options):
    return list(train.train_one_epoch(train.Objective(model), batches(*sizes), optimizer, scaler or PLAIN, **options))


class Gradients(torch.optim.SGD):
    """Takes no step, and keeps the gradients that each would have followed."""

    def __init__(self, model):
        super().__init__([p for p in model.parameters() if p.requires_grad], lr=0.0)
        self.seen = []

    def step(self, closure=None):
        gradients = [p.grad.double().flatten() for p in self.param_groups[0]["params"] if p.grad is not None]
        self.seen.append(torch.cat(gradients))


def test_accumulation_averages_the_gradient_over_images_even_in_the_last_step(model):
    whole, split = Gradients(model), Gradients(model)
    expected = steps(model, whole, [4, 2])
    accumulated = steps(model, split, [2, 2, 1, 1], accumulate=2)
    for ours, theirs in zip(split.seen, whole.seen, strict=True):
        assert (ours - theirs).norm() < 1e-9 * theirs.norm()
    for ours, theirs in zip(accumulated, expected, strict=True):
        assert ours.terms == pytest.approx(theirs.terms, rel=1e-9)
        assert (ours.images, ours.grad_norm) == (theirs.images, pytest.approx(theirs.grad_norm, rel=1e-9))
    uneven = Gradients(model)
    [last] = steps(model, uneven, [3, 1], accumulate=3)  # a group cut short, its last batch smaller
    assert (uneven.seen[0] - whole.seen[0]).norm() < 1e-9 * whole.seen[0].norm() and last.images == 4


def test_a_step_reports_loss_terms_norm_and_rate(model):
    [step] = steps(model, gradients := Gradients(model), [6])
    loss = train.structure_loss(model(IMAGES), MASKS)
    assert sum(step.terms.values()) == pytest.approx(loss.item(), rel=1e-9)
    bce = torch.nn.functional.binary_cross_entropy_with_logits(model(IMAGES), MASKS)
    assert step.terms["bce"] == pytest.approx(bce.item(), rel=1e-9)
    assert step.grad_norm == pytest.approx(gradients.seen[0].norm().item(), rel=1e-6)
    assert (step.images, step.lr) == (6, 0)


def test_a_new_loss_term_reaches_the_loss_the_log_and_last_pth(toy, from_files, tmp_path, monkeypatch):
    terms = train.loss_terms
    monkeypatch.setattr(train, "loss_terms", lambda *args: terms(*args) | {"area": args[0].sigmoid().mean()})
    train.main(arguments("--epoch 1 --batch_size 6", toy, tmp_path, from_files))
    for line in read_log(tmp_path):
        assert line["area"] > 0 and line["loss"] == pytest.approx(line["bce"] + line["wiou"] + line["area"])
    logits = torch.zeros(1, 1, 64, 64)
    assert train.structure_loss(logits, logits) == pytest.approx(sum(terms(logits, logits).values()) + 0.5)


def test_gradients_are_clipped_to_the_norm_asked_for(model):
    steps(model, free := Gradients(model), [2])
    steps(model, clipped := Gradients(model), [2], clip_grad=0.01)
    assert free.seen[0].norm() > 0.02
    assert clipped.seen[0].norm() == pytest.approx(0.01, rel=1e-3)
    assert torch.allclose(clipped.seen[0] / clipped.seen[0].norm(), free.seen[0] / free.seen[0].norm(), rtol=1e-6)


def test_a_loss_that_is_not_finite_names_the_images_of_its_batch_and_changes_nothing(model):
    optimizer, _ = train.make_optimizer(model, 1e-3, 0, 1)
    before = {name: p.clone() for name, p in model.named_parameters()}
    poisoned = [(i.clone(), m, names) for i, m, names in batches(2, 2, 2)]
    poisoned[1][0][0, 0, 0, 0] = math.nan
    with pytest.raises(ValueError, match="is not finite for 2.png, 3.png; .*last.pth is unchanged"):
        list(train.train_one_epoch(train.Objective(model), poisoned, optimizer, PLAIN, accumulate=3))
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_a_gradient_that_is_not_finite_names_all_images_of_the_step(model):
    model.head.weight.register_hook(lambda gradient: gradient * math.inf)
    with pytest.raises(ValueError, match=r"norm (inf|nan)\) is not finite for 0.png, 1.png, 2.png, 3.png;"):
        steps(model, Gradients(model), [2, 2], accumulate=2)


def test_with_a_loss_scale_a_gradient_may_overflow_until_the_scale_has_fallen_to_1(model):
    overflows = [True, False]
    model.head.weight.register_hook(lambda gradient: gradient * (math.inf if overflows.pop(0) else 1))
    scaler = GradScaler("cpu", init_scale=4.0)
    assert len(steps(model, seen := Gradients(model), [1, 1], scaler)) == 2
    assert len(seen.seen) == 1 and scaler.get_scale() == 2  # the first step was left out
    overflows += [True, True]
    with pytest.raises(ValueError, match="is not finite for 1.png"):
        steps(model, Gradients(model), [1, 1], scaler)


def test_loss_scaling_does_not_change_the_step(model):
    steps(model, plain := Gradients(model), [2, 1], accumulate=2)
    steps(model, scaled := Gradients(model), [2, 1], GradScaler("cpu", init_scale=1024.0), accumulate=2)
    assert (scaled.seen[0] - plain.seen[0]).norm() < 1e-9 * plain.seen[0].norm()


def test_deterministic_requests_deterministic_kernels(toy, from_files, tmp_path):
    try:
        train.main(arguments("--epoch 1 --batch_size 6 --deterministic", toy, tmp_path, from_files))
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
