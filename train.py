"""Trains SAM2-UNeXT on a folder of images and a folder of masks of the same names.

One GPU, with the recipe of the paper (20 epochs, batch 1, 1024 / 448 px):

    python train.py --hiera_path sam2_hiera_large.pt --dinov2_path vit_large_patch14_dinov2.safetensors \\
        --train_image_path data/images --train_mask_path data/masks --save_path runs/mine

Four GPUs; for several machines see docs/training.md:

    torchrun --standalone --nproc_per_node 4 train.py ...

No GPU, to try it: a small network with random encoders and few pixels:

    python train.py --hiera_path random --sam2 tiny --dinov2_path random --aux vit_small_patch14_dinov2 \\
        --size 128 --aux_size 112 --batch_size 8 --lr 1e-3 \\
        --train_image_path data/images --train_mask_path data/masks --save_path runs/small

If it was stopped or killed, the same command with --resume continues where last.pth was written.
"""

import argparse
import math
import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, nullcontext
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from dataset import SegmentationDataset, check_files, epoch_batches, load
from evaluation import benchmarks
from sam2.build_sam import CONFIGS
from SAM2UNeXT import SAM2UNeXT
from unext import checkpoint, cli, files, run

MIN_LEARNING_RATE = 1e-7  # at the end of the cosine
KEPT_EVERY = 5  # epochs
LESS_MEMORY = "--precision bf16, --grad_checkpointing, or a smaller --batch_size with --accumulate need less"
# What a resumed run must have begun with; other options do not change the weights.
RECIPE = ["sam2", "aux", "size", "aux_size", "epoch", "lr", "batch_size", "accumulate", "weight_decay"]
RECIPE += ["edge_weighted_bce", "clip_grad", "sync_bn", "seed"]


def structure_loss(logits: Tensor, mask: Tensor, edge_weighted_bce: bool = False) -> Tensor:
    """Binary cross entropy plus weighted IoU loss: a scalar, from logits and mask in [0, 1], both (B, 1, H, W).

    Pixels near the mask's edges weigh up to six times as much (Wei et al., F3Net, arXiv:1911.11445). The cross entropy
    is the plain mean over the batch, as in the published program; `edge_weighted_bce` weights it too, as in the paper.
    """
    return sum(loss_terms(logits, mask, edge_weighted_bce))


def loss_terms(logits: Tensor, mask: Tensor, edge_weighted_bce: bool = False) -> tuple[Tensor, Tensor]:
    """The two terms of `structure_loss`, cross entropy and weighted IoU loss, each averaged over the batch."""
    weight = 1 + 5 * (F.avg_pool2d(mask, kernel_size=31, stride=1, padding=15) - mask).abs()
    if edge_weighted_bce:
        bce = F.binary_cross_entropy_with_logits(logits, mask, reduction="none")
        bce = ((weight * bce).sum(dim=(2, 3)) / weight.sum(dim=(2, 3))).mean()
    else:
        bce = F.binary_cross_entropy_with_logits(logits, mask)
    probability = logits.sigmoid()
    intersection = (weight * probability * mask).sum(dim=(2, 3))  # (B, 1)
    total = (weight * (probability + mask)).sum(dim=(2, 3))
    iou = 1 - (intersection + 1) / (total - intersection + 1)
    return bce, iou.mean()


def train_one_epoch(
    model: nn.Module, batches: Iterable[tuple[Tensor, Tensor, Sequence[str]]], optimizer: torch.optim.Optimizer,
    scaler: GradScaler, accumulate: int = 1, clip_grad: float = math.inf, edge_weighted_bce: bool = False,
) -> Iterator[dict[str, float]]:  # fmt: skip
    """One pass over `batches` of (images, masks, names); yields what each optimiser step saw, over all processes.

    A step follows the mean gradient over the images of `accumulate` batches; the last one takes what is left. Raises
    ValueError that names the images if the loss or the gradient is not finite; that step is not taken.
    """
    model.train()
    trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    device = trained[0].device
    batches = iter(batches)
    while group := list(islice(batches, accumulate)):
        own_pictures = sum(len(images) for images, _, _ in group)
        terms = []
        optimizer.zero_grad(set_to_none=True)
        for i, (images, masks, _) in enumerate(group, 1):
            images = images.to(device, non_blocking=True)  # (B, 3, S, S)
            masks = masks.to(device, non_blocking=True)  # (B, 1, S, S) in [0, 1]
            wait = isinstance(model, DistributedDataParallel) and i < len(group)  # exchange gradients once per step
            with model.no_sync() if wait else nullcontext():
                bce, wiou = loss_terms(model(images), masks, edge_weighted_bce)
                scaler.scale((bce + wiou) * (len(images) / own_pictures)).backward()
            terms.append(torch.stack([bce, wiou, torch.ones_like(bce)]).detach() * len(images))
        scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(trained, clip_grad).item()
        bce, wiou, pictures = cli.reduce_all(torch.stack(terms).sum(0)).tolist()
        # fp16 gradients overflow now and then; the scaler skips such a step and lowers the scale, down to 1.
        if not math.isfinite(bce + wiou) or not (math.isfinite(norm) or scaler.get_scale() > 1):
            stop_on_non_finite(terms, [names for _, _, names in group], norm)
        scaler.step(optimizer)
        scaler.update()
        rate = optimizer.param_groups[0]["lr"]
        yield {"pictures": pictures, "bce": bce / pictures, "wiou": wiou / pictures, "grad_norm": norm, "lr": rate}


