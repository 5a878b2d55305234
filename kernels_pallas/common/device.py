"""Which device the surrounding computation is compiled for: one that is here, or an absent one.

An ambient abstract mesh may name a device that is not here: then programs are compiled for it.
"""

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

import jax
from jax.sharding import AbstractDevice

_lowered_for: ContextVar[str | None] = ContextVar("lowered_for", default=None)


@contextlib.contextmanager
def lowering_for(platform: str) -> Iterator[None]:
    """Says which platform the programs traced inside are for: "tpu", "gpu" or "cpu".

    `jax.export.export(jax.jit(f), platforms=["tpu"])` does not tell while it traces `f`.
    """
    token = _lowered_for.set(platform)
    try:
        yield
    finally:
        _lowered_for.reset(token)


def absent_device() -> AbstractDevice | None:
    """The device that an ambient abstract mesh names; None where there is no such mesh."""
    return jax.sharding.get_abstract_mesh().abstract_device


def absent_device_kind() -> str | None:
    """The kind of `absent_device`; None where there is none."""
    device = absent_device()
    return None if device is None else device.device_kind


def device_kind() -> str:
    """`jax.Device.device_kind` of the device that the surrounding computation is compiled for."""
    return absent_device_kind() or jax.devices()[0].device_kind


def target_platform(*arrays: jax.Array | None) -> str:
    """The platform that the surrounding computation is compiled for: "cpu", "gpu" or "tpu".

    `lowering_for` wins, then an abstract mesh that names its device (compiling for an absent
    accelerator), the device that one of `arrays` is committed to, `jax.default_device`, the default
    backend. An argument of a `jit` function does not tell where it lies.
    """
    platform = _lowered_for.get()
    if platform is not None:
        return platform
    device = absent_device()
    if device is not None:
        return device.platform
    for x in arrays:
        if isinstance(x, jax.Array) and not isinstance(x, jax.core.Tracer) and x.committed:
            return next(iter(x.devices())).platform
    default = jax.config.jax_default_device
    if default is None:
        return jax.default_backend()
    # `jax.default_device` takes a device or the name of a platform.
    if isinstance(default, str):
        return default
    return default.platform
