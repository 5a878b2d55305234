"""Gated sequence-model ops for JAX: plain functions of arrays, on CPU, GPU and TPU. Imports jax (and jaxtyping) only."""
