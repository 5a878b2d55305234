"""How exactly the surrounding computation wants its matrix products."""

import jax

# Values of `jax.default_matmul_precision` under which a product of bfloat16 inputs is one pass.
_ONE_PASS = (None, "default", "fastest", "bfloat16", "BF16_BF16_F32")


def one_pass_matmuls() -> bool:
    """Whether `jax.default_matmul_precision` lets a product of bfloat16 inputs be one pass."""
    return jax.config.jax_default_matmul_precision in _ONE_PASS
