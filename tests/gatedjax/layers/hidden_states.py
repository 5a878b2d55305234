"""The hidden states of a model, compiled once for each of its configurations."""

import functools

import jax

from gatedjax.model import LanguageModel


@functools.partial(jax.jit, static_argnums=0)
def hidden(model, params, tokens, documents=None, caches=None):
    y, caches, _ = LanguageModel(model).apply(
        {"params": params}, tokens, segment_ids=documents, caches=caches
    )
    return y, caches
