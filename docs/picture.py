"""Make the picture of the README smaller: 256 colours in place of 16 million.

    mlperturb demo && mlperturb figures mlperturb-demo --kind case
    python docs/picture.py mlperturb-demo/figures/case-grace_hopper.png docs/images/portrait.png

The figure is that of `mlperturb figures`; nothing but the number of its colours changes.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from PIL import Image


def main() -> None:
    """Read the figure and write it again with a palette of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("figure", type=Path)
    parser.add_argument("picture", type=Path)
    options = parser.parse_args()
    with Image.open(options.figure) as figure:
        small = figure.convert("RGB").quantize(256, Image.Quantize.MEDIANCUT, dither=Image.Dither.FLOYDSTEINBERG)
    small.save(options.picture, optimize=True)


if __name__ == "__main__":
    main()
