"""Checkpoints: equal to the bit after a restore; never a wrong value, a silent cast or a step lost
without a word.
"""

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import struct
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from gatedjax.errors import InputError
from gatedjax.training import orbax_store
from gatedjax.training.checkpoint import Checkpointer, read_config
from gatedjax.training.digests import array_digests, digests_of

# A read that fails leaves callbacks on an event loop that orbax has closed: noise, after the error
# that we test.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

CONFIG = {"model": {"width": 16, "norm_eps": 1e-6}, "name": "test"}


@struct.dataclass
class State:
    """As the train step's: a flax dataclass with optax's named tuples inside."""

    step: jax.Array
    params: dict
    opt_state: optax.OptState
    mask: jax.Array


def mesh_of(*shape):
    return jax.make_mesh(shape, ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2)


def shardings_of(state, mesh):
    """Matrices over both axes, everything else replicated."""
    return jax.tree.map(
        lambda x: NamedSharding(mesh, P("fsdp", "tensor") if x.ndim == 2 else P()), state
    )


def abstract(state):
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )


def make_state(seed=0):
    rng = np.random.default_rng(seed)
    params = {"embed": {"table": jnp.asarray(rng.standard_normal((16, 8)), jnp.float32)}}
    params["gate"] = jnp.asarray(rng.standard_normal(8), jnp.bfloat16)
    return State(
        step=jnp.int32(seed),
        params=params,
        opt_state=optax.chain(
            optax.clip_by_global_norm(1.0), optax.adamw(1e-3, mu_dtype=jnp.bfloat16)
        ).init(params),
        mask=jnp.asarray(rng.integers(0, 2, 5), jnp.bool_),
    )


@pytest.fixture(scope="module")
def states():
    """Three states on a 4 x 2 mesh, those of steps 1 to 3."""
    return {
        seed: jax.device_put(s := make_state(seed), shardings_of(s, mesh_of(4, 2)))
        for seed in (1, 2, 3)
    }


@pytest.fixture(scope="module")
def three_steps(states, tmp_path_factory):
    """A run directory with steps 1, 2, 3; tests that change it take `run_dir`, a copy."""
    directory = tmp_path_factory.mktemp("run")
    with Checkpointer(directory, CONFIG) as checkpointer:
        for step, state in states.items():
            checkpointer.save(step, state, data_index=10 * step)
    return directory


@pytest.fixture
def run_dir(three_steps, tmp_path):
    return shutil.copytree(three_steps, tmp_path / "run")


def assert_same_bits(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected)):
        assert a.dtype == e.dtype and a.shape == e.shape
        assert np.asarray(a).tobytes() == np.asarray(e).tobytes()


def restore_latest(directory, target, **options):
    said = []
    with Checkpointer(directory, report=said.append, **options) as checkpointer:
        return checkpointer.restore_latest(target), said


def files_of_step(directory, step):
    """Relative paths of a step's files, largest first."""
    root = directory / "checkpoints" / str(step)
    files = [p for p in root.rglob("*") if p.is_file()]
    return [p.relative_to(directory) for p in sorted(files, key=lambda p: -p.stat().st_size)]


# --- what is restored


def test_newest_step_comes_back_to_the_bit(three_steps, states):
    restored, said = restore_latest(three_steps, abstract(states[3]))
    assert_same_bits(restored.state, states[3])
    assert (restored.step, restored.data_index, restored.config, said) == (3, 30, CONFIG, [])
    table, wanted = restored.state.params["embed"]["table"], states[3].params["embed"]["table"]
    assert table.sharding == wanted.sharding


