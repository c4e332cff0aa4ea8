"""Arranges images, their ground truth and their prediction maps in one PNG.

    python tools/contact_sheet.py --images demo/data/test/Image --masks demo/data/test/Mask \\
        --maps demo/run/predictions --output demo/run/sheet.png
"""

import argparse
import sys
from pathlib import Path

from PIL import Image, ImageOps

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from unext import cli, files

CELL, GAP = 160, 6  # pixels


def contact_sheet(rows: list[list[Image.Image]], columns: int) -> Image.Image:
    """Groups of images, the members of a group one below the other, `columns` groups side by side."""
    members = max(len(row) for row in rows)
    step_x, step_y = CELL + GAP, members * (CELL + GAP) + 2 * GAP
    lines = -(-len(rows) // columns)
    sheet = Image.new("RGB", (min(columns, len(rows)) * step_x + GAP, lines * step_y), "white")
    for i, row in enumerate(rows):
        for j, image in enumerate(row):
            cell = ImageOps.pad(image.convert("RGB"), (CELL, CELL), color="white")
            sheet.paste(cell, (GAP + i % columns * step_x, GAP + i // columns * step_y + j * (CELL + GAP)))
    return sheet


def main(args: argparse.Namespace) -> None:
    with cli.one_line_errors():
        folders = [files.find(folder) for folder in (args.images, args.masks, args.maps)]
        stems = [stem for stem in folders[0] if all(stem in folder for folder in folders)][: args.count]
        if not stems:
            raise ValueError(f"no file name is in all of {files.listing([args.images, args.masks, args.maps])}")
        rows = [[files.read_image(folder[stem]) for folder in folders] for stem in stems]
        files.save_image(contact_sheet(rows, args.columns), args.output)
        print(f"{files.count(len(rows), 'image')}, ground truth and maps: {args.output}")


def get_args_parser() -> argparse.ArgumentParser:
    parser = cli.parser(__doc__)
    parser.add_argument("--images", required=True, metavar="DIR", help="images")
    parser.add_argument("--masks", required=True, metavar="DIR", help="ground truth of the same names")
    parser.add_argument("--maps", required=True, metavar="DIR", help="prediction maps of the same names")
    parser.add_argument("--output", required=True, type=Path, metavar="FILE", help="the PNG to write")
    parser.add_argument("--count", type=cli.number(), default=16, help="images at most")
    parser.add_argument("--columns", type=cli.number(), default=8, help="images side by side")
    return parser


if __name__ == "__main__":
    main(get_args_parser().parse_args())
