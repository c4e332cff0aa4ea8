"""Trains SAM2-UNeXT on a folder of pictures and a folder of masks of the same names.

One GPU, with the recipe of the paper (20 epochs, batch 1, 1024 / 448 px):

    python train.py --hiera_path sam2_hiera_large.pt --dinov2_path model.safetensors \\
        --train_image_path data/images --train_mask_path data/masks --save_path runs/mine

No GPU, to try it: a small network with random encoders and few pixels:

    python train.py --hiera_path random --sam2 tiny --dinov2_path random --aux vit_small_patch14_dinov2 \\
        --size 128 --aux_size 112 --batch_size 8 --lr 1e-3 \\
        --train_image_path data/images --train_mask_path data/masks --save_path runs/small
"""

import argparse
import os
from collections.abc import Iterable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

import benchmarks
import checkpoint
import cli
import files
from dataset import SegmentationDataset
from sam2.build_sam import CONFIGS
from SAM2UNeXT import SAM2UNeXT

MIN_LEARNING_RATE = 1e-7  # where the cosine ends
SAVE_EVERY = 5  # epochs


def structure_loss(logits: Tensor, mask: Tensor, edge_weighted_bce: bool = False) -> Tensor:
    """Binary cross entropy plus weighted IoU loss: a scalar, from logits and mask in [0, 1], both (B, 1, H, W).

    Pixels near the mask's edges weigh up to six times (Wei et al., F3Net, arXiv:1911.11445). The cross entropy is the
    plain mean over the batch, as in the published program; `edge_weighted_bce` weighs it too, as the paper has it.
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
    iou = 1 - (intersection + 1) / (total - intersection + 1)
    return bce + iou.mean()


def train_one_epoch(
    model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], optimizer: torch.optim.Optimizer, bar: tqdm,
    edge_weighted_bce: bool = False,
) -> float:  # fmt: skip
    """One pass over `batches` of (images, masks); returns the mean loss of the pictures and moves `bar` by them."""
    model.train()
    device = next(model.parameters()).device
    total, seen = 0.0, 0
    for images, masks in batches:
        images = images.to(device, non_blocking=True)  # (B, 3, S, S)
        masks = masks.to(device, non_blocking=True)  # (B, 1, S, S) in [0, 1]
        loss = structure_loss(model(images), masks, edge_weighted_bce)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        total += loss.item() * len(images)
        seen += len(images)
        bar.set_postfix(loss=f"{total / seen:.4f}", lr=f"{optimizer.param_groups[0]['lr']:.2e}", refresh=False)
        bar.update(len(images))
    return total / seen


def make_optimizer(
    model: nn.Module, lr: float, weight_decay: float, epochs: int
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """AdamW over what trains, and a cosine over the epochs, to be stepped once after each."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=weight_decay)
    return optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs, eta_min=MIN_LEARNING_RATE)


def build_model(args: argparse.Namespace) -> SAM2UNeXT:
    """The network that the arguments describe. Raises ValueError or OSError with the mend."""
    if args.dinov2_path is None and args.aux != "none":
        raise ValueError("--dinov2_path is missing: a file, a URL, or the word random (or --aux none to do without)")
    if args.hiera_path == "" or args.dinov2_path == "":
        raise ValueError("--hiera_path or --dinov2_path is empty: give a file, a URL, or the word random")
    paths = (None if path == "random" else path for path in (args.hiera_path, args.dinov2_path))
    options = {"sam2": args.sam2, "aux": args.aux, "aux_size": args.aux_size, "size": args.size}
    return SAM2UNeXT(*paths, **options, allow_sam2_1=args.allow_sam2_1)


def find_pairs(args: argparse.Namespace) -> list[tuple[Path, Path]]:
    """The (picture, mask) files that the arguments name. Raises ValueError or OSError with the mend."""
    if bool(args.benchmark) == bool(args.train_image_path):
        raise ValueError("give either --benchmark, or --train_image_path and --train_mask_path")
    if args.benchmark:
        name, root = args.benchmark
        places = benchmarks.find_train(benchmarks.load(name), root)
        print(*places, sep="\n")
        return [pair for place in places for pair in place.pairs]
    mend = "add the missing files or leave these out with --skip_unpaired"
    return files.pair(args.train_image_path, args.train_mask_path, args.skip_unpaired, mend=mend)