def test_restores_onto_another_mesh_and_onto_one_device(three_steps, states):
    with Checkpointer(three_steps, read_only=True) as checkpointer:
        other = shardings_of(states[2], mesh_of(2, 4))
        target = jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), states[2], other
        )
        on_other = checkpointer.restore(2, target).state
        assert_same_bits(on_other, states[2])
        assert on_other.params["embed"]["table"].sharding == other.params["embed"]["table"]
        without_sharding = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), states[2])
        on_one = checkpointer.restore(2, without_sharding)
        assert_same_bits(on_one.state, states[2])
        assert len(on_one.state.params["embed"]["table"].sharding.device_set) == 1


def test_empty_directory_gives_none_and_old_steps_go(tmp_path, states):
    with Checkpointer(tmp_path / "new", keep=2) as checkpointer:
        assert checkpointer.restore_latest(abstract(states[1])) is None
        for step in (1, 2, 3):
            checkpointer.save(step, states[step], data_index=0, wait=True)
        assert checkpointer.steps() == [2, 3]
        with pytest.raises(ValueError, match="step 3: is saved already"):
            checkpointer.save(3, states[1], data_index=0)


def test_a_donated_state_may_change_while_it_is_saved(tmp_path):
    state = {"w": jnp.arange(2_000_000, dtype=jnp.float32)}
    expected = np.array(state["w"])
    add = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)
    with Checkpointer(tmp_path) as checkpointer:
        target = abstract(state)
        checkpointer.save(1, state, data_index=0)
        for _ in range(5):
            state = add(state)
        restored = checkpointer.restore_latest(target)
    np.testing.assert_array_equal(restored.state["w"], expected)


def test_configuration_is_read_without_the_state(three_steps, tmp_path):
    assert read_config(three_steps) == CONFIG == read_config(three_steps, 2)
    with pytest.raises(InputError, match="no step 7; it holds 1, 2, 3"):
        read_config(three_steps, 7)
    with pytest.raises(InputError, match="holds no checkpoints"):
        read_config(tmp_path / "nowhere")


# --- a target that differs is no damage


def _replace_gate(state, **changes):
    target = abstract(state)
    return target.replace(params=target.params | {"gate": target.params["gate"].update(**changes)})


def _without_gate(state):
    return abstract(state).replace(params={"embed": abstract(state).params["embed"]})


def _with_bias(state):
    target = abstract(state)
    return target.replace(params=target.params | {"bias": target.params["gate"]})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda s: _replace_gate(s, shape=(9,)),
            r"params\.gate is bfloat16\[8\] there, expected bfloat16\[9\]",
        ),
        (
            lambda s: _replace_gate(s, dtype=jnp.float32),
            r"params\.gate is bfloat16\[8\] there, expected float32\[8\]",
        ),
        (_without_gate, r"params\.gate is bfloat16\[8\] there, expected nothing"),
        (_with_bias, r"params\.bias is nothing there, expected bfloat16\[8\]"),
    ],
    ids=["shape", "dtype", "extra", "missing"],
)
def test_differing_leaf_is_named_and_no_step_is_set_aside(run_dir, states, change, message):
    with pytest.raises(InputError, match=message) as error:
        restore_latest(run_dir, change(states[3]))
    assert "\n" not in str(error.value)
    with Checkpointer(run_dir) as checkpointer:
        assert checkpointer.steps() == [1, 2, 3]


def test_a_sharding_that_does_not_divide_is_no_damage(run_dir, states):
    bad = jax.ShapeDtypeStruct((5,), jnp.bool_, sharding=NamedSharding(mesh_of(4, 2), P("fsdp")))
    with Checkpointer(run_dir) as checkpointer:
        with pytest.raises(ValueError, match="divi"):
            checkpointer.restore_latest(abstract(states[3]).replace(mask=bad))
        assert checkpointer.steps() == [1, 2, 3]


@pytest.mark.parametrize("name", ["a/b", "..", "../x", "", "a b", "/etc/passwd"])
def test_leaf_names_that_could_leave_the_directory_are_refused(tmp_path, name):
    with Checkpointer(tmp_path) as checkpointer:
        with pytest.raises(ValueError, match="unique name of letters"):
            checkpointer.save(1, {name: jnp.ones(3)}, data_index=0)
        assert checkpointer.steps() == []


