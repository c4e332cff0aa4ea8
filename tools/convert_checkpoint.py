"""Converts a trained checkpoint into another kind: small, whole, or the original program's.

    python tools/convert_checkpoint.py SAM2-UNeXT-20.pth whole.pth --to whole
    python tools/convert_checkpoint.py SAM2-UNeXT-20.pth original.pth --to original
    python tools/convert_checkpoint.py whole.pth small.pth --to small --hiera_path FILE --dinov2_path FILE

A small file holds what was trained and records its encoders; a whole one contains the encoders; the original's is a
bare float32 state dict. The input may be of any kind. For a small output, name the encoders' files unless the input is
small itself.
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import checkpoint
import cli
import files
import weights
from SAM2UNeXT import SAM2UNeXT


def main(args: argparse.Namespace) -> None:
    with cli.exit_on_error(cli.NOTHING_STARTED):
        if args.output.resolve() == args.input.resolve():
            raise ValueError(f"{files.shown(args.output)}: is also the input; name another file")
        files.output_folder(args.output.parent)
        model = SAM2UNeXT.from_checkpoint(args.input, args.hiera_path, args.dinov2_path)
        if args.to == "small" and not checkpoint.is_small(model):
            raise ValueError(f"{files.shown(args.input)}: name its encoders' files with --hiera_path and --dinov2_path")
        if args.to == "original":
            content = dict(model.state_dict())
        else:
            content = checkpoint.network_content(model, whole=args.to == "whole")
            content["epoch"] = weights.read(args.input).get("epoch")
        checkpoint.save(args.output, content)
    print(f"{files.shown(args.output)}: {args.output.stat().st_size / 2**20:.1f} MB, {args.to}")


def get_args_parser() -> argparse.ArgumentParser:
    parser = cli.parser(__doc__)
    parser.add_argument("input", type=Path, help="the checkpoint, of any kind")
    parser.add_argument("output", type=Path, help="the file to write")
    parser.add_argument("--to", required=True, choices=["small", "whole", "original"], help="the kind to write")
    parser.add_argument("--hiera_path", help="SAM 2's weights, if a small checkpoint's are not found")
    parser.add_argument("--dinov2_path", help="the auxiliary encoder's weights, likewise")
    return parser


if __name__ == "__main__":
    main(get_args_parser().parse_args())
