"""When gradient descent fits one layer: softmax and a Gaussian kernel (arXiv 2411.07538).

    python -m gatedjax.study configs/studies/kernel_dynamics.py [--small]

Random rows, and random answers of variance 1; W_Q alone is trained, or all matrices.
"""

from gatedjax.evidence.kernel_dynamics import KernelDescent
from gatedjax.study import Cell, Picture, Study

KERNELS = ("softmax", "gaussian")
TRAINED = {"query": "W_Q alone", "all": "all matrices"}
STEPS = 3_000


def get_study(small: bool) -> Study:
    """A cell for each kernel and each way to train."""
    cells = []
    for trained, name in TRAINED.items():
        for kernel in KERNELS:
            experiment = KernelDescent(kernel=kernel, trained=trained, steps=STEPS)
            labels = {"kernel, trained": f"{kernel}, {name}"}
            cells.append(Cell(labels, experiment=experiment))
    columns = tuple(f"error@{STEPS // part}" for part in (100, 10, 1))
    return Study(
        title="Gradient descent on one layer, two kernels",
        cells=tuple(cells),
        seeds=(0,) if small else (0, 1, 2),
        measures=(),
        columns=("error at start", *columns, "rate"),
        pictures=(Picture("step", "error@", line="kernel, trained", log_x=True, log_y=True),),
    )