def test_leaves_that_are_no_plain_arrays_or_share_a_name_are_refused(tmp_path):
    with Checkpointer(tmp_path) as checkpointer:
        for state in ({"a": 3}, {"a": jax.random.key(0)}, {"a": jnp.ones(2, jnp.complex64)}):
            with pytest.raises(
                ValueError, match=r"leaf a: .*expected an array of bool, int or float"
            ):
                checkpointer.save(1, state, data_index=0)
        with pytest.raises(ValueError, match=r"a\.b.*unique"):
            checkpointer.save(1, {"a.b": jnp.ones(2), "a": {"b": jnp.ones(2)}}, data_index=0)


# --- damage


def _flip_bytes(path):
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 4] = bytes(b ^ 0xFF for b in content[middle : middle + 4])
    path.write_bytes(content)


def _truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize(
    "damage", [_flip_bytes, _truncate, Path.unlink], ids=["flipped", "truncated", "missing"]
)
def test_any_damaged_file_gives_right_bits_or_the_step_before(
    three_steps, states, tmp_path, damage
):
    """Every file of the newest step in turn: the worst outcome is an older step and a line that
    says so.
    """
    fell_back = 0
    for i, path in enumerate(files_of_step(three_steps, 3)):
        directory = shutil.copytree(three_steps, tmp_path / str(i))
        damage(directory / path)
        restored, said = restore_latest(directory, abstract(states[3]))
        assert_same_bits(restored.state, states[restored.step])
        if restored.step != 3:
            fell_back += 1
            assert restored.step == 2 and len(said) == 1, path
            assert "step 3" in said[0] and "is damaged" in said[0] and "\n" not in said[0]
            assert (directory / "checkpoints" / "damaged-3").is_dir()
    assert fell_back >= 3


def test_bits_that_the_array_store_does_not_guard_are_caught_by_the_digest(tmp_path):
    """Noise does not compress, so the store keeps it verbatim and reads changed bytes back without
    a complaint.
    """
    noise = jax.random.bits(jax.random.key(0), (60_000,), jnp.uint32)
    state = {"quiet": jnp.zeros(4), "w": jax.lax.bitcast_convert_type(noise, jnp.float32)}
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, state, data_index=0)
        checkpointer.save(2, state, data_index=1)
    largest = tmp_path / files_of_step(tmp_path, 2)[0]
    assert largest.stat().st_size > 200_000
    content = bytearray(largest.read_bytes())
    content[120_000] ^= 1
    largest.write_bytes(content)
    restored, said = restore_latest(tmp_path, abstract(state))
    assert restored.step == 1 and re.search(
        r"step 2 .* damaged: w is not what was saved \(digest", said[0]
    )
    with (
        Checkpointer(tmp_path) as checkpointer,
        pytest.raises(InputError, match="no step 2; it holds 1"),
    ):
        checkpointer.restore(2, abstract(state))


def test_half_deleted_step_is_reported_set_aside_and_can_be_saved_again(run_dir, states):
    shutil.rmtree(run_dir / "checkpoints" / "3" / "state")
    restored, said = restore_latest(run_dir, abstract(states[1]))
    assert restored.step == 2 and restored.data_index == 20 and len(said) == 1
    with Checkpointer(run_dir, CONFIG) as checkpointer:
        assert checkpointer.steps() == [1, 2]
        checkpointer.save(3, states[3], data_index=30)
        assert_same_bits(checkpointer.restore_latest(abstract(states[3])).state, states[3])
    shutil.rmtree(run_dir / "checkpoints" / "3" / "state")
    restore_latest(run_dir, abstract(states[1]))
    kept = sorted(p.name for p in (run_dir / "checkpoints").iterdir())
    assert kept == ["1", "2", "damaged-3", "damaged-3-1"] or kept == [
        "2",
        "damaged-3",
        "damaged-3-1",
    ]


