"""The arrays of a step, by orbax and tensorstore. Only this file imports orbax.

Nothing is unpickled: arrays are read as numbers into a target that the caller names.
"""

import functools
import math
import os
from collections.abc import Collection, Mapping
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath
from jax.sharding import SingleDeviceSharding

from gatedjax.errors import InputError
from gatedjax.paths import Place
from gatedjax.training import manifest as manifests
from gatedjax.training.digests import Leaves
from gatedjax.training.preservation import NewestAndSound

Manager = ocp.CheckpointManager


def open_manager(directory: Place, preservation: NewestAndSound) -> Manager:
    """orbax's manager of the steps in a directory.

    It looks into all of them, and deletes what a killed run left: the lock says that nobody is
    writing it.
    """
    _require_known(directory)
    options = ocp.CheckpointManagerOptions(
        preservation_policy=preservation,
        cleanup_tmp_directories=True,
        lightweight_initialize=True,
        save_root_metadata=False,
    )
    handlers = {
        "state": ocp.PyTreeCheckpointHandler(),
        "manifest": ocp.JsonCheckpointHandler(),
    }
    return ocp.CheckpointManager(epath.Path(directory), options=options, item_handlers=handlers)


def start_saving(
    manager: Manager,
    step: int,
    leaves: Leaves,
    manifest: Mapping[str, Any],
) -> None:
    """Starts to save a step. Returns once the arrays are copied off the devices.

    Args:
      manager: of the directory.
      step: its number.
      leaves: the arrays, by name.
      manifest: what the step says of itself.
    """
    items = ocp.args.Composite(
        state=ocp.args.PyTreeSave(leaves),
        manifest=ocp.args.JsonSave(manifest),
    )
    # force: orbax would otherwise skip, silently, a step that is not newer than the newest.
    manager.save(step, args=items, force=True)


def read_arrays(
    step_dir: Place,
    described: Mapping[str, Any],
    read: Mapping[str, jax.ShapeDtypeStruct],
    unread: Collection[str],
) -> Leaves:
    """Arrays of a step by name.

    Args:
      step_dir: the folder of the step.
      described: what its manifest says of its arrays.
      read: those that are read, with shape, dtype and sharding.
      unread: names of all others.

    Raises:
      DamagedError: the store does not hold what the manifest describes.
    """
    _require_known(step_dir)
    targets: dict[str, Any] = dict(read)
    restore_args = ocp.checkpoint_utils.construct_restore_args(targets)
    for name in unread:
        targets[name] = ocp.PLACEHOLDER
        restore_args[name] = ocp.RestoreArgs()
    args = ocp.args.PyTreeRestore(item=targets, restore_args=restore_args)
    place = epath.Path(step_dir / "state")
    largest = max((leaf.size * leaf.dtype.itemsize for leaf in read.values()), default=0)
    # Beside what has arrived, the arrays under way are held compressed, whole and by shards. orbax
    # refuses an array that is larger than what may be under way.
    handler = ocp.PyTreeCheckpointHandler(restore_concurrent_gb=1 + math.ceil(largest / 1e9))
    stored = handler.metadata(place).tree
    manifests.require_stored_as_described(stored, described)
    arrays = handler.restore(place, args=args)
    return {name: arrays[name] for name in read}


def with_sharding(name: str, leaf: Any) -> jax.ShapeDtypeStruct:
    """The target of one leaf.

    Its sharding is never left open: orbax would take it from a file of the checkpoint.
    """
    sharding = getattr(leaf, "sharding", None)
    if sharding is None:
        if jax.process_count() > 1:
            raise ValueError(f"target: got {name} without a sharding, expected one on each leaf")
        sharding = SingleDeviceSharding(jax.local_devices()[0])
    # A sharding that does not divide the shape fails here, not as damage.
    sharding.shard_shape(leaf.shape)
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _require_known(place: Place) -> None:
    """Makes orbax know where s3:// is, if that is asked for."""
    if os.fspath(place).startswith("s3://"):
        _teach_s3()


@functools.cache
def _teach_s3() -> None:
    """orbax knows Cloud Storage alone; tensorstore, below it, knows S3 as well.

    Four functions of orbax say of a path that it is in a store without renames, and how tensorstore
    calls it. They are replaced by such as say the same of s3://.

    Raises:
      InputError: this version of orbax has no such functions.
    """
    try:
        from orbax.checkpoint._src.path import gcs_utils
        from orbax.checkpoint._src.serialization import tensorstore_utils

        prefixes = gcs_utils._GCS_PATH_PREFIX
        kvstore_of_gcs = gcs_utils.get_kvstore_for_gcs
        normalized = tensorstore_utils._normalize_path
        is_in_gcs = tensorstore_utils._use_gcs_driver
    except (ImportError, AttributeError) as error:
        raise InputError(
            f"s3://: this version of orbax-checkpoint is not known here ({error}): install "
            "orbax-checkpoint 0.12, or mount the bucket"
        ) from None

    def kvstore(path: str) -> dict[str, Any]:
        return s3_kvstore(path) if path.startswith("s3://") else kvstore_of_gcs(path)

    def normalized_with_s3(path: str) -> str:
        plain = normalized(path)
        return plain.replace("s3:/", "s3://", 1) if plain.startswith("s3:/") else plain

    def is_in_store(directory: str) -> bool:
        return directory.startswith("s3://") or is_in_gcs(directory)

    gcs_utils._GCS_PATH_PREFIX = (*prefixes, "s3://")  # pyrefly: ignore  (a tuple of one)
    gcs_utils.get_kvstore_for_gcs = kvstore  # pyrefly: ignore  (another name of the parameter)
    tensorstore_utils._normalize_path = normalized_with_s3
    tensorstore_utils._use_gcs_driver = is_in_store


def s3_kvstore(url: str) -> dict[str, Any]:
    """tensorstore's name of a path in S3, by the variables that AWS's own tools read."""
    bucket, _, path = url.removeprefix("s3://").partition("/")
    spec: dict[str, Any] = {"driver": "s3", "bucket": bucket, "path": path}
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    if endpoint:
        spec["endpoint"] = endpoint
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    if region:
        spec["aws_region"] = region
    if os.environ.get("AWS_ACCESS_KEY_ID"):
        # Else tensorstore's library looks into files first, and logs that they are not there.
        spec["aws_credentials"] = {"type": "environment"}
    return spec
