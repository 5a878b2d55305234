"""Whether the products of a training step may take more of a TPU's VMEM than libtpu gives them.

With 48 MiB for a product and what is fused to it its blocks are larger, and its operands are read
less often; libtpu looks longer for them. In the model (docs/performance.md) whole steps take 5 to
7 % less time on v5p (2 % with sparse experts) and v6e, a feed-forward alone 19 % less on v7x, and
2 % on v5e, where it is not asked for. Compiling takes three times as long or more.
"""

import os

from jax.sharding import Mesh

from gatedjax.aot.run_time import USUAL_UTILIZATION, run_seconds
from gatedjax.config import Config

# Of 64 MiB of v5p and v7x, 128 of v6e. A number that LIBTPU_INIT_ARGS names stays.
SCOPED_VMEM = "xla_tpu_scoped_vmem_limit_kib"
KIBIBYTES = 49_152
LARGER_PRODUCTS = {SCOPED_VMEM: str(KIBIBYTES)}
# As jax names their devices. v5e is "TPU v5 lite".
KINDS = ("TPU v5p", "TPU v6", "TPU7")
# In shorter runs it may not save what compiling takes longer.
LEAST_SECONDS = 4 * 3600.0


def is_possible(mesh: Mesh) -> bool:
    """Whether the chips gain by it, and nothing else was asked of libtpu."""
    kind = mesh.devices.flat[0].device_kind
    is_set = SCOPED_VMEM in os.environ.get("LIBTPU_INIT_ARGS", "")
    return (kind == "TPU v5" or kind.startswith(KINDS)) and not is_set


def options(config: Config, mesh: Mesh) -> dict[str, str]:
    """The `compiler_options` of the run's training step: none in a short run."""
    if not is_possible(mesh) or run_seconds(config, mesh) < LEAST_SECONDS:
        return {}
    return LARGER_PRODUCTS


def line(config: Config, mesh: Mesh) -> str:
    """What was decided where it is possible, and by what rule."""
    hours = run_seconds(config, mesh) / 3600
    verdict = "larger blocks" if options(config, mesh) else "libtpu's own blocks"
    return (
        f"products: {verdict}; the run takes about {hours:.1f} h at {USUAL_UTILIZATION:.0%} of the "
        f"peak (the rule: from {LEAST_SECONDS / 3600:g} h on {KIBIBYTES // 1024} MiB of VMEM for a "
        "product, which takes several times as long to compile)"
    )
