"""Trains SAM2-UNeXT on a folder of pictures and a folder of masks of the same names.

One GPU, with the recipe of the paper (20 epochs, batch 1, 1024 / 448 px):

    python train.py --hiera_path sam2_hiera_large.pt --dinov2_path model.safetensors \\
        --train_image_path data/images --train_mask_path data/masks --save_path runs/mine

Four GPUs; on several machines the same line on each, with --nnodes, --node_rank and --master_addr before train.py:

    torchrun --standalone --nproc_per_node 4 train.py ...

No GPU, to try it: a small network with random encoders and few pixels:

    python train.py --hiera_path random --sam2 tiny --dinov2_path random --aux vit_small_patch14_dinov2 \\
        --size 128 --aux_size 112 --batch_size 8 --lr 1e-3 \\
        --train_image_path data/images --train_mask_path data/masks --save_path runs/small

Stopped or killed, the same command with --resume goes on where last.pth was written.
"""

import argparse
import math
import os
import signal
import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from itertools import islice
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from tqdm import tqdm

import benchmarks
import checkpoint
import cli
import files
import run
from dataset import SegmentationDataset, epoch_batches
from sam2.build_sam import CONFIGS
from SAM2UNeXT import SAM2UNeXT

MIN_LEARNING_RATE = 1e-7  # where the cosine ends
KEPT_EVERY = 5  # epochs
UNPAIRED_MEND = "add the missing files or leave these out with --skip_unpaired"
LESS_MEMORY = (
    "--precision bf16, --grad_checkpointing, or a smaller --batch_size with --accumulate for the same step "
    "(a smaller --size too) need less"
)
# What a resumed run must have begun with: the other options do not change the weights.
RECIPE = ["sam2", "aux", "size", "aux_size", "epoch", "lr", "batch_size", "accumulate", "weight_decay"]
RECIPE += ["edge_weighted_bce", "clip_grad", "sync_bn", "seed"]


def structure_loss(logits: Tensor, mask: Tensor, edge_weighted_bce: bool = False) -> Tensor:
    """Binary cross entropy plus weighted IoU loss: a scalar, from logits and mask in [0, 1], both (B, 1, H, W).

    Pixels near the mask's edges weigh up to six times (Wei et al., F3Net, arXiv:1911.11445). The cross entropy is the
    plain mean over the batch, as in the published program; `edge_weighted_bce` weighs it too, as the paper has it.
    """
    bce, wiou = loss_terms(logits, mask, edge_weighted_bce)
    return bce + wiou


def loss_terms(logits: Tensor, mask: Tensor, edge_weighted_bce: bool = False) -> tuple[Tensor, Tensor]:
    """The cross entropy and the weighted IoU loss of `structure_loss`, each a mean over the pictures."""
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

    A step follows the mean gradient over the pictures of `accumulate` batches, the last one of what is left. Raises
    ValueError that names the pictures where the loss or the gradient is not finite; that step is not taken.
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
            wait = isinstance(model, DistributedDataParallel) and i < len(group)  # gradients are exchanged once a step
            with model.no_sync() if wait else nullcontext():
                bce, wiou = loss_terms(model(images), masks, edge_weighted_bce)
                scaler.scale((bce + wiou) * (len(images) / own_pictures)).backward()
            terms.append(torch.stack([bce, wiou, torch.ones_like(bce)]).detach() * len(images))
        scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(trained, clip_grad).item()
        bce, wiou, pictures = run.over_processes(torch.stack(terms).sum(0)).tolist()
        # Gradients in fp16 overflow now and then, and the scaler leaves the step out; not again and again, though.
        if not math.isfinite(bce + wiou) or not (math.isfinite(norm) or scaler.get_scale() > 1):
            stop_on_non_finite(terms, [names for _, _, names in group], norm)
        scaler.step(optimizer)
        scaler.update()
        rate = optimizer.param_groups[0]["lr"]
        yield {"pictures": pictures, "bce": bce / pictures, "wiou": wiou / pictures, "grad_norm": norm, "lr": rate}


def stop_on_non_finite(terms: list[Tensor], names: list[Sequence[str]], norm: float) -> None:
    """Raises ValueError with the pictures whose loss is not finite or, where that is the gradient alone, with all."""
    culprits = [name for term, batch in zip(terms, names, strict=True) if not term.isfinite().all() for name in batch]
    culprits = run.of_all_processes(culprits) or run.of_all_processes([name for batch in names for name in batch])
    raise ValueError(
        f"the loss or the gradient (norm {norm:.3g}) is not finite with {files.listing(culprits)}; the step was not "
        "taken and last.pth is as it was: look at these pictures, or try --clip_grad 1, a lower --lr, --precision fp32"
    )


