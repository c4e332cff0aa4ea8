"""Trains SAM2-UNeXT on a folder of images and a folder of masks of the same names.

One GPU, with the recipe of the paper (20 epochs, batch 1, 1024 / 448 px), and four GPUs:

    python train.py --train_image_path data/images --train_mask_path data/masks --save_path runs/mine \\
        --hiera_path weights/sam2_hiera_large.pt --dinov2_path weights/vit_large_patch14_dinov2.safetensors
    torchrun --standalone --nproc_per_node 4 train.py ...

No GPU, to try it: a small network with random encoders and few pixels:

    python train.py --hiera_path random --sam2 tiny --dinov2_path random --aux vit_small_patch14_dinov2 \\
        --size 128 --aux_size 112 --batch_size 8 --lr 1e-3 \\
        --train_image_path data/images --train_mask_path data/masks --save_path runs/small

If it was stopped or killed, the same command with --resume continues from last.pth. Without --resume, a folder that
holds a run is refused. On GPUs, convolutions in fp32 use TF32, torch's default.
"""

import argparse
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, nullcontext
from functools import partial
from itertools import islice

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.nn.parallel import DistributedDataParallel

from dataset import SegmentationDataset, check_files, epoch_batches, image_tensor, load
from evaluation import benchmarks, metrics
from sam2.build_sam import CONFIGS
from SAM2UNeXT import SAM2UNeXT, probability_map, stretch
from unext import cli, device, files, pairing
from unext.download import fetch_published
from unext.errors import InputError
from unext.images import configure_reading, read_image
from unext.log import Log
from unext.masks import read_mask
from unext.pairing import Pair
from unext.run import Run, Step, check_folder
from unext.workers import cores, in_order, progress_bar

MIN_LEARNING_RATE = 1e-7  # at the end of the cosine
Terms = dict[str, Tensor]  # of the loss, by name
LESS_MEMORY = "--precision bf16, --grad_checkpointing, a smaller --batch_size with --accumulate, no --compile need less"
# Options that change the weights, so that --resume refuses other values, as it does for those of network and loss.
RECIPE = ("epoch", "lr", "batch_size", "accumulate", "weight_decay", "clip_grad", "sync_bn", "seed")
RECIPE += ("white", "val_share")  # of the data


def loss_terms(logits: Tensor, mask: Tensor, edge_weighted_bce: bool = False) -> Terms:
    """The terms of the loss by name, each a scalar, a mean over the batch; training minimises their sum.

    Binary cross entropy and weighted IoU loss (Wei et al., F3Net, arXiv:1911.11445) of logits and mask in [0, 1], both
    (B, 1, H, W). Pixels near the mask's edges weigh up to six times as much. The cross entropy is a plain mean over the
    batch, as in the published program; `edge_weighted_bce` weights it too, as in the paper.
    """
    weight = 1 + 5 * (F.avg_pool2d(mask, kernel_size=31, stride=1, padding=15) - mask).abs()
    if edge_weighted_bce:
        bce = F.binary_cross_entropy_with_logits(logits, mask, reduction="none")
        bce = ((weight * bce).sum(dim=(2, 3)) / weight.sum(dim=(2, 3))).mean()
    else:
        bce = F.binary_cross_entropy_with_logits(logits, mask)
    probability = logits.sigmoid()
    intersection = (weight * probability * mask).sum(dim=(2, 3))  # (B, 1)
    total = (weight * (probability + mask)).sum(dim=(2, 3))
    wiou = 1 - (intersection + 1) / (total - intersection + 1)
    return {"bce": bce, "wiou": wiou.mean()}


def structure_loss(logits: Tensor, mask: Tensor, edge_weighted_bce: bool = False) -> Tensor:
    """The loss of training, a scalar: the sum of `loss_terms`."""
    return sum(loss_terms(logits, mask, edge_weighted_bce).values())


class Objective(nn.Module):
    """The network and its loss as one module, which is compiled and distributed as a whole."""

    def __init__(self, model: nn.Module, loss: Callable[[Tensor, Tensor], Terms] = loss_terms):
        """`loss` makes its terms from logits and masks."""
        super().__init__()
        self.model, self.loss = model, loss

    def forward(self, images: Tensor, masks: Tensor) -> Terms:
        """Normalised images (B, 3, H, W) and masks (B, 1, H, W) in [0, 1] -> the terms of the loss."""
        return self.loss(self.model(images), masks)


