"""How long a run is likely to take, by which it is decided how long its step may compile."""

from jax.sharding import Mesh

from gatedjax.aot.targets import peak_flops
from gatedjax.config import Config
from gatedjax.training.flops import train_flops_per_token

# Of the peak, for the estimate of a step's time.
USUAL_UTILIZATION = 0.6


def run_seconds(config: Config, mesh: Mesh) -> float:
    """Of all its steps on this mesh; 0 where the peak of the devices is not known."""
    peak = peak_flops(mesh.devices.flat[0].device_kind)
    if peak is None:
        return 0.0
    tokens = config.train.steps * config.train.batch_size * config.data.seq_len
    flops_per_token = train_flops_per_token(config.model, config.data.seq_len)
    return tokens * flops_per_token / (USUAL_UTILIZATION * peak * mesh.size)
