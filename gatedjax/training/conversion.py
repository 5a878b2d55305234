"""A trained model with other mixers in place of its gated attention (`configs/convert_*.py`).

The new mixers (`config/converted.py`) take over the parameters of the attention layers by their
names; what they have besides starts fresh.
"""

from typing import Any, NamedTuple

from ml_collections import ConfigDict

from gatedjax.config import BlockConfig, from_config_dict, layer
from gatedjax.config.converted import CONVERTED, check_windows
from gatedjax.errors import InputError, require
from gatedjax.training.from_run import config_from_run

# Of a mixer, by its kind: what gated attention does not have.
_NEW = {
    "lizard": ("query_features", "key_features", "decay.*", "decay_bias", "meta_*", "anchor_*"),
    "rad_rwkv6": ("decay_*",),
    "rad_rwkv7": ("decay_*", "rate_*"),
}


class Stage(NamedTuple):
    """What a stage of a conversion starts from.

    number: 1, 2 ...
    run: whose weights it takes: the model to convert, or the stage before.
    teacher: the model to convert; "" where the stage has none.
    """

    number: int
    run: str
    teacher: str


class Student(NamedTuple):
    """A model with converted layers.

    config: all defaults, the model, tokenizer and row length of the run, whose weights it takes.
    new: patterns of the parameters that gated attention does not have.
    mixers: the names of the converted mixers in the model, "periods.layer_0.mixer".
    """

    config: ConfigDict
    new: tuple[str, ...]
    mixers: tuple[str, ...]


def parsed_stage(arg: str, stages: int, with_teacher: tuple[int, ...], key: str) -> Stage:
    """What stands behind the name of a conversion's configuration.

    "1=RUN" is the first stage of RUN; "2=RUN,TEACHER" a later one that goes on from RUN, and
    "2=RUN" one without a teacher.

    Args:
      arg: the text.
      stages: how many there are.
      with_teacher: those that learn from one.
      key: the configuration, for the message.
    """
    number, _, rest = arg.partition("=")
    run, _, teacher = rest.partition(",")
    numbers = [str(i + 1) for i in range(stages)]
    forms = []
    for i in map(int, numbers):
        has_own = i in with_teacher and i > 1
        forms.append(f"{i}=RUN,TEACHER" if has_own else f"{i}=RUN")
    expected = " or ".join(forms)
    require(number in numbers and bool(run), key, arg, expected)
    stage = int(number)
    if stage == 1:
        require(not teacher, key, arg, expected)
        teacher = run
    require(bool(teacher) == (stage in with_teacher) or stage == 1, key, arg, expected)
    return Stage(stage, run, teacher if stage in with_teacher else "")


def student_of(run: str, kind: str, **values: Any) -> Student:
    """The model of a run with its attention converted, unless that has been done.

    Args:
      run: a run directory, or one step of it.
      kind: of the new mixers: lizard, rad_rwkv6, rad_rwkv7.
      values: keys of the new mixers.

    Raises:
      InputError: no run there; no attention in it; an option of its attention that the new mixers
        make nothing of; a window that is longer than the run's rows.
    """
    c = config_from_run(run)
    before = from_config_dict(c).model
    key = "config.train.init_from"
    kinds = {mixer.kind for mixer in before.mixers.values()}
    is_done = kind in kinds
    others = sorted(kinds.intersection(CONVERTED) - {kind})
    require(not others, key, f"a run with {others}", f"gated_attention or {kind}")
    new_gates = False
    if not is_done:
        require("gated_attention" in kinds, key, f"a run with {sorted(kinds)}", "gated_attention")
        for name, mixer in before.mixers.items():
            if mixer.kind != "gated_attention":
                continue
            taken = {**vars(mixer), **values}
            # A window of its own is none of the new mixer's.
            for dropped in ("kind", "window"):
                if dropped not in values:
                    taken.pop(dropped)
            if kind != "lizard" and mixer.gate_position == "none":
                taken |= {"gate_position": "sdpa", "gate_granularity": "elementwise"}
                new_gates = True
            c.model.mixers[name] = layer(kind, **taken)
    try:
        model = from_config_dict(c).model
        check_windows(model.mixers, c.data.seq_len)
    except InputError as error:
        raise InputError(f"{key}: {run}: {error}") from None
    new = []
    mixers = []
    for block in model.blocks:
        if block.mixer.kind != kind:
            continue
        mixers.append(_place(block))
        parts = _NEW[kind] + (("gate.*",) if new_gates else ())
        new += [f"{mixers[-1]}.{part}" for part in parts]
    if not is_done:
        c.train.init_fresh = tuple(new)
    return Student(c, tuple(new), tuple(mixers))


def radlads(arg: str, kind: str) -> ConfigDict:
    """A stage of RADLADS (arXiv 2505.03005), the same three for both kinds of mixer.

    Args:
      arg: which stage of which run (`parsed_stage`).
      kind: of the new mixers: rad_rwkv6, rad_rwkv7.
    """
    stage = parsed_stage(arg, stages=3, with_teacher=(1, 2), key=f"configs/convert_{kind}.py")
    student = student_of(stage.run, kind)
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


def _place(block: BlockConfig) -> str:
    """The name of a block's mixer among the parameters."""
    return f"periods.{block.name}.mixer" if block.is_repeated else f"{block.name}.mixer"
