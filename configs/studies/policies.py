"""SAPO's gate beside GRPO's clip, where a program checks answers.

    python -m gatedjax.study policies [--small]

arXiv 2511.20347. Policies from scratch reverse a string or add two numbers; the reward is the
fraction of the answer's tokens that are right. More steps on the answers of a round are further
off-policy; of a single step the ratios are 1, where all objectives have the same gradient.
"solved" is how often the most likely answer is all right, "off_policy" the fraction of tokens whose
ratio left 1 +- 0.2.

What differs: the paper tunes language models of billions of parameters on mathematics.
"""

from gatedjax.study import Cell, Picture, Study
from gatedjax.study.policy_loop import OBJECTIVES, Loop, Task

# Letters of a string, digits of a number.
LENGTHS: dict[Task, int] = {"reverse": 4, "add": 2}
# Tasks, and steps on the answers of a round.
RUNS: tuple[tuple[Task, int], ...] = (("reverse", 4), ("reverse", 16), ("add", 16))
RUNS_SMALL = RUNS[:1]


def get_study(small: bool) -> Study:
    """A cell for each objective, and each task and number of steps."""
    cells = []
    for task, steps in RUNS_SMALL if small else RUNS:
        for objective in OBJECTIVES:
            loop = Loop(
                task=task,
                objective=objective,
                length=LENGTHS[task],
                rounds=100,
                steps=steps,
            )
            labels = {"run": f"{task}, {steps} steps a round", "objective": objective}
            cells.append(Cell(labels, experiment=loop))
    return Study(
        title="Policy gradients on tasks that a program checks",
        cells=tuple(cells),
        seeds=(0,) if small else (0, 1),
        measures=(),
        columns=("reward", "mean_reward", "solved", "off_policy"),
        pictures=(Picture("run", "mean_reward", line="objective"),),
    )