def test_all_steps_damaged_is_an_error_each_time_and_nothing_is_renamed(run_dir, states):
    for step in (1, 2, 3):
        shutil.rmtree(run_dir / "checkpoints" / str(step) / "manifest")
    for _ in range(2):  # a second start must not begin from nothing, silently
        with pytest.raises(InputError, match="no intact checkpoint left; damaged steps: 3, 2, 1"):
            restore_latest(run_dir, abstract(states[1]))
    with (
        Checkpointer(run_dir) as checkpointer,
        pytest.raises(InputError, match=r"step 2 .* is damaged"),
    ):
        checkpointer.restore(2, abstract(states[1]))


def test_read_only_changes_nothing_and_needs_no_lock(run_dir, states):
    shutil.rmtree(run_dir / "checkpoints" / "3" / "state")
    with Checkpointer(run_dir) as _:
        restored, said = restore_latest(run_dir, abstract(states[2]), read_only=True)
    assert restored.step == 2 and len(said) == 1 and (run_dir / "checkpoints" / "3").is_dir()
    with (
        Checkpointer(run_dir, read_only=True) as reader,
        pytest.raises(ValueError, match="opened read-only"),
    ):
        reader.save(9, states[2], data_index=0)


def test_array_metadata_that_points_elsewhere_is_refused(run_dir, states):
    """A checkpoint from a stranger: the store's own metadata names a path outside, or is of another
    size.
    """
    path = run_dir / "checkpoints" / "3" / "state" / "_METADATA"
    path.write_text(
        path.read_text().replace('"mask"', '"/etc/passwd"').replace("'mask'", "'/etc/passwd'")
    )
    restored, said = restore_latest(run_dir, abstract(states[2]))
    assert restored.step == 2 and "/etc/passwd" in said[0]


def _signed(body):
    """A manifest as a stranger would write it: the checksum is no secret."""
    return json.dumps(
        {
            "body": body,
            "sha256": hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest(),
        }
    )


def _rename(body):
    body["leaves"]["../../../etc/passwd"] = body["leaves"].pop("mask")


def _enlarge(body):
    body["leaves"]["mask"]["shape"] = [2**60]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_rename, r"mask is nothing there, expected bool\[5\]"),
        (_enlarge, r"mask is bool\[1152921504606846976\] there, expected bool\[5\]"),
    ],
)
def test_hostile_names_and_sizes_in_a_manifest_are_refused_before_arrays_are_read(
    run_dir, states, monkeypatch, change, message
):
    path = run_dir / "checkpoints" / "3" / "manifest" / "metadata"
    body = json.loads(path.read_text())["body"]
    change(body)
    path.write_text(_signed(body))
    monkeypatch.setattr(orbax_store, "read_arrays", lambda *_: pytest.fail("arrays were read"))
    with pytest.raises(InputError, match=message):
        restore_latest(run_dir, abstract(states[3]))


def test_arrays_of_another_size_than_the_manifest_says_are_refused_unread(
    run_dir, tmp_path, states, monkeypatch
):
    """The store holds a mask of 2,000,000 elements where the manifest, and we, speak of 5."""
    large = states[3].replace(mask=jnp.zeros(2_000_000, jnp.bool_))
    with Checkpointer(tmp_path / "large") as checkpointer:
        checkpointer.save(3, large, data_index=0)
    shutil.rmtree(run_dir / "checkpoints" / "3" / "state")
    shutil.copytree(
        tmp_path / "large" / "checkpoints" / "3" / "state", run_dir / "checkpoints" / "3" / "state"
    )
    restored, said = restore_latest(run_dir, abstract(states[2]))
    assert restored.step == 2 and "mask is stored as mask bool[2000000]" in said[0]


