"""The command of `gatedjax/eval.py`: `python eval.py --help`."""

from gatedjax.eval import run

if __name__ == "__main__":
    run()