def main(args: argparse.Namespace) -> None:
    with cli.exit_on_error(cli.NOTHING_STARTED):
        device = cli.device(args.device)
        pairs = find_pairs(args)
        save_path = files.output_folder(args.save_path)
        torch.manual_seed(args.seed)
        model = build_model(args).to(device)

    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    print(f"{len(pairs):,} pairs; {trained:,} trainable parameters; training on {device}")
    dataset = SegmentationDataset(pairs, args.size, args.seed)
    order = torch.Generator()
    batches = DataLoader(
        dataset,
        args.batch_size,
        shuffle=True,
        generator=order,
        num_workers=args.workers,
        pin_memory=device.startswith("cuda"),
    )
    optimizer, scheduler = make_optimizer(model, args.lr, args.weight_decay, args.epoch)

    with cli.exit_on_error(cli.NOT_COMPLETED):
        for epoch in range(1, args.epoch + 1):
            dataset.epoch = epoch
            order.manual_seed(args.seed * 1_000_003 + epoch)  # the order, like the flips, depends on these two alone
            with tqdm(total=len(dataset), unit="img", desc=f"epoch {epoch}/{args.epoch}") as bar:
                train_one_epoch(model, batches, optimizer, bar, args.edge_weighted_bce)
            scheduler.step()
            if epoch % SAVE_EVERY == 0 or epoch == args.epoch:
                path = save_path / f"SAM2-UNeXT-{epoch}.pth"
                checkpoint.save_network(path, model, epoch)
                print(f"saved {path}")


def get_args_parser() -> argparse.ArgumentParser:
    parser = cli.parser(__doc__)
    network = parser.add_argument_group("network")
    network.add_argument("--hiera_path", required=True, help="SAM 2's weights: a file, a URL, or the word random")
    network.add_argument("--dinov2_path", help="DINOv2's weights, likewise; needed unless --aux none")
    network.add_argument("--sam2", default="large", choices=list(CONFIGS), help="the trunk")
    network.add_argument("--aux", default="vit_large_patch14_dinov2", help="auxiliary encoder: a timm model, or none")
    network.add_argument("--allow_sam2_1", action="store_true", help="take the trunk of a SAM 2.1 checkpoint too")

    data = parser.add_argument_group("data")
    data.add_argument("--benchmark", nargs=2, metavar=("NAME", "ROOT"), help=cli.BENCHMARK_HELP)
    data.add_argument("--train_image_path", nargs="+", default=[], metavar="DIR", help="folder(s) of pictures")
    data.add_argument("--train_mask_path", nargs="+", default=[], metavar="DIR", help="folder(s) of masks")
    data.add_argument("--skip_unpaired", action="store_true", help="leave out pictures and masks without a partner")
    data.add_argument("--size", type=cli.number(multiple=32, least=32), default=1024, help="side of the input, px")
    data.add_argument("--aux_size", type=cli.number(), default=448, help="side of the auxiliary encoder's input, px")

    recipe = parser.add_argument_group("training")
    recipe.add_argument("--epoch", type=cli.number(), default=20, help="passes over the data")
    recipe.add_argument("--lr", type=cli.number(float, least=0), default=2e-4, help="learning rate at the start")
    recipe.add_argument("--batch_size", type=cli.number(), default=1, help="pictures a step")
    recipe.add_argument("--weight_decay", type=cli.number(float, least=0), default=5e-4, help="of AdamW")
    recipe.add_argument("--edge_weighted_bce", action="store_true", help="weigh the cross entropy as the paper has it")
    recipe.add_argument("--seed", type=cli.number(least=0), default=0, help="of new weights, order and flips")

    run = parser.add_argument_group("run")
    run.add_argument("--save_path", required=True, metavar="DIR", help="where SAM2-UNeXT-<epoch>.pth go")
    run.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, ... or auto")
    run.add_argument(
        "--workers", type=cli.number(least=0), default=min(8, os.cpu_count() or 1), help="processes that read pictures"
    )
    return parser


if __name__ == "__main__":
    main(get_args_parser().parse_args())