def train_one_epoch(
    objective: nn.Module, batches: Iterable[tuple[Tensor, Tensor, Sequence[str]]], optimizer: torch.optim.Optimizer,
    scaler: GradScaler, accumulate: int = 1, clip_grad: float = 0,
) -> Iterator[Step]:  # fmt: skip
    """One pass over `batches` of (images, masks, names); yields each optimiser step's figures, over all processes.

    `objective` is an `Objective`, distributed or not. A step uses the mean gradient over the images of `accumulate`
    batches (fewer at the end), its norm clipped to `clip_grad` (0: not). A compiled objective runs uncompiled on a
    batch smaller than those before, because each new size would be compiled. Raises InputError that names the images if
    the loss or the gradient is not finite; that step is not taken.
    """
    objective.train()
    trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    device_of_model = trained[0].device
    if accumulate > 1:  # allocated here: a CUDA graph's own gradients are overwritten by its next run
        for parameter in trained:
            parameter.grad = torch.zeros_like(parameter)
    batches, largest = iter(batches), 0
    while group := list(islice(batches, accumulate)):
        group_images = sum(len(images) for images, _, _ in group)
        sums = []  # per batch: (terms..., 1) x number of images
        optimizer.zero_grad(set_to_none=accumulate == 1)
        for i, (images, masks, _) in enumerate(group, 1):
            images = images.to(device_of_model, non_blocking=True)  # (B, 3, S, S)
            masks = masks.to(device_of_model, non_blocking=True)  # (B, 1, S, S) in [0, 1]
            wait = isinstance(objective, DistributedDataParallel) and i < len(group)  # exchange gradients once per step
            largest = max(largest, len(images))
            stance = "force_eager" if len(images) < largest else "default"
            with objective.no_sync() if wait else nullcontext(), torch.compiler.set_stance(stance):
                terms = objective(images, masks)
                total = sum(terms.values())
                scaler.scale(total * (len(images) / group_images)).backward()
            sums.append(torch.stack([*terms.values(), torch.ones_like(total)]).detach() * len(images))
        scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(trained, clip_grad or math.inf)
        figures = device.reduce_all(torch.stack(sums).sum(0))
        *totals, count, norm = torch.hstack([figures, norm]).tolist()  # the only time that a step waits for the GPU
        overflow = scaler.get_scale() > 1  # fp16's; the scaler skips such a step and lowers the scale, down to 1
        if not math.isfinite(sum(totals)) or not (math.isfinite(norm) or overflow):
            stop_on_non_finite(sums, [names for _, _, names in group], norm)
        scaler.step(optimizer)
        scaler.update()
        means = {name: value / count for name, value in zip(terms, totals, strict=True)}
        yield Step(round(count), means, norm, optimizer.param_groups[0]["lr"])


def stop_on_non_finite(sums: list[Tensor], names: list[Sequence[str]], norm: float) -> None:
    """Raises InputError that names the images of the batches whose loss is not finite, or all images if none is."""
    culprits = [name for total, batch in zip(sums, names, strict=True) if not total.isfinite().all() for name in batch]
    culprits = device.gather_all(culprits) or device.gather_all([name for batch in names for name in batch])
    raise InputError(
        f"the loss or the gradient (norm {norm:.3g}) is not finite for {files.listing(culprits)}; the step was not "
        "taken and last.pth is unchanged: look at these images, or try --clip_grad 1, a lower --lr, --precision fp32"
    )


@torch.no_grad()
def validate(model: SAM2UNeXT, pairs: Sequence[Pair], workers: int, stop: Sequence[int] = ()) -> dict[str, float]:
    """S-measure, weighted F-measure and MAE of the maps that test.py would write; empty without pairs."""
    rank, _, processes = device.ranks()
    device.share_buffers(model)  # all processes score the network that is saved
    model.eval()
    target, scores = next(model.parameters()).device, []

    def read(pair: Pair) -> tuple[Tensor, np.ndarray]:
        return image_tensor(read_image(pair[0]), model.size), np.array(read_mask(pair[1]))

    with ThreadPoolExecutor(max(1, workers)) as pool:
        for image, mask in in_order(pool, read, pairs[rank::processes], ahead=2 * workers):
            if stop:  # has a signal's number
                break
            logits = model(image[None].to(target))  # (1, 1, S, S)
            prediction = stretch(probability_map(logits[0], mask.shape)).cpu().numpy()
            scores.append(pool.submit(metrics.score, prediction, mask))
        scores = device.gather_all([score.result() for score in scores])
    figures = metrics.mean(scores).figures() if scores else {}
    return {name: figures[name] for name in ("Smeasure", "wFmeasure", "MAE") if scores}


