"""Converts a trained checkpoint into another kind: small, whole, the original program's, or a folder for the hub.

    python tools/convert_checkpoint.py SAM2-UNeXT-20.pth whole.pth --to whole
    python tools/convert_checkpoint.py SAM2-UNeXT-20.pth original.pth --to original
    python tools/convert_checkpoint.py whole.pth small.pth --to small --hiera_path FILE --dinov2_path FILE
    python tools/convert_checkpoint.py SAM2-UNeXT-20.pth folder --to hub --results runs/MAS3K/results

A small file records its encoders, a whole file contains them, the original's is a bare float32 state dict.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from evaluation.metrics import NINE
from SAM2UNeXT import SAM2UNeXT
from unext import checkpoint, cli, files
from unext.errors import InputError


def main(args: argparse.Namespace) -> None:
    with cli.one_line_errors() as command:
        if args.to == "hub" and (args.output / "README.md").exists():
            raise InputError(f"{args.output}: has a model card already; name another folder")
        try:
            results = json.loads((args.results / "results.json").read_text("utf-8")) if args.results else {}
        except ValueError as error:
            raise InputError(f"--results {args.results}: results.json is damaged; run eval.py again") from error
        if not all("images" in row for row in results.values()):
            raise InputError(f"--results {args.results}: has several methods; run eval.py for this network alone")
        model = SAM2UNeXT.from_checkpoint(args.input, **cli.options_of(SAM2UNeXT.from_checkpoint, args))
        inputs = checkpoint.sources(args.input, model)
        for path in (args.output, args.output / checkpoint.CONFIG, args.output / checkpoint.MODEL):  # files of the hub
            files.require_not_input(path, inputs)
        if args.to == "small" and not checkpoint.is_small(model):
            raise InputError(f"{args.input}: name its encoders' files with --hiera_path and --dinov2_path")
        if args.to == "hub":
            files.output_folder(args.output)
        else:
            files.check_output_file("output", args.output)
        command.started()
        if args.to == "hub":
            rows = {name: {key: row[key] for key in ("images", *NINE)} for name, row in results.items()}
            model.save_pretrained(args.output, model_card_kwargs={"results": rows})
            print(f"{args.output}: a folder for the hub; upload it with hf upload user/model FOLDER")
            return
        content = checkpoint.network_content(model, whole=args.to != "small")
        content["epoch"] = checkpoint.read(args.input).get("epoch")
        checkpoint.save(args.output, content["state_dict"] if args.to == "original" else content)
        print(f"{args.output}: {args.output.stat().st_size / 2**20:.1f} MB, {args.to}")
        if args.to == "original" and model.size != 1024:  # the default
            print(f"it does not record the size of the input: give test.py --size {model.size}")


def get_args_parser() -> argparse.ArgumentParser:
    parser = cli.parser(__doc__)
    parser.add_argument("input", type=Path, help="the checkpoint, of any kind")
    parser.add_argument("output", type=cli.path, help="the file or folder to write")
    parser.add_argument("--to", required=True, choices=["small", "whole", "original", "hub"], help="the kind to write")
    cli.add_encoders(parser)
    parser.add_argument("--results", type=Path, metavar="DIR", help="eval.py's, for the model card of --to hub")
    return parser


if __name__ == "__main__":
    main(get_args_parser().parse_args())
