"""A run small enough for every test: configs/tiny.py, narrowed, on random tokens."""

import dataclasses
import importlib.util
from pathlib import Path

import jax
import numpy as np

from gatedjax.config import Config, FrozenDict, from_config_dict
from gatedjax.data import Batch
from gatedjax.sharding import global_batch
from gatedjax.training.run import Run, fresh_state, prepare
from gatedjax.training.step import jit_train_step

ROOT = Path(__file__).parents[1]
VOCAB, ROWS, LENGTH = 64, 8, 32


def load_config(name: str) -> Config:
    spec = importlib.util.spec_from_file_location(name, ROOT / "configs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return from_config_dict(module.get_config())


def replace(config, **changes):
    """`dataclasses.replace` with dotted names: replace(c, optim__lr=1.0).

    Changes of one group are made at once: what goes together is checked together.
    """
    values, groups = {}, {}
    for name, value in changes.items():
        head, _, rest = name.partition("__")
        if rest:
            groups.setdefault(head, {})[rest] = value
        else:
            values[head] = value
    for head, inner_changes in groups.items():
        inner = values.get(head, config[head] if isinstance(config, FrozenDict) else None)
        if inner is None:
            inner = getattr(config, head)
        values[head] = replace(inner, **inner_changes)
    if isinstance(config, FrozenDict):
        return FrozenDict({**config, **values})
    return dataclasses.replace(config, **values)


def tiny(**changes) -> Config:
    c = load_config("tiny")
    c = replace(
        c,
        model__vocab_size=VOCAB,
        model__width=32,
        model__num_layers=2,
        model__mixers__gla__key_dim=8,
        model__mixers__gla__value_dim=8,
        model__mixers__gla__chunk_size=16,
        model__mixers__attention__head_dim=8,
        model__mixers__attention__num_kv_heads=4,
        model__ffns__mlp__hidden=64,
        model__ffns__moe__hidden=32,
        model__ffns__moe__num_experts=4,
        model__ffns__moe__shared_hidden=32,
        data__seq_len=LENGTH,
        train__batch_size=ROWS,
        train__steps=50,
        optim__warmup_steps=3,
    )
    return replace(c, **changes)


def plain(**changes) -> Config:
    """One layer of attention and a dense feed-forward: compiles in a third of the time."""
    one_layer = dict(
        model__pattern=("attention",), model__ffn_pattern=("mlp",), model__num_layers=1
    )
    return tiny(**one_layer | changes)


def random_batch(seed: int = 0, rows: int = ROWS, length: int = LENGTH) -> Batch:
    """Tokens with a pattern to learn, two documents per row, some targets masked."""
    rng = np.random.default_rng(seed)
    tokens = (rng.integers(0, 7, (rows, 1)) + 3 * np.arange(length + 1)) % VOCAB
    tokens = np.where(
        rng.random(tokens.shape) < 0.2, rng.integers(0, VOCAB, tokens.shape), tokens
    ).astype(np.int32)
    cut = rng.integers(5, length - 5, (rows, 1))
    place = np.arange(length)[None]
    segments = np.where(place < cut, 1, 2).astype(np.int32)
    positions = np.where(place < cut, place, place - cut).astype(np.int32)
    mask = (place != cut - 1).astype(np.float32) * (rng.random((rows, length)) < 0.9)
    return Batch(tokens[:, :-1], tokens[:, 1:], segments, positions, mask.astype(np.float32))


def run_steps(
    config: Config, steps: int, batches=random_batch, devices=None
) -> tuple[Run, object, list[dict]]:
    """The run, the state after `steps` steps on all simulated devices (or those given), and the
    metrics of each.
    """
    run = prepare(config, devices)
    with jax.set_mesh(run.mesh):
        state, step_fn, log = fresh_state(run), jit_train_step(config, run.tx, run.shardings), []
        for i in range(steps):
            state, metrics = step_fn(
                state, global_batch(run.mesh, batches(i), config.train.batch_size)
            )
            log.append({k: float(v) if v.ndim == 0 else np.asarray(v) for k, v in metrics.items()})
    return run, state, log
