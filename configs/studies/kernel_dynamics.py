"""When gradient descent fits one layer: softmax and a Gaussian kernel (arXiv 2411.07538).

    python -m gatedjax.study configs/studies/kernel_dynamics.py [--small]

Random rows and answers; W_Q alone is trained, or all matrices.
"""

from gatedjax.evidence.kernel_dynamics import KernelDescent
from gatedjax.study import Cell, Picture, Study

KERNELS = ("softmax", "gaussian")
TRAINED = ("query", "all")


def get_study(small: bool) -> Study:
    """A cell for each kernel and each way to train."""
    steps = 3_000 if small else 20_000
    cells = []
    for trained in TRAINED:
        for kernel in KERNELS:
            experiment = KernelDescent(kernel=kernel, trained=trained, steps=steps)
            labels = {"kernel, trained": f"{kernel}, {trained}"}
            cells.append(Cell(labels, experiment=experiment))
    columns = tuple(f"loss@{steps // part}" for part in (100, 10, 1))
    return Study(
        title="Gradient descent on one layer, two kernels",
        cells=tuple(cells),
        seeds=tuple(range(3 if small else 10)),
        measures=(),
        columns=("loss at start", *columns, "rate"),
        pictures=(Picture("step", "loss@", line="kernel, trained", log_x=True),),
    )
