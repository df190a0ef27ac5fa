"""``python -m herdgraph.calibration CHECKPOINT -o DIRECTORY``."""

from .cli import calibrate

if __name__ == "__main__":
    calibrate(prog_name="python -m herdgraph.calibration")
