"""SAPO's gate beside GRPO's clip, where a program checks answers.

    python -m gatedjax.study policies [--small]

arXiv 2511.20347. Policies from scratch reverse a string of four of five letters; the reward is the
fraction of the answer's tokens that are right. More steps on the answers of a round are further
off-policy; of a single step the ratios are 1, where all objectives have the same gradient.
"solved" is how often the most likely answer is all right, "off_policy" the fraction of tokens whose
ratio left 1 +- 0.2.

What differs: the paper tunes language models of billions of parameters on mathematics. Another task
of the loop, two numbers to be added, is not here.
"""

from gatedjax.study import Cell, Picture, Study
from gatedjax.study.policy_loop import OBJECTIVES, Loop

# On the answers of a round.
STEPS = (4, 16)
STEPS_SMALL = (4,)


def get_study(small: bool) -> Study:
    """A cell for each objective and number of steps."""
    cells = []
    for steps in STEPS_SMALL if small else STEPS:
        for objective in OBJECTIVES:
            loop = Loop(objective=objective, rounds=100, steps=steps)
            labels = {"steps of a round": f"{steps} steps a round", "objective": objective}
            cells.append(Cell(labels, experiment=loop))
    return Study(
        title="Policy gradients on tasks that a program checks",
        cells=tuple(cells),
        seeds=(0,) if small else (0, 1),
        measures=(),
        columns=("reward", "mean_reward", "solved", "off_policy"),
        pictures=(Picture("steps of a round", "mean_reward", line="objective"),),
    )
