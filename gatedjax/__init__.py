"""gatedjax: gates in sequence models, in JAX and Flax.

The axis legend, used by every docstring, einsum and shape annotation of the project:

  B   batch: rows of a batch (a row may hold several packed documents)
  T   time: query positions; also plain sequence length
  S   key positions, where they differ from T (a cache, a window)
  H   query heads;  Hk, Hv: key and value heads (each divides H: grouped heads)
  K   key and query channels of a head
  V   value channels of a head
  D   channels of a head where K = V
  M   model width (the residual stream)
  F   feed-forward hidden width
  E   experts;  k: experts chosen per token
  L   layers;  P: layers in one period of the pattern
  C   chunk: tokens per chunk of a scan;  N: number of chunks
  X   vocabulary entries

`grouped_matmul` alone uses M, K, N, G for rows, inner width, outer width and groups, as the matmul literature does.
"""

__version__ = "0.1.0"
