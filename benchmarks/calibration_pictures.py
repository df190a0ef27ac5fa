"""The pictures of docs/calibration.md: two of a calibration's report, on white, since pages may be dark.

    python -m herdgraph calibrate .cache/demo/checkpoint -o .cache/calib
    python -m benchmarks.calibration_pictures .cache/calib

``make demo`` makes the checkpoint.
"""

from __future__ import annotations

import argparse
import io
from pathlib import Path

from PIL import Image

from herdgraph.calibration.report import expert_picture, layer_picture
from herdgraph.reading import read_json

PICTURES = Path(__file__).parents[1] / "docs" / "pictures"


def save_on_white(png: bytes, path: Path) -> None:
    """Fill the transparent ground of a picture."""
    with Image.open(io.BytesIO(png)) as picture:
        ground = Image.new("RGBA", picture.size, "white")
        ground.alpha_composite(picture.convert("RGBA"))
    ground.convert("RGB").save(path, optimize=True)


def main() -> None:
    """Parse the command line and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("calibration", type=Path)
    found = read_json(parser.parse_args().calibration / "calibration.json")
    save_on_white(expert_picture(found), PICTURES / "experts.png")
    save_on_white(layer_picture(found), PICTURES / "layer-errors.png")


if __name__ == "__main__":
    main()