def make_optimizer(
    model: nn.Module, lr: float, weight_decay: float, epochs: int, steps_per_epoch: int = 1
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """AdamW over the trained parameters, and a cosine schedule, constant within an epoch, stepped with it."""

    def factor(step: int) -> float:
        cosine = (1 + math.cos(math.pi * (step // steps_per_epoch) / epochs)) / 2
        return cosine + (1 - cosine) * MIN_LEARNING_RATE / (lr or 1)

    warnings.filterwarnings("ignore", "Detected call of .lr_scheduler.step")  # after a step that fp16 skips
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    fused = trained[0].is_cuda or None  # None: torch's choice
    optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=weight_decay, fused=fused)
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def check_options(args: argparse.Namespace) -> None:
    """Raises InputError for options that do not go together."""
    if args.sync_bn and (args.compile or not args.device.startswith("cuda")):
        raise InputError("--sync_bn works on GPUs only, and not with --compile: leave it out")
    if args.val_share and args.val_image_path:
        raise InputError("--val_share holds out training images: leave it out, or --val_image_path")
    if bool(args.benchmark) == bool(args.train_image_path):
        raise InputError("give either --benchmark, or --train_image_path and --train_mask_path")
    if not args.hiera_path or (args.aux != "none" and not args.dinov2_path):
        raise InputError("--hiera_path or --dinov2_path is missing: give a file, a URL, or the word random")


def find_pairs(args: argparse.Namespace) -> tuple[list[Pair], list[Pair]]:
    """The pairs to train on and to validate on."""
    configure_reading(args.max_pixels, args.white)
    names = pairing.names_given(args, args.train_mask_path or args.val_mask_path)
    pairs = pairing.pair(args.train_image_path, args.train_mask_path, args.skip_unpaired, names)
    validation = pairing.pair(args.val_image_path, args.val_mask_path, args.skip_unpaired, names)
    if args.benchmark:
        benchmark, root = benchmarks.load(args.benchmark[0]), args.benchmark[1]
        splits = benchmarks.find_train(benchmark, root)
        pairs = [pair for split in splits for pair in split.pairs]
        if benchmark.val and not (validation or args.val_share):
            for places in benchmarks.find_test(benchmark, root, [*benchmark.val]).values():
                splits += places
                validation += [pair for place in places for pair in place.pairs]
        print(*splits, sep="\n")
    if args.val_share:
        pairs, validation = pairing.hold_out(pairs, args.val_share)
        number = f"{len(validation):,} of {len(pairs) + len(validation):,}"
        print(f"held out by --val_share {args.val_share:g}: {number} pairs")
    if others := pairing.left_out(path.parent for pair in pairs + validation for path in pair):
        print(f"left out: {others}")
    return pairs, validation


def build_model(args: argparse.Namespace, precision: torch.dtype = torch.float32) -> SAM2UNeXT:
    """The network that the arguments describe, on its device."""
    paths = (args.hiera_path, args.dinov2_path)
    trunk, aux = (fetch_published(path) if path and path != "random" else None for path in paths)
    options = cli.options_of(SAM2UNeXT, args) | {"dinov2_path": aux, "precision": precision}
    model = SAM2UNeXT(trunk, **options)
    model.sam.grad_checkpointing = args.grad_checkpointing
    return model.to(args.device)


def main(args: argparse.Namespace) -> None:
    with cli.one_line_errors(LESS_MEMORY) as command, ExitStack() as stack:
        dtype = device.start(args)
        rank, _, processes = device.ranks()
        check_options(args)
        pairs, val_pairs = find_pairs(args)
        loss = partial(loss_terms, **cli.options_of(loss_terms, args))
        recipe = {f"--{name}": getattr(args, name) for name in (*RECIPE, *loss.keywords)}
        if rank == 0:  # for all processes
            check_folder(args.save_path, args.resume)
            recipe["the data"] = check_files(pairs, args.workers)
            check_files(val_pairs, args.workers)

        torch.manual_seed(args.seed)
        model = build_model(args, dtype)
        per_epoch = math.ceil(len(pairs) / processes / args.batch_size)  # batches of each process
        steps = math.ceil(per_epoch / args.accumulate)
        optimizer, scheduler = make_optimizer(model, args.lr, args.weight_decay, args.epoch, steps)
        scaler = GradScaler(torch.device(args.device).type, enabled=dtype == torch.float16)
        run = Run(args.save_path, model, optimizer, scheduler, scaler, recipe)
        stack.enter_context(nullcontext() if rank else files.locked(args.save_path))  # makes the folder
        progress = run.begin(args.resume, args.init)
        if not (epochs := range(progress.epoch, args.epoch + 1)):
            return

        done = progress.step * args.accumulate  # batches already trained in the first epoch
        keys = epoch_batches(len(pairs), args.batch_size, args.seed, epochs, done, rank, processes)
        dataset = SegmentationDataset(pairs, args.size, args.seed)
        batches = load(dataset, keys, args.workers, args.accumulate, pin=args.device.startswith("cuda"))
        objective = device.prepare(Objective(model, loss), args.device, args.compile, args.sync_bn)
        command.started()
        log = stack.enter_context(Log(args, run, len(pairs), steps))
        stop = stack.enter_context(cli.noted_signals())
        for epoch in epochs:
            rest = islice(batches, max(0, per_epoch - progress.step * args.accumulate))
            label = f"epoch {epoch}/{args.epoch}"
            with progress_bar(None, label, len(pairs), initial=progress.images, unit="img", disable=rank > 0) as bar:
                for step in train_one_epoch(objective, rest, optimizer, scaler, args.accumulate, args.clip_grad):
                    scheduler.step()
                    progress.count(step)
                    bar.set_postfix(**progress.losses(), lr=step.lr, refresh=False)
                    bar.update(step.images)
                    log.step(step)
                    if args.save_every and progress.step % args.save_every == 0:
                        run.save()
                    run.stop_if_asked(stop)
            run.save()  # before the validation, so that a failure there loses nothing
            is_due = epoch % args.val_every == 0 or epoch == args.epoch
            scores = validate(model, val_pairs if is_due else [], args.workers, stop)
            run.stop_if_asked(stop)
            log.epoch(scores, val_pairs or pairs)
            run.end_epoch(scores)
        del objective  # before its process group: gloo could wait for itself otherwise
        device.end()


def get_args_parser() -> argparse.ArgumentParser:
    parser = cli.parser(__doc__)
    network = parser.add_argument_group("network")
    network.add_argument("--hiera_path", required=True, help="SAM 2's weights: a file, a URL, or the word random")
    network.add_argument("--dinov2_path", help="DINOv2's weights, likewise; required unless --aux none")
    cli.add_network(network, CONFIGS)
    network.add_argument("--allow_sam2_1", action="store_true", help="accept SAM 2.1's weights too")
    network.add_argument("--init", metavar="FILE", help="start from these trained weights instead of random ones")
    data = parser.add_argument_group("data")
    data.add_argument("--benchmark", nargs=2, metavar=("NAME", "ROOT"), help=benchmarks.HELP)
    data.add_argument("--train_image_path", nargs="+", default=[], metavar="DIR", help="folders of images")
    data.add_argument("--train_mask_path", nargs="+", default=[], metavar="DIR", help="folders of masks")
    data.add_argument("--val_image_path", nargs="+", default=[], metavar="DIR", help="images to validate on each epoch")
    data.add_argument("--val_mask_path", nargs="+", default=[], metavar="DIR", help="their masks")
    share = cli.number(float, 0, 0.9)
    data.add_argument("--val_share", type=share, default=0.0, help="hold out this share of the pairs to validate on")
    data.add_argument("--val_every", type=cli.number(), default=1, metavar="N", help="epochs between validations")
    data.add_argument("--skip_unpaired", action="store_true", help="ignore images and masks without a partner")
    cli.add_reading(data)
    positive, integer, rate = cli.number(), cli.number(minimum=0), cli.number(float, minimum=0)
    group = parser.add_argument_group("training")
    group.add_argument("--epoch", type=positive, default=20, help="passes over the data")
    group.add_argument("--lr", type=rate, default=2e-4, help="initial learning rate")
    group.add_argument("--batch_size", type=positive, default=1, help="images per batch, of each process")
    group.add_argument("--accumulate", type=positive, default=1, metavar="K", help="batches per step")
    group.add_argument("--weight_decay", type=rate, default=5e-4, help="of AdamW")
    group.add_argument("--edge_weighted_bce", action="store_true", help="weight the cross entropy as the paper does")
    group.add_argument("--clip_grad", type=rate, default=0, help="maximum gradient norm; 0: none")
    group.add_argument("--sync_bn", action="store_true", help="BatchNorm over the images of all GPUs")
    group.add_argument("--seed", type=integer, default=0, help="of new weights, order and augmentation")
    group = parser.add_argument_group("run")
    group.add_argument("--save_path", type=cli.path, required=True, metavar="DIR", help="for checkpoints and logs")
    group.add_argument("--resume", action="store_true", help="continue from last.pth in save_path if there is one")
    group.add_argument("--save_every", type=integer, default=500, help="steps between last.pth; 0: only each epoch")
    group.add_argument("--log_every", type=positive, default=50, help="steps between lines of log.jsonl")
    group.add_argument("--grad_checkpointing", action="store_true", help="less memory, a third more time")
    compiled = "compile network and loss, for GPUs: takes a minute or two, and memory"
    group.add_argument("--compile", action="store_true", help=compiled)
    group.add_argument("--deterministic", action="store_true", help="the same weights from the same run on GPUs too")
    cli.add_device(group)
    group.add_argument("--workers", type=integer, default=min(8, cores()), help="processes that read images")
    return parser


if __name__ == "__main__":
    main(get_args_parser().parse_args())