def make_optimizer(
    model: nn.Module, lr: float, weight_decay: float, epochs: int
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """AdamW over what trains, and a cosine over the epochs, to be stepped once after each."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=weight_decay)
    return optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs, eta_min=MIN_LEARNING_RATE)


def build_model(args: argparse.Namespace, precision: torch.dtype = torch.float32) -> SAM2UNeXT:
    """The network that the arguments describe. Raises ValueError or OSError with the mend."""
    if args.dinov2_path is None and args.aux != "none":
        raise ValueError("--dinov2_path is missing: a file, a URL, or the word random (or --aux none to do without)")
    if args.hiera_path == "" or args.dinov2_path == "":
        raise ValueError("--hiera_path or --dinov2_path is empty: give a file, a URL, or the word random")
    paths = (None if path == "random" else path for path in (args.hiera_path, args.dinov2_path))
    options = {"sam2": args.sam2, "aux": args.aux, "aux_size": args.aux_size, "size": args.size}
    model = SAM2UNeXT(*paths, **options, precision=precision, allow_sam2_1=args.allow_sam2_1)
    model.sam.grad_checkpointing = args.grad_checkpointing
    return model


def load(dataset: SegmentationDataset, places: list[list[tuple[int, int]]], args: argparse.Namespace) -> Iterator:
    """The batches of the items at `places`, one after the other, read in advance."""
    options = {}
    if args.workers:  # enough in advance for the next step while the batches of this one are used
        ahead = max(2, math.ceil(2 * args.accumulate / args.workers))
        options = {"prefetch_factor": ahead, "worker_init_fn": run.obey_parent_alone}
    pin = torch.cuda.is_available()
    return iter(DataLoader(dataset, batch_sampler=places, num_workers=args.workers, pin_memory=pin, **options))


def find_pairs(args: argparse.Namespace) -> list[tuple[Path, Path]]:
    """The (picture, mask) files that the arguments name. Raises ValueError or OSError with the mend."""
    if bool(args.benchmark) == bool(args.train_image_path):
        raise ValueError("give either --benchmark, or --train_image_path and --train_mask_path")
    if args.benchmark:
        name, root = args.benchmark
        places = benchmarks.find_train(benchmarks.load(name), root)
        print(*places, sep="\n")
        return [pair for place in places for pair in place.pairs]
    return files.pair(args.train_image_path, args.train_mask_path, args.skip_unpaired, mend=UNPAIRED_MEND)


def main(args: argparse.Namespace) -> None:
    rank, _, processes = cli.ranks()
    if rank:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (only the first process tells how it goes)
    with cli.exit_on_error(cli.NOTHING_STARTED, LESS_MEMORY):
        device = cli.device(args.device)
        cli.keep_freed_memory(device)
        dtype = cli.precision(args.precision, device)
        pairs = find_pairs(args)
        val_pairs = files.pair(args.val_image_path, args.val_mask_path, args.skip_unpaired, mend=UNPAIRED_MEND)
        folder = files.output_folder(args.save_path)
        run.check_files([*pairs, *val_pairs], args.workers)
        if args.sync_bn and args.compile:
            raise ValueError("--sync_bn and --compile do not go together: leave out one")
        if args.sync_bn and not device.startswith("cuda"):
            raise ValueError("--sync_bn: torch does it on GPUs alone; leave it out")
        if args.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True, warn_only=True)
            if device.startswith("cuda"):  # where torch only warns, fused attention's gradients differ between runs
                torch.backends.cuda.enable_flash_sdp(False)
                torch.backends.cuda.enable_mem_efficient_sdp(False)
                torch.backends.cuda.enable_cudnn_sdp(False)
        torch.manual_seed(args.seed)
        model = build_model(args, dtype)
        recipe = {f"--{name}": getattr(args, name) for name in RECIPE}
        recipe |= {"the precision": str(dtype), "the number of pairs": len(pairs), "the number of processes": processes}
        last = run.read_last(folder) if args.resume else None
        if last:
            path, content = last
            run.check_recipe(path, content["recipe"], recipe)
            checkpoint.load_trained(model, path, checkpoint.as_trained(content, path))
        elif args.init:
            checkpoint.load_trained(model, args.init, checkpoint.read_network(args.init))
        if not args.resume:
            run.start_anew(folder)
        model.to(device)
        if args.compile:
            model.compile()

    optimizer, scheduler = make_optimizer(model, args.lr, args.weight_decay, args.epoch)
    scaler = GradScaler(torch.device(device).type, enabled=dtype == torch.float16)
    parts = {"optimizer": optimizer, "scheduler": scheduler, "scaler": scaler}
    progress = run.Progress()
    if last:
        with cli.exit_on_error(cli.NOTHING_STARTED):
            progress = run.go_on(path, content, parts)
        warnings.filterwarnings("ignore", "Detected call of .lr_scheduler.step")  # of a run resumed at an epoch's end
        if progress.epoch > args.epoch:
            print(f"{files.shown(path)}: the run is finished")
            return
    if args.resume:
        where = f"epoch {progress.epoch}, step {progress.step}"
        print(
            f"{files.shown(path)}: going on after {where}"
            if last
            else f"{files.shown(folder)}: nothing to go on from, starting anew"
        )
    network = distribute(model, device, args.sync_bn) if processes > 1 else model

    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    effective = processes * args.batch_size * args.accumulate
    print(f"{len(pairs):,} pairs; {trained:,} trainable parameters; training on {device} in {dtype}")
    print(f"{effective} pictures a step: {processes} process(es) x batch {args.batch_size} x {args.accumulate}")

    def save() -> None:
        if rank == 0:
            run.save_last(folder, model, parts, progress, recipe)

    def end_if_asked() -> None:
        number = int(run.over_processes(torch.tensor(max(stop, default=0), device=device), dist.ReduceOp.MAX))
        if number:
            save()
            if rank == 0:
                name, where = signal.Signals(number).name, f"epoch {progress.epoch}, step {progress.step}"
                print(
                    f"\ntrain.py: ended by {name} after {where}; --resume goes on from {files.shown(folder)}",
                    file=sys.stderr,
                )
            raise SystemExit(128 + number)

    with cli.exit_on_error(cli.NOT_COMPLETED, LESS_MEMORY), run.noted_signals() as stop:
        epochs = range(progress.epoch, args.epoch + 1)
        order = [epoch_batches(len(pairs), args.batch_size, args.seed, epoch, rank, processes) for epoch in epochs]
        log = None
        if rank == 0:
            more = {"precision": dtype, "processes": processes, "effective_batch": effective}
            run.write_arguments(folder, args, more)
            log = run.Log(folder, progress, args.log_every, math.ceil(len(order[0]) / args.accumulate), args.epoch)
        order[0] = order[0][progress.step * args.accumulate :]  # what a resumed run has behind it
        dataset = SegmentationDataset(pairs, args.size, args.seed)
        batches = load(dataset, [batch for part in order for batch in part], args)
        options = {"accumulate": args.accumulate, "edge_weighted_bce": args.edge_weighted_bce}
        options["clip_grad"] = args.clip_grad or math.inf
        for epoch, part in zip(epochs, order, strict=True):
            left = islice(batches, len(part))
            bar = tqdm(total=len(pairs), initial=progress.pictures, unit="img", disable=rank > 0)
            bar.set_description(f"epoch {epoch}/{args.epoch}")
            with bar:
                for figures in train_one_epoch(network, left, optimizer, scaler, **options):
                    progress.count(figures)
                    bar.set_postfix(loss=f"{progress.losses()['loss']:.4f}", lr=f"{figures['lr']:.2e}", refresh=False)
                    bar.update(int(figures["pictures"]))
                    if log:
                        log.step(progress, figures, device)
                    if args.save_every and progress.step % args.save_every == 0:
                        save()
                    end_if_asked()
            scores = run.validate(model, val_pairs, args.workers, stop) if val_pairs else {}
            end_if_asked()
            scheduler.step()
            best = scores.get("Smeasure", -math.inf) > progress.best
            if log:
                log.epoch(progress, progress.losses() | scores)
                log.panels(progress, run.panels(model, val_pairs or pairs))
                log.restart_clock()
                if best:
                    progress.best = scores["Smeasure"]
                    checkpoint.save_network(folder / "best.pth", model, epoch)
                if epoch % KEPT_EVERY == 0 or epoch == args.epoch:
                    checkpoint.save_network(folder / f"SAM2-UNeXT-{epoch}.pth", model, epoch)
                    print(f"saved {files.shown(folder / f'SAM2-UNeXT-{epoch}.pth')}")
            progress.next_epoch()
            save()
    if log:
        log.close()
    if processes > 1:
        dist.destroy_process_group()


def distribute(model: nn.Module, device: str, sync_bn: bool) -> nn.Module:
    """The model wrapped for training by all processes that torchrun started."""
    gpu = device.startswith("cuda")
    if gpu:
        torch.cuda.set_device(device)  # where NCCL gathers objects
    dist.init_process_group("nccl" if gpu else "gloo")
    if sync_bn:
        nn.SyncBatchNorm.convert_sync_batchnorm(model)  # in place
    return DistributedDataParallel(model, device_ids=[device] if gpu else None)


def get_args_parser() -> argparse.ArgumentParser:
    parser = cli.parser(__doc__)
    network = parser.add_argument_group("network")
    network.add_argument("--hiera_path", required=True, help="SAM 2's weights: a file, a URL, or the word random")
    network.add_argument("--dinov2_path", help="DINOv2's weights, likewise; needed unless --aux none")
    network.add_argument("--sam2", default="large", choices=list(CONFIGS), help="the trunk")
    network.add_argument("--aux", default="vit_large_patch14_dinov2", help="auxiliary encoder: a timm model, or none")
    network.add_argument("--allow_sam2_1", action="store_true", help="take the trunk of a SAM 2.1 checkpoint too")
    network.add_argument("--init", metavar="FILE", help="start from these trained weights instead of random ones")

    data = parser.add_argument_group("data")
    data.add_argument("--benchmark", nargs=2, metavar=("NAME", "ROOT"), help=cli.BENCHMARK_HELP)
    data.add_argument("--train_image_path", nargs="+", default=[], metavar="DIR", help="folder(s) of pictures")
    data.add_argument("--train_mask_path", nargs="+", default=[], metavar="DIR", help="folder(s) of masks")
    data.add_argument("--val_image_path", nargs="+", default=[], metavar="DIR", help="pictures to score on each epoch")
    data.add_argument("--val_mask_path", nargs="+", default=[], metavar="DIR", help="their masks")
    data.add_argument("--skip_unpaired", action="store_true", help="leave out pictures and masks without a partner")
    data.add_argument("--size", type=cli.number(multiple=32, least=32), default=1024, help="side of the input, px")
    data.add_argument("--aux_size", type=cli.number(), default=448, help="side of the auxiliary encoder's input, px")

    recipe = parser.add_argument_group("training")
    recipe.add_argument("--epoch", type=cli.number(), default=20, help="passes over the data")
    recipe.add_argument("--lr", type=cli.number(float, least=0), default=2e-4, help="learning rate at the start")
    recipe.add_argument("--batch_size", type=cli.number(), default=1, help="pictures a batch, of each process")
    recipe.add_argument("--accumulate", type=cli.number(), default=1, metavar="K", help="batches a step")
    recipe.add_argument("--weight_decay", type=cli.number(float, least=0), default=5e-4, help="of AdamW")
    recipe.add_argument("--edge_weighted_bce", action="store_true", help="weigh the cross entropy as the paper has it")
    recipe.add_argument(
        "--clip_grad", type=cli.number(float, least=0), default=0, help="greatest gradient norm; 0: any"
    )
    recipe.add_argument("--sync_bn", action="store_true", help="BatchNorm over the pictures of all GPUs")
    recipe.add_argument("--seed", type=cli.number(least=0), default=0, help="of new weights, order and flips")

    way = parser.add_argument_group("run")
    way.add_argument(
        "--save_path", type=cli.path, required=True, metavar="DIR", help="where checkpoints, last.pth and logs go"
    )
    way.add_argument("--resume", action="store_true", help="go on from last.pth in save_path where there is one")
    way.add_argument(
        "--save_every", type=cli.number(least=0), default=500, help="steps between last.pth; 0: each epoch"
    )
    way.add_argument("--log_every", type=cli.number(), default=50, help="steps between lines of log.jsonl")
    way.add_argument("--precision", default="auto", choices=cli.PRECISIONS, help="auto: bf16 where native, else fp32")
    way.add_argument("--grad_checkpointing", action="store_true", help="less memory, a third more time")
    way.add_argument("--compile", action="store_true", help="by torch, for GPUs: takes minutes at the start")
    way.add_argument("--deterministic", action="store_true", help="the same weights from the same run on GPUs too")
    way.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, ... or auto")
    way.add_argument(
        "--workers", type=cli.number(least=0), default=min(8, os.cpu_count() or 1), help="processes that read pictures"
    )
    return parser


if __name__ == "__main__":
    main(get_args_parser().parse_args())
