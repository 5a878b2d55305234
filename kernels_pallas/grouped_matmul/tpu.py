"""The TPU (Pallas, Mosaic) kernel of `grouped_matmul`, forward and backward. Empty so far: calls go to `xla.py`."""


def unsupported() -> str | None:
    """Why this room cannot take a call, or None when it can."""
    return "is not available: the TPU kernel of grouped_matmul has not been written"
