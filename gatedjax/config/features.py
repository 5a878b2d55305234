"""How many features a head has, by the map that makes them (`layers/feature_maps.py`)."""

import math

# Maps with more features than the key has channels, or fewer.
WIDER_MAPS = ("cosformer", "norm_aware", "favor+")


def feature_dim(name: str, key_dim: int, num_features: int | None) -> int:
    """Features of a head.

    Args:
      name: of the map.
      key_dim: channels of a head's queries and keys.
      num_features: of favor+; None for K log K, as published.
    """
    if name in ("cosformer", "norm_aware"):
        return 2 * key_dim
    if name != "favor+":
        return key_dim
    if num_features is None:
        return max(2, int(key_dim * math.log(key_dim)))
    return num_features
