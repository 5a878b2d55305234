"""Which device the surrounding computation is compiled for: one that is here, or an absent one.

An ambient abstract mesh may name a device that is not here: then programs are compiled for it.
"""

import jax
from jax.sharding import AbstractDevice


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


def target_platform() -> str:
    """The platform that the surrounding computation is compiled for: "cpu", "gpu" or "tpu".

    An abstract mesh that names its device wins (compiling for an absent accelerator), then
    `jax.default_device`, then the default backend.
    """
    device = absent_device()
    if device is not None:
        return device.platform
    default = jax.config.jax_default_device
    if default is None:
        return jax.default_backend()
    # `jax.default_device` takes a device or the name of a platform.
    if isinstance(default, str):
        return default
    return default.platform