def test_links_and_oversized_descriptions_are_refused_unread(run_dir, tmp_path, states):
    elsewhere = tmp_path / "elsewhere"
    shutil.move(run_dir / "checkpoints" / "3" / "state", elsewhere)
    (run_dir / "checkpoints" / "3" / "state").symlink_to(elsewhere)
    with open(run_dir / "checkpoints" / "2" / "manifest" / "metadata", "ab") as f:
        f.truncate(1 << 34)  # sparse: nothing is written
    restored, said = restore_latest(run_dir, abstract(states[1]))
    assert restored.step == 1
    assert "state is a link" in said[0] and "manifest/metadata has 17,179,869,184 bytes" in said[1]


def test_keys_of_another_configuration_are_named(run_dir, states):
    other = {"model": {"width": 32, "norm_eps": 1e-6}, "name": "test"}
    wanted = (
        r"params\.gate is bfloat16\[8\] there, expected bfloat16\[9\]; "
        r"config\.model\.width: 16 there, now 32; give another "
    )
    with Checkpointer(run_dir, other) as checkpointer, pytest.raises(InputError, match=wanted):
        checkpointer.restore_latest(_replace_gate(states[3], shape=(9,)))


# --- the digest


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "int32", "uint8", "bool"])
def test_digest_sees_each_element_and_each_place_in_any_sharding(dtype):
    x = np.asarray(jax.random.bits(jax.random.key(1), (16, 8), jnp.uint32) % 251).astype(
        jnp.dtype(dtype)
    )
    x[0, 0], x[0, 1] = 0, 1
    swapped, changed, rows = x.copy(), x.copy(), x[::-1].copy()
    swapped[0, 0], swapped[0, 1] = x[0, 1], x[0, 0]
    changed[7, 3] = not x[7, 3] if dtype == "bool" else x[7, 3] + 1
    sharded = jax.device_put(x, NamedSharding(mesh_of(4, 2), P("fsdp", "tensor")))
    whole = digests_of(
        {"x": x, "swapped": swapped, "changed": changed, "rows": rows, "flat": x.reshape(-1)}
    )
    assert digests_of({"x": sharded})["x"] == whole["x"] == whole["flat"]
    assert len({whole[n] for n in ("x", "swapped", "changed", "rows")}) == 4


def test_digests_hold_nothing_of_the_size_of_a_state():
    state = {name: jax.ShapeDtypeStruct((512, 512), jnp.float32) for name in ("w", "mu")}
    memory = array_digests.lower(state).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 512 * 512


def test_digest_is_of_bits_and_follows_its_definition():
    """Against the same sums in Python's integers; and -0.0 is not 0.0, one NaN not another."""

    def mix(x):
        x = (x ^ x >> 16) * 0x85EBCA6B % 2**32
        x = (x ^ x >> 13) * 0xC2B2AE35 % 2**32
        return x ^ x >> 16

    words = np.asarray([0x7FC00000, 0x7FC00001, 0x80000000, 0x00000001], np.uint32)
    first = sum(mix(int(w) ^ mix((i + 0x9E3779B9) % 2**32)) for i, w in enumerate(words)) % 2**32
    second = (
        sum(mix((int(w) * 0x85EBCA77 + mix(i ^ 0xC2B2AE3D)) % 2**32) for i, w in enumerate(words))
        % 2**32
    )
    zero = np.zeros(1, np.float32)
    digests = digests_of({"x": words.view(np.float32), "zero": zero, "minus": -zero})
    assert digests["x"] == f"{first:08x}{second:08x}"
    assert digests["zero"] != digests["minus"]


# --- the directory


def test_second_run_on_a_directory_is_refused(tmp_path):
    message = rf"another run is writing to this directory \(process {os.getpid()} on "
    with Checkpointer(tmp_path), pytest.raises(InputError, match=message):
        Checkpointer(tmp_path)
    Checkpointer(tmp_path).close()


