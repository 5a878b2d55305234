"""Lizard (arXiv 2507.09025): the attention of a trained model becomes gated linear attention plus a
window, in two stages.

    python -m gatedjax.convert --from=runs/teacher --to=lizard --workdir=runs/lizard

does both; one by one they are

    python train.py --config=configs/convert_lizard.py:1=runs/teacher --workdir=runs/lizard_1
    python train.py --config=configs/convert_lizard.py:2=runs/lizard_1 --workdir=runs/lizard_2

Stage 1 learns what attention does not have, from its heads' outputs; stage 2 learns text, with
low-rank updates of queries, keys and values. The teacher is any run with gated attention, also an
imported one. The numbers are the paper's, for rows of 2,048 tokens and a window of 128.

Hardware: what the teacher needs, twice in stage 1.
"""

from gatedjax.training.conversion import parsed_stage, student_of


def get_config(arg: str = ""):
    key = "configs/convert_lizard.py"
    stage = parsed_stage(arg, stages=2, with_teacher=(1,), key=key)
    student = student_of(stage.run, "lizard")
    c = student.config
    c.optim.trainable = student.new
    c.optim.beta2 = 0.99
    c.optim.weight_decay = 0.0
    c.optim.final_lr_fraction = 0.1
    c.train.batch_size = 8
    c.train.steps = 1200
    c.optim.warmup_steps = 120
    c.train.sample_tokens = 0
    if stage.number == 1:
        c.optim.lr = 1e-3
        c.train.teacher.run = stage.teacher
        c.train.teacher.cross_entropy = 0.0
        c.train.teacher.mse = 1.0
        c.train.teacher.activation = "heads_output"
    else:
        c.optim.lr = 5e-4
        c.model.lora.rank = 8
        c.model.lora.alpha = 16.0
        parts = ("query", "key", "value")
        c.model.lora.targets = tuple(f"{m}.{part}" for m in student.mixers for part in parts)
        c.train.init_fresh = (*c.train.init_fresh, "*.lora.*")
    return c
