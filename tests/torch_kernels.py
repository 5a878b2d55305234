"""Keeps kernels of GPUs out of transformers' models, which oracles compare with on a CPU."""

import contextlib
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def without_kernels() -> Iterator[None]:
    """No kernels of fla for transformers, which takes them where it finds fla, GPU or not.

    It decides for the whole process when the module of a family is imported: import in here.
    """
    held = {name: sys.modules.get(name) for name in ("fla", "mamba_ssm", "causal_conv1d")}
    # None stops an import, which transformers takes for a package that is not there.
    sys.modules.update(dict.fromkeys(held))
    try:
        yield
    finally:
        for name, module in held.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module