def test_unusable_directories_are_named_in_one_line(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(
        InputError, match=r"could not write to the run directory .*: (Not a directory|File exists)$"
    ):
        Checkpointer(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"
    with pytest.raises(InputError, match=r"got az://bucket/run, expected a path"):
        Checkpointer("az://bucket/run")
    with pytest.raises(InputError, match="keep: got 0"):
        Checkpointer(tmp_path, keep=0)

    def refuse(*_, **__):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(
        InputError, match=r"could not write to the run directory .*: Read-only file system$"
    ):
        Checkpointer(tmp_path / "new")


CHILD = """
    import os, resource, signal, sys, threading, time
    import jax, numpy as np
    jax.config.update("jax_platforms", "cpu")
    from gatedjax.training.checkpoint import Checkpointer
    from gatedjax.errors import InputError
    state = {"w": jax.numpy.asarray(np.random.default_rng(0).standard_normal(6_000_000), "float32")}
    checkpointer = Checkpointer(sys.argv[1])
    checkpointer.save(1, state, data_index=1, wait=True)
"""


def run_child(directory, code):
    source = textwrap.dedent(CHILD) + textwrap.dedent(code)
    return subprocess.run(
        [sys.executable, "-c", source, str(directory)], capture_output=True, text=True, timeout=120
    )


def target_of_child():
    return {"w": jax.ShapeDtypeStruct((6_000_000,), jnp.float32)}


def test_kill_in_the_middle_of_a_save_leaves_the_step_before(tmp_path):
    """Step 2 is under way, its temporary directory on disk, when the process is killed with -9."""
    child = run_child(
        tmp_path,
        """
        def kill_when_it_has_begun():
            while not any(f.endswith("-tmp") for f in os.listdir(sys.argv[1] + "/checkpoints")):
                time.sleep(0.0005)
            os.kill(os.getpid(), signal.SIGKILL)
        threading.Thread(target=kill_when_it_has_begun).start()
        checkpointer.save(2, state, data_index=2, wait=True)
        """,
    )
    assert child.returncode == -signal.SIGKILL, child.stderr
    assert any(p.name.endswith("-tmp") for p in (tmp_path / "checkpoints").iterdir())
    with Checkpointer(tmp_path) as checkpointer:  # the dead run's lock is free
        restored = checkpointer.restore_latest(target_of_child())
        assert (restored.step, restored.data_index) == (1, 1)
        checkpointer.save(5, restored.state, data_index=5)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == [
        "1",
        "5",
    ]  # and nothing half-written


def test_full_disk_is_one_line_and_the_step_before_stays(tmp_path):
    """A limit on the size of files stands for the full disk: the write itself fails, in orbax's
    thread.
    """
    child = run_child(
        tmp_path,
        """
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
        for step in (2, 3):
            try:
                checkpointer.save(step, state, data_index=step)
                checkpointer.wait()
            except InputError as e:
                print(e)
        """,
    )
    lines = child.stdout.splitlines()
    assert child.returncode == 0 and len(lines) == 2, child.stderr
    for step, line in zip((2, 3), lines):
        assert line.startswith(f"could not write the checkpoint of step {step} to ")
        assert line.endswith(": File too large")
    assert "Traceback" not in child.stderr and "orbax" not in child.stderr, child.stderr
    restored, said = restore_latest(tmp_path, target_of_child())
    assert restored.step == 1 and said == []


def test_manifest_is_json_and_a_changed_digit_is_damage(run_dir, states):
    path = run_dir / "checkpoints" / "3" / "manifest" / "metadata"
    manifest = json.loads(path.read_text())
    names = set(manifest["body"]["leaves"])
    assert {
        "step",
        "params.embed.table",
        "params.gate",
        "mask",
        "opt_state.1.0.mu.embed.table",
    } <= names
    manifest["body"]["data_index"] += 1
    path.write_text(json.dumps(manifest))
    restored, said = restore_latest(run_dir, abstract(states[2]))
    assert restored.step == 2 and "manifest does not match its checksum" in said[0]