def stop_on_non_finite(terms: list[Tensor], names: list[Sequence[str]], norm: float) -> None:
    """Raises ValueError with the images whose loss is not finite or, if only the gradient is not, with all of them."""
    culprits = [name for term, batch in zip(terms, names, strict=True) if not term.isfinite().all() for name in batch]
    culprits = cli.gather_all(culprits) or cli.gather_all([name for batch in names for name in batch])
    raise ValueError(
        f"the loss or the gradient (norm {norm:.3g}) is not finite for {files.listing(culprits)}; the step was not "
        "taken and last.pth is unchanged: look at these images, or try --clip_grad 1, a lower --lr, --precision fp32"
    )


def make_optimizer(
    model: nn.Module, lr: float, weight_decay: float, epochs: int
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """AdamW over what is trained, and a cosine over the epochs, to be stepped once after each."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=weight_decay)
    return optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs, eta_min=MIN_LEARNING_RATE)


class Setup(NamedTuple):
    """What `set_up` makes and the training loop uses."""

    args: argparse.Namespace
    device: str
    pairs: list[tuple[Path, Path]]
    val_pairs: list[tuple[Path, Path]]
    network: nn.Module  # the model, wrapped if there are several processes
    state: run.State


def set_up(args: argparse.Namespace, held: ExitStack) -> Setup | None:
    """Checks the input and prepares a run, with its folder locked until `held` is closed.

    None if the run to resume is finished. Raises ValueError or OSError.
    """
    rank, _, processes = cli.ranks()
    device = cli.device(args.device)
    cli.keep_freed_memory(device)
    dtype = cli.precision(args.precision, device)
    check_options(args, device)
    pairs, val_pairs = find_pairs(args)
    if rank == 0:
        held.enter_context(files.locked(args.save_path))
    check_files([*pairs, *val_pairs], args.workers)
    if args.deterministic:
        cli.make_deterministic(device)
    torch.manual_seed(args.seed)
    model = build_model(args, dtype)
    recipe = {f"--{name}": getattr(args, name) for name in RECIPE}
    recipe |= {"the precision": str(dtype), "the number of pairs": len(pairs), "the number of processes": processes}
    last = run.read_last(args.save_path) if args.resume else None
    if last:
        path, content = last
        run.check_recipe(path, content["recipe"], recipe)
        checkpoint.load_trained(model, path, checkpoint.as_trained(content, path))
    elif args.init:
        checkpoint.load_trained(model, args.init, checkpoint.read_network(args.init))
    if not args.resume:
        run.start_anew(args.save_path)
    model.to(device)
    if args.compile:
        model.compile()
    optimizer, scheduler = make_optimizer(model, args.lr, args.weight_decay, args.epoch)
    scaler = GradScaler(torch.device(device).type, enabled=dtype == torch.float16)
    parts = {"optimizer": optimizer, "scheduler": scheduler, "scaler": scaler}
    progress = run.restore_parts(path, content, parts) if last else run.Progress()
    if progress.epoch > args.epoch:
        print(f"{files.shown(path)}: the run is finished")
        return None
    if args.resume:
        words = f"continuing after {progress}" if last else "nothing to resume, starting a new run"
        print(f"{files.shown(path if last else args.save_path)}: {words}")
    network = cli.distribute(model, device, args.sync_bn) if processes > 1 else model
    return Setup(args, device, pairs, val_pairs, network, run.State(args.save_path, model, parts, progress, recipe))


def check_options(args: argparse.Namespace, device: str) -> None:
    """Raises ValueError for options that do not go together."""
    if args.sync_bn and args.compile:
        raise ValueError("--sync_bn and --compile do not work together: leave one out")
    if args.sync_bn and not device.startswith("cuda"):
        raise ValueError("--sync_bn: torch supports it on GPUs only; leave it out")
    if bool(args.benchmark) == bool(args.train_image_path):
        raise ValueError("give either --benchmark, or --train_image_path and --train_mask_path")


def find_pairs(args: argparse.Namespace) -> tuple[list[tuple[Path, Path]], list[tuple[Path, Path]]]:
    """The (image, mask) files to train on and to validate on. Raises ValueError or OSError that names the remedy."""
    remedy = "add the missing files or ignore these with --skip_unpaired"
    validation = files.pair(args.val_image_path, args.val_mask_path, args.skip_unpaired, remedy=remedy)
    if not args.benchmark:
        return files.pair(args.train_image_path, args.train_mask_path, args.skip_unpaired, remedy=remedy), validation
    name, root = args.benchmark
    places = benchmarks.find_train(benchmarks.load(name), root)
    print(*places, sep="\n")
    return [pair for place in places for pair in place.pairs], validation


def build_model(args: argparse.Namespace, precision: torch.dtype = torch.float32) -> SAM2UNeXT:
    """The network that the arguments describe. Raises ValueError or OSError that names the remedy."""
    if not args.hiera_path or (args.aux != "none" and not args.dinov2_path):
        raise ValueError("--hiera_path or --dinov2_path is missing: give a file, a URL, or the word random")
    paths = (None if path == "random" else path for path in (args.hiera_path, args.dinov2_path))
    options = {"sam2": args.sam2, "aux": args.aux, "aux_size": args.aux_size, "size": args.size}
    model = SAM2UNeXT(*paths, **options, precision=precision, allow_sam2_1=args.allow_sam2_1)
    model.sam.grad_checkpointing = args.grad_checkpointing
    return model


def train(setup: Setup, stop: list[int]) -> None:
    """Trains until the last epoch or until `stop` gets a signal's number. Raises ValueError or OSError."""
    args, progress, parts = setup.args, setup.state.progress, setup.state.parts
    rank, _, processes = cli.ranks()
    epochs = range(progress.epoch, args.epoch + 1)
    order = [epoch_batches(len(setup.pairs), args.batch_size, args.seed, epoch, rank, processes) for epoch in epochs]
    log = start_log(setup, math.ceil(len(order[0]) / args.accumulate)) if rank == 0 else None
    order[0] = order[0][progress.step * args.accumulate :]  # a resumed run skips what it has done
    dataset = SegmentationDataset(setup.pairs, args.size, args.seed)
    batches = load(dataset, sum(order, []), args.workers, args.accumulate)
    options = args.accumulate, args.clip_grad or math.inf, args.edge_weighted_bce
    for epoch, keys in zip(epochs, order, strict=True):
        with tqdm(total=len(setup.pairs), initial=progress.pictures, unit="img", disable=rank > 0) as bar:
            bar.set_description(f"epoch {epoch}/{args.epoch}")
            part = islice(batches, len(keys))
            for figures in train_one_epoch(setup.network, part, parts["optimizer"], parts["scaler"], *options):
                progress.count(figures)
                bar.set_postfix(loss=f"{progress.losses()['loss']:.4f}", lr=f"{figures['lr']:.2e}", refresh=False)
                bar.update(int(figures["pictures"]))
                if log:
                    log.step(progress, figures, setup.device)
                if args.save_every and progress.step % args.save_every == 0:
                    run.save_last(setup.state)
                run.stop_if_asked(setup.state, stop)
        end_epoch(setup, log, stop)
    if log:
        log.close()
    if processes > 1:
        torch.distributed.destroy_process_group()


def start_log(setup: Setup, steps_per_epoch: int) -> run.Log:
    """Prints what is trained, writes args.json and opens the logs."""
    args, (_, _, processes) = setup.args, cli.ranks()
    trained = sum(parameter.numel() for parameter in setup.state.model.parameters() if parameter.requires_grad)
    effective, precision = processes * args.batch_size * args.accumulate, setup.state.model.precision
    what = f"{files.count(len(setup.pairs), 'pair')}; {trained:,} trainable parameters"
    print(f"{what}; training on {setup.device} in {precision}")
    print(f"{effective} images per step: {processes} process(es) x batch {args.batch_size} x {args.accumulate}")
    run.write_arguments(args, {"precision": precision, "processes": processes, "effective_batch": effective})
    return run.Log(args.save_path, setup.state.progress, args.log_every, steps_per_epoch, args.epoch)


def end_epoch(setup: Setup, log: run.Log | None, stop: list[int]) -> None:
    """Validates, logs, and writes the epoch's files."""
    args, model, progress = setup.args, setup.state.model, setup.state.progress
    scores = run.validate(model, setup.val_pairs, args.workers, stop) if setup.val_pairs else {}
    run.stop_if_asked(setup.state, stop)
    setup.state.parts["scheduler"].step()
    if log:
        log.epoch(progress, progress.losses() | scores, run.panels(model, setup.val_pairs or setup.pairs))
        if scores.get("Smeasure", -math.inf) > progress.best:
            progress.best = scores["Smeasure"]
            checkpoint.save_network(args.save_path / "best.pth", model, progress.epoch)
        if progress.epoch % KEPT_EVERY == 0 or progress.epoch == args.epoch:
            path = args.save_path / f"SAM2-UNeXT-{progress.epoch}.pth"
            checkpoint.save_network(path, model, progress.epoch)
            print(f"saved {files.shown(path)}")
    progress.next_epoch()
    run.save_last(setup.state)


def main(args: argparse.Namespace) -> None:
    cli.silence_other_ranks()
    warnings.filterwarnings("ignore", "Detected call of .lr_scheduler.step")  # in a run resumed at the end of an epoch
    with ExitStack() as held:
        with cli.exit_on_error(cli.NOTHING_STARTED, LESS_MEMORY):
            setup = set_up(args, held)
        if setup:
            with cli.exit_on_error(cli.NOT_COMPLETED, LESS_MEMORY), run.noted_signals() as stop:
                train(setup, stop)


def get_args_parser() -> argparse.ArgumentParser:
    parser = cli.parser(__doc__)
    network = parser.add_argument_group("network")
    network.add_argument("--hiera_path", required=True, help="SAM 2's weights: a file, a URL, or the word random")
    network.add_argument("--dinov2_path", help="DINOv2's weights, likewise; required unless --aux none")
    network.add_argument("--sam2", default="large", choices=list(CONFIGS), help="size of the trunk")
    network.add_argument("--aux", default="vit_large_patch14_dinov2", help="auxiliary encoder: a timm model, or none")
    network.add_argument("--allow_sam2_1", action="store_true", help="accept SAM 2.1's weights too")
    network.add_argument("--init", metavar="FILE", help="start from these trained weights instead of random ones")
    data = parser.add_argument_group("data")
    data.add_argument("--benchmark", nargs=2, metavar=("NAME", "ROOT"), help=cli.BENCHMARK_HELP)
    data.add_argument("--train_image_path", nargs="+", default=[], metavar="DIR", help="folder(s) of images")
    data.add_argument("--train_mask_path", nargs="+", default=[], metavar="DIR", help="folder(s) of masks")
    data.add_argument("--val_image_path", nargs="+", default=[], metavar="DIR", help="images to validate on each epoch")
    data.add_argument("--val_mask_path", nargs="+", default=[], metavar="DIR", help="their masks")
    data.add_argument("--skip_unpaired", action="store_true", help="ignore images and masks without a partner")
    data.add_argument("--size", type=cli.number(multiple=32, least=32), default=1024, help="side of the input, px")
    data.add_argument("--aux_size", type=cli.number(), default=448, help="side of the auxiliary encoder's input, px")
    add_recipe(parser.add_argument_group("training"))
    add_run(parser.add_argument_group("run"))
    return parser


def add_recipe(group: argparse._ArgumentGroup) -> None:
    positive, share = cli.number(), cli.number(float, least=0)
    group.add_argument("--epoch", type=positive, default=20, help="passes over the data")
    group.add_argument("--lr", type=share, default=2e-4, help="initial learning rate")
    group.add_argument("--batch_size", type=positive, default=1, help="images per batch, of each process")
    group.add_argument("--accumulate", type=positive, default=1, metavar="K", help="batches per step")
    group.add_argument("--weight_decay", type=share, default=5e-4, help="of AdamW")
    group.add_argument("--edge_weighted_bce", action="store_true", help="weight the cross entropy as the paper does")
    group.add_argument("--clip_grad", type=share, default=0, help="maximum gradient norm; 0: none")
    group.add_argument("--sync_bn", action="store_true", help="BatchNorm over the images of all GPUs")
    group.add_argument("--seed", type=cli.number(least=0), default=0, help="of new weights, order and flips")


def add_run(group: argparse._ArgumentGroup) -> None:
    none, positive, cores = cli.number(least=0), cli.number(), min(8, os.cpu_count() or 1)
    group.add_argument("--save_path", type=cli.path, required=True, metavar="DIR", help="for checkpoints and logs")
    group.add_argument("--resume", action="store_true", help="continue from last.pth in save_path if there is one")
    group.add_argument("--save_every", type=none, default=500, help="steps between last.pth; 0: each epoch")
    group.add_argument("--log_every", type=positive, default=50, help="steps between lines of log.jsonl")
    group.add_argument("--precision", default="auto", choices=cli.PRECISIONS, help="auto: bf16 if native, else fp32")
    group.add_argument("--grad_checkpointing", action="store_true", help="less memory, a third more time")
    group.add_argument("--compile", action="store_true", help="compile the network, for GPUs: minutes at the start")
    group.add_argument("--deterministic", action="store_true", help="the same weights from the same run on GPUs too")
    group.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, ... or auto")
    group.add_argument("--workers", type=none, default=cores, help="processes that read images")


if __name__ == "__main__":
    main(get_args_parser().parse_args())
