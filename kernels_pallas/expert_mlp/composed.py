"""`expert_mlp` as calls of `grouped_matmul`, by the reference, xla or gpu implementation.

Three of them; on GPU two, of which the first reads the rows once for gate and up.
"""

from functools import partial

from jax import Array
from jaxtyping import Float

from kernels_pallas.common.mesh import varying_together
from kernels_pallas.dispatch import Implementation
from kernels_pallas.expert_mlp.gate import gated_product
from kernels_pallas.expert_mlp.inputs import ExpertMlpInputs
from kernels_pallas.grouped_matmul import gpu, grouped_matmul


def expert_mlp(
    inputs: ExpertMlpInputs,
    *,
    activation: str,
    implementation: Implementation,
    interpret: bool,
) -> Float[Array, "R M"]:
    """As `api.expert_mlp`, with every default filled in.

    The weights multiply the product of gate and up, not the result, which is the same: then their
    gradient needs the product and its cotangent only.
    """
    # What the three matmuls have in common.
    matmul = partial(
        grouped_matmul,
        group_sizes=inputs.group_sizes,
        implementation=implementation,
        interpret=interpret,
    )
    if implementation == "gpu":
        gate, up = _gate_and_up(inputs, interpret)
    else:
        gate = matmul(inputs.rows, inputs.gate)
        up = matmul(inputs.rows, inputs.up)
    # In float32 at least: it is rounded once, after the weights.
    product = gated_product(activation, gate, up)
    if inputs.weights is not None:
        product = product * inputs.weights.astype(product.dtype)[:, None]
    return matmul(product.astype(inputs.rows.dtype), inputs.down)


def _gate_and_up(
    inputs: ExpertMlpInputs,
    interpret: bool,
) -> tuple[Float[Array, "R F"], Float[Array, "R F"]]:
    """Both pre-activations by one kernel."""
    # `grouped_matmul` does this for its arguments.
    inputs = varying_together(inputs)
    gate, up = gpu.grouped_matmuls(
        inputs.rows,
        (inputs.gate, inputs.up),
        inputs.group_sizes,
        interpret=interpret,
    )
    return gate, up
