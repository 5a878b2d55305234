"""The families of checkpoints, by the `model_type` of their config.json."""

from gatedjax.config import Difference, ModelConfig
from gatedjax.errors import InputError, shown
from gatedjax.interop.families import (
    dense,
    fla,
    gpt_oss,
    latent,
    nemotron_h,
    olmo_hybrid,
    qwen_hybrid,
    rwkv6,
    rwkv7,
)
from gatedjax.interop.families.base import Family, differences

_ALL = (
    *dense.FAMILIES,
    *qwen_hybrid.FAMILIES,
    *olmo_hybrid.FAMILIES,
    *gpt_oss.FAMILIES,
    *latent.FAMILIES,
    *nemotron_h.FAMILIES,
    *fla.FAMILIES,
    *rwkv6.FAMILIES,
    *rwkv7.FAMILIES,
)
FAMILIES: dict[str, Family] = {family.model_type: family for family in _ALL}
_BY_ANY_NAME = FAMILIES | {name: family for family in _ALL for name in family.also}


def family_named(name: str, where: str) -> Family:
    """The family of a model type.

    Args:
      name: as config.json or a flag has it.
      where: it was found, for the message.

    Raises:
      InputError: there is none.
    """
    if not isinstance(name, str) or name not in _BY_ANY_NAME:
        known = ", ".join(FAMILIES)
        raise InputError(f"{where}: got {shown(name)}, expected one of {known}")
    return _BY_ANY_NAME[name]


def fitting_family(model: ModelConfig) -> Family:
    """The first family whose config.json says all of a model.

    Raises:
      InputError: there is none; the message says what the nearest one lacks.
    """
    nearest: tuple[Family, list[Difference]] | None = None
    for family in FAMILIES.values():
        try:
            lacking = differences(family, model)
        except InputError:
            continue
        if not lacking:
            return family
        if nearest is None or len(lacking) < len(nearest[1]):
            nearest = (family, lacking)
    if nearest is None:
        raise InputError(f"--checkpoint: its model is of no family: {', '.join(FAMILIES)}")
    raise InputError(f"--checkpoint: its model is of no family; {_lack(*nearest)}")


def require_fits(family: Family, model: ModelConfig) -> None:
    """InputError unless the family's config.json says all of the model."""
    lacking = differences(family, model)
    if lacking:
        raise InputError(f"--checkpoint: {_lack(family, lacking)}")


def _lack(family: Family, lacking: list[Difference]) -> str:
    key, value, said = lacking[0]
    more = f", and {len(lacking) - 1} more" if len(lacking) > 1 else ""
    return f"{key}: got {shown(value)}, {family.model_type} has {shown(said)}{more}"
