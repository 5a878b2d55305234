"""Gated sequence-model ops for JAX: plain functions of arrays on CPU, GPU and TPU.

The functions are in `kernels_pallas.ops`; each op is a package of its own beside it. This package
imports jax and jaxtyping only. It re-exports nothing, so that `kernels_pallas.attention` is the
package, not the function of that name.
"""
