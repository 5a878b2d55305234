"""Whether the layers of a training step are compiled one by one, in place of a loop over periods.

A loop stacks what its backward pass needs of every layer, which takes time and memory; without the
loop each layer is compiled for itself, which takes longer to compile. The figures are those of the
step in docs/performance.md, four layers of width 2048 on a TPU v5p (model time).
"""

import dataclasses

from jax.sharding import Mesh

from gatedjax.aot.run_time import run_seconds
from gatedjax.config import Config, ModelConfig

# Of a step, which the loop costs.
SAVED_FRACTION = 0.05
# CPU seconds for each layer that is compiled by itself.
COMPILE_SECONDS_A_LAYER = 11.0
# A run is compiled more than once: tried, preempted, gone on with.
LEAST_GAIN = 10.0
# More have not been compiled; a layer of width 2048 takes 20 MiB of a chip's memory as a program.
MOST_LAYERS = 32


@dataclasses.dataclass(frozen=True)
class Unrolling:
    """What the rule of `ModelConfig.unroll` says of a run.

    compile_seconds: more, of a CPU core, if its layers are unrolled.
    saved_seconds: fewer, of all its steps; 0 where the peak of the devices is not known.
    layers: of the model.
    """

    compile_seconds: float
    saved_seconds: float
    layers: int

    @property
    def is_worth_it(self) -> bool:
        is_small = self.layers <= MOST_LAYERS
        return is_small and self.saved_seconds >= LEAST_GAIN * self.compile_seconds > 0

    def __str__(self) -> str:
        verdict = "unrolled" if self.is_worth_it else "in a loop"
        return (
            f"layers: {verdict}; unrolled, compiling takes about {self.compile_seconds:.0f} s "
            f"longer and the steps of the run {self.saved_seconds:.0f} s less (the rule: "
            f"{LEAST_GAIN:g} times as much saved, at most {MOST_LAYERS} layers)"
        )


def unrolling(config: Config, mesh: Mesh) -> Unrolling:
    """The figures of a run on this mesh."""
    model = config.model
    saved = SAVED_FRACTION * run_seconds(config, mesh)
    repeated = (model.num_periods - 1) * model.period
    return Unrolling(COMPILE_SECONDS_A_LAYER * repeated, saved, model.num_layers)


def is_asked(model: ModelConfig) -> bool:
    """Whether the rule is to decide."""
    return model.unroll == "auto" and model.scan_layers


def by_the_rule(config: Config, mesh: Mesh) -> Config:
    """The run as its step is compiled on this mesh: parameters are the same either way."""
    if not is_asked(config.model):
        return config
    is_loop = not unrolling(config, mesh).is_worth_it
    model = dataclasses.replace(config.model, scan_layers=is_loop)
    return dataclasses.replace(config, model=model)
