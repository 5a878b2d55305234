"""The GPU (Pallas, Triton) kernel of `attention`, forward and backward. Empty so far: calls go to `xla.py`."""


def unsupported() -> str | None:
    """Why this room cannot take a call, or None when it can."""
    return "is not available: the GPU kernel of attention has not been written"
