"""The TPU (Pallas, Mosaic) kernel of `attention`, forward and backward. Empty so far: calls go to `xla.py`."""


def unsupported() -> str | None:
    """Why this room cannot take a call, or None when it can."""
    return "is not available: the TPU kernel of attention has not been written"
