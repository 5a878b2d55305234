"""RADLADS (arXiv 2505.03005): the attention of a trained model becomes RAD-RWKV7, in three stages.

    python -m gatedjax.convert --from=runs/teacher --to=rad_rwkv7 --workdir=runs/rad

does all; one by one they are

    python train.py --config=configs/convert_rad_rwkv7.py:1=runs/teacher --workdir=runs/rad_1
    python train.py --config=configs/convert_rad_rwkv7.py:2=runs/rad_1,runs/teacher \\
        --workdir=runs/rad_2
    python train.py --config=configs/convert_rad_rwkv7.py:3=runs/rad_2 --workdir=runs/rad_3

Stage 1 learns the new mixers from what the attention gave out, stage 2 the whole model from the
teacher's predictions, stage 3 from text, in the paper on longer rows
(`--config.data.seq_len=16384`). The teacher is any run with gated attention, also an imported one.
Rates are the paper's, for models of 7B and more, whose stages 1 to 3 saw 100M, 250M to 700M and
100M tokens; small models need larger ones in stages 2 and 3 (docs/conversions.md).

Hardware: what the teacher needs; twice its parameters in stages 1 and 2.
"""

from gatedjax.training.conversion import parsed_stage, student_of


def get_config(arg: str = ""):
    key = "configs/convert_rad_rwkv7.py"
    stage = parsed_stage(arg, stages=3, with_teacher=(1, 2), key=key)
    student = student_of(stage.run, "rad_rwkv7")
    c = student.config
    c.optim.weight_decay = 0.0
    c.optim.warmup_steps = 10
    c.train.sample_tokens = 0
    c.train.batch_size = 96
    c.train.steps = 5000
    c.train.teacher.run = stage.teacher
    if stage.number == 1:
        c.train.batch_size = 32
        c.optim.trainable = tuple(f"{mixer}.*" for mixer in student.mixers)
        c.optim.lr = 1e-3
        c.optim.final_lr_fraction = 0.01
        c.train.teacher.cross_entropy = 0.0
        c.train.teacher.mse = 1.0
    else:
        c.optim.lr = 1e-5
        c.optim.schedule = "constant"
    if stage.number == 2:
        c.train.teacher.cross_entropy = 0.0
        c.train.teacher.kl = 1.0
    return c
