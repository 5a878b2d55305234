"""Gated sequence-model ops for JAX: plain functions of arrays on CPU, GPU and TPU.

The functions are in `kernels_pallas.ops`; each op is a package of its own beside it. This package
imports jax and jaxtyping only. It re-exports nothing, so that `kernels_pallas.attention` is the
package, not the function of that name.
"""

import jax

_OLDEST_JAX = (0, 11, 2)

if jax.__version_info__ < _OLDEST_JAX:
    oldest = ".".join(map(str, _OLDEST_JAX))
    raise ImportError(
        f"kernels_pallas: got jax {jax.__version__}, expected {oldest} or newer: "
        f"pip install -U 'jax>={oldest}'"
    )
