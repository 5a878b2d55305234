"""The command of `gatedjax/train.py`: `python train.py --help`."""

from gatedjax.train import run

if __name__ == "__main__":
    run()
