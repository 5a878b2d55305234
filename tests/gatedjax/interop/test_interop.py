"""Checkpoints of other projects, from fixtures: the files, the tables, the shapes of every family.

Numbers of every family are compared with transformers in test_interop_peers.py.
"""

import functools
import json
import math
import struct
from pathlib import Path

import jax
import numpy as np
import pytest

from gatedjax.config import DataConfig, MeshConfig, ModelConfig
from gatedjax.errors import InputError
from gatedjax.interop import checkpoint, incoming, on_mesh, outgoing, safetensors
from gatedjax.interop.families import FAMILIES, family_named, fitting_family
from gatedjax.interop.families.base import differences
from gatedjax.interop.hf_config import HFConfig
from gatedjax.interop.links import bounds
from gatedjax.layers.tree import flatten_dict, unflatten_dict
from gatedjax.model import LanguageModel, head_weights
from gatedjax.model import logits as logits_of
from gatedjax.training import given_weights

FIXTURES = Path(__file__).parent / "fixtures"
WHOLE = FIXTURES / "qwen3_next"
CASES = json.loads((FIXTURES / "families.json").read_text())
DATA = DataConfig(seq_len=64)


def model_of(case: str) -> ModelConfig:
    config = CASES[case]["config"]
    return family_named(config["model_type"], "model_type").to_model(HFConfig(config))


@functools.cache
def parameter_shapes(model: ModelConfig) -> dict[tuple[str, ...], jax.ShapeDtypeStruct]:
    """By tracing the model."""
    make = functools.partial(LanguageModel(model).init, jax.random.key(0))
    shapes = jax.eval_shape(make, np.zeros((1, 2), np.int32))["params"]
    return flatten_dict(jax.tree.map(lambda x: x, jax.tree.map(_unboxed, shapes, is_leaf=_is_box)))


def _is_box(x) -> bool:
    return hasattr(x, "unbox")


def _unboxed(x):
    return x.unbox() if _is_box(x) else x


def links_of(case: str):
    family = family_named(CASES[case]["config"]["model_type"], "model_type")
    shapes = {name: tuple(shape) for name, shape in CASES[case]["tensors"].items()}
    if family.links_as_saved is not None:
        return list(family.links_as_saved(model_of(case), shapes))
    return list(family.links(model_of(case)))


def name_in(link, shapes) -> str:
    (name,) = [name for name in (link.tensor, *link.also) if name in shapes][:1]
    return name


@pytest.mark.parametrize("case", CASES)
def test_every_number_has_one_place(case):
    """On disk and here; every view is one, and writes through."""
    shapes = {name: tuple(shape) for name, shape in CASES[case]["tensors"].items()}
    model = model_of(case)
    on_disk = {name: np.zeros(shape, np.int8) for name, shape in shapes.items()}
    here = {path: np.zeros(x.shape, np.int8) for path, x in parameter_shapes(model).items()}
    for link in links_of(case):
        if link.is_absent:
            here[link.path][link.place] += 1
            continue
        name = name_in(link, shapes)
        assert link.shape == shapes[name], link
        view = link.view(on_disk[name])
        assert np.may_share_memory(view, on_disk[name]), link
        assert view.shape == here[link.path][link.place].shape, link
        view += 1
        here[link.path][link.place] += 1
    for name, counts in (on_disk | here).items():
        assert (counts == 1).all(), name


@pytest.mark.parametrize("case", CASES)
def test_a_config_says_all_of_its_model(case):
    model = model_of(case)
    family = family_named(CASES[case]["config"]["model_type"], "model_type")
    assert differences(family, model) == []
    # The first that fits may be another family with the same formulas.
    assert differences(fitting_family(model), model) == []


OLMO_ROTATES = [
    ({}, 10_000.0),
    ({"rope_parameters": None}, 10_000.0),
    ({"rope_parameters": {"rope_type": "default"}}, 10_000.0),
    ({"rope_parameters": None, "rope_theta": 5e5}, 5e5),
    ({"rope_parameters": {"rope_theta": 5e5}, "rope_theta": None}, 5e5),
    # Released files say this, exported ones the next.
    ({"rope_parameters": None, "rope_theta": None}, None),
    ({"rope_parameters": {"rope_type": "default", "rope_theta": None}}, None),
    ({"rope_parameters": {"rope_theta": None}, "rope_theta": 5e5}, None),
]


@pytest.mark.parametrize("values, base", OLMO_ROTATES)
def test_olmo_hybrid_rotates_unless_the_base_is_null(values, base):
    """As transformers reads it (test_interop_peers.py)."""
    config = CASES["olmo_hybrid"]["config"]
    family = family_named("olmo_hybrid", "model_type")
    without = {name: config[name] for name in config if not name.startswith("rope_")}
    model = family.to_model(HFConfig(without | values))
    attention = model.mixers["attention"]
    assert attention.rope_fraction == (0.0 if base is None else 1.0)
    assert base is None or attention.rope_base == base
    assert differences(family, model) == []


def test_families_have_names_of_their_own():
    assert {CASES[case]["config"]["model_type"] for case in CASES} == set(FAMILIES)


# --- numbers


@functools.cache
def whole_run(count: int = 1):
    """The whole fixture on a mesh of so many devices, which cut the width."""
    described = checkpoint.described(WHOLE)
    mesh = MeshConfig(fsdp=count)
    run = incoming.run_of(described, DATA, "float32", mesh, jax.devices()[:count])
    wanted = given_weights.parameters(run)
    tensors = safetensors.tensors_of_folder(WHOLE)
    return described, run, wanted, checkpoint.found(*described[:2], tensors, wanted)


def test_logits_are_those_of_transformers():
    _, run, wanted, found = whole_run()
    params = unflatten_dict(on_mesh.read_parameters(found.parts, wanted))
    fixture = np.load(WHOLE / "logits.npz")

    @jax.jit
    def logits(params, tokens, segment_ids):
        hidden, _, _ = LanguageModel(run.config.model).apply(
            {"params": params},
            tokens,
            segment_ids=segment_ids,
        )
        return logits_of(hidden, head_weights(params))

    # Two rows in one, as documents: each is as if it were alone.
    tokens = fixture["tokens"].reshape(1, -1)
    segment_ids = np.repeat([1, 2], fixture["tokens"].shape[1])[None]
    ours = np.asarray(logits(params, tokens, segment_ids)).reshape(fixture["logits"].shape)
    error = np.sqrt(np.mean((ours - fixture["logits"]) ** 2))
    assert error < 1e-4 * np.std(fixture["logits"])


def test_a_mesh_reads_what_it_needs():
    """Every device's part is that part of the whole."""
    _, _, _, found = whole_run()
    _, _, wanted, cut = whole_run(2)
    read = []

    class Counting(safetensors.MappedFiles):
        def view(self, tensor):
            read.append(tensor)
            return super().view(tensor)

    files = Counting()
    for path, parameter in wanted.items():
        everything = tuple((0, size) for size in parameter.shape)
        whole = on_mesh.region_of(parameter, found.parts[path], everything, files)
        for index in set(_hashable(parameter)):
            region = bounds([slice(*part) for part in index], parameter.shape)
            part = on_mesh.region_of(parameter, cut.parts[path], region, files)
            np.testing.assert_array_equal(part, whole[tuple(slice(*b) for b in region)])
    # A part that holds no number of a tensor does not look at it.
    experts = wanted["periods", "layer_0", "ffn", "gate"]
    read.clear()
    one = ((0, 1), (1, 2), *((0, size) for size in experts.shape[2:]))
    on_mesh.region_of(experts, cut.parts["periods", "layer_0", "ffn", "gate"], one, files)
    assert len(read) == 1


def _hashable(parameter):
    indices = parameter.sharding.devices_indices_map(parameter.shape).values()
    return [tuple((part.start, part.stop) for part in index) for index in indices]


@pytest.mark.parametrize("dtype", ["F32", "BF16"])
def test_tensors_come_back_to_the_bit(tmp_path, dtype):
    """Off a mesh of two devices too, in several files."""
    described, run, wanted, found = whole_run(2 if dtype == "F32" else 1)
    parameters = on_mesh.read_parameters(found.parts, wanted)
    as_dtype = safetensors.DTYPES[dtype]
    family = described.family
    count = outgoing.write_tensors(
        tmp_path, family, run.config, parameters, as_dtype, {}, shard_bytes=8_000
    )
    before = safetensors.tensors_of_folder(WHOLE)
    after = safetensors.tensors_of_folder(tmp_path)
    assert count == len(before) and after.keys() == before.keys()
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    files = safetensors.MappedFiles()
    for name, tensor in before.items():
        expected = files.view(tensor).astype(as_dtype)
        assert files.view(after[name]).tobytes() == expected.tobytes(), name


def test_config_goes_out_as_it_came_in():
    described, run, _, _ = whole_run()
    before = json.loads((WHOLE / "config.json").read_text())
    after = outgoing.config_json(described.family, run.config, before, safetensors.DTYPES["F32"])
    changed = {name for name in before if before[name] != after.get(name)}
    assert changed == set()
    again = described.family.to_model(HFConfig(after))
    assert again == described.model


# --- bad input


def write(path: Path, header: bytes, numbers: bytes = b"", length: int | None = None) -> Path:
    size = len(header) if length is None else length
    path.write_bytes(struct.pack("<Q", size) + header + numbers)
    return path


def header(**entries) -> bytes:
    return json.dumps(entries).encode()


def entry(shape=(2,), offsets=(0, 8), dtype="F32") -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


@pytest.mark.parametrize(
    "contents, message",
    [
        ((header(a=entry()), bytes(4)), r"expected .*: it is cut off"),
        ((header(a=entry()), bytes(9)), "something stands behind its tensors"),
        ((b"{}", b"", 10 * 2**30), r"got a header of 10,737,418,240 bytes, expected at most"),
        ((b"[]",), "its header is no JSON object"),
        ((b"\xff\xfe",), "its header is no JSON object"),
        ((header(a=entry(shape=(3,))), bytes(8)), r"'a': got 8 bytes for F32\[3\], expected 12"),
        ((header(a=entry(offsets=(8, 0))), bytes(8)), "'a': got .*, expected dtype, shape and"),
        ((header(a=entry(shape=(-1,))), bytes(8)), "'a': got .*, expected dtype, shape and"),
        ((header(a=7), bytes(8)), "'a': got 7, expected dtype, shape and"),
    ],
)
def test_bad_files_are_named(tmp_path, contents, message):
    path = write(tmp_path / "model.safetensors", *contents)
    with pytest.raises(InputError, match=message) as error:
        safetensors.tensors_of_file(path)
    assert str(path) in str(error.value)


def test_a_file_of_a_few_bytes(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"abc")
    with pytest.raises(InputError, match="got 3 bytes, expected a safetensors file"):
        safetensors.tensors_of_folder(tmp_path)


@pytest.mark.parametrize(
    "weight_map, message",
    [
        ({"a": "one.safetensors"}, "does not fit its files: 'b': one.safetensors holds it"),
        (
            {"a": "one.safetensors", "b": "one.safetensors", "c": "one.safetensors"},
            "does not fit its files: 'c': one.safetensors lacks it",
        ),
        ({"a": "two.safetensors"}, "names two.safetensors, which is not there"),
        ({"a": "../one.safetensors"}, "'a': got '../one.safetensors', expected the name"),
        ({"a": 3}, "'a': got 3, expected the name"),
        ({}, "weight_map: got {}, expected tensors and files"),
    ],
)
def test_bad_indices_are_named(tmp_path, weight_map, message):
    two = header(a=entry(), b=entry(offsets=(8, 16)))
    write(tmp_path / "one.safetensors", two, bytes(16))
    index = {"weight_map": weight_map}
    (tmp_path / safetensors.INDEX).write_text(json.dumps(index))
    with pytest.raises(InputError, match=message):
        safetensors.tensors_of_folder(tmp_path)


def changed_config(tmp_path, **changes) -> Path:
    config = json.loads((WHOLE / "config.json").read_text()) | changes
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"model_type": "gpt9"}, "model_type: got 'gpt9', expected one of llama, "),
        ({"model_type": ["llama"]}, r"model_type: got \['llama'\], expected one of llama, "),
        ({"hidden_size": 10**9}, "hidden_size: got 1000000000, expected an integer from 1 to"),
        ({"hidden_size": "16"}, "hidden_size: got '16', expected an integer"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps: got 'small', expected a number"),
        ({"hidden_act": "gelu"}, "hidden_act: got 'gelu', expected 'silu'"),
        ({"layer_types": ["full_attention"] * 3}, "layer_types: got .*, expected 2 of"),
        ({"quantization_config": {"bits": 4}}, "quantization_config: expected none"),
        ({"quantization_config": {"quant_method": "mxfp4"}}, "quantization_config: expected none"),
        (
            {"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}},
            "rope_type: got 'longrope', expected 'default', 'yarn' or 'llama3'",
        ),
        ({"num_key_value_heads": 3}, "makes no model: num_kv_heads: got 3, expected a divisor"),
    ],
)
def test_bad_configs_are_named(tmp_path, changes, message):
    with pytest.raises(InputError, match=message) as error:
        checkpoint.described(changed_config(tmp_path, **changes))
    assert str(tmp_path / "config.json") in str(error.value)


def test_bad_sizes_are_judged_by_shapes(tmp_path):
    """10 TB of parameters: nothing is allocated, no file is looked for."""
    folder = changed_config(tmp_path, hidden_size=2**20, vocab_size=2**22)
    described = checkpoint.described(folder)
    assert math.prod((2**20, 2**22)) * 4 > 10 * 10**12
    with pytest.raises(InputError, match=r"--from: config.model: got parameters .* GiB, expected"):
        incoming.run_of(described, DATA, None, None, jax.devices()[:1])


def test_named_tensors_missing_unknown_misshaped():
    described, _, wanted, _ = whole_run()
    tensors = safetensors.tensors_of_folder(WHOLE)
    name = "model.layers.1.self_attn.q_norm.weight"

    def found(tensors):
        return checkpoint.found(*described[:2], tensors, wanted)

    without = {other: tensor for other, tensor in tensors.items() if other != name}
    with pytest.raises(InputError, match=f"tensors are missing: '{name}'"):
        found(without)
    with pytest.raises(InputError, match=r"tensors that no qwen3_next has: 'model.extra'"):
        found(tensors | {"model.extra": tensors[name]})
    misshaped = tensors[name]._replace(shape=(4,))
    with pytest.raises(InputError, match=rf"'{name}': got F32\[4\], expected \[8\] by config"):
        found(tensors | {name: misshaped})
    for dtype in ("U8", "F8_E4M3"):
        packed = tensors[name]._replace(dtype=dtype)
        with pytest.raises(InputError, match=rf"got {dtype}\[8\], expected one of F32, BF16, F16"):
            found(tensors | {name: packed})
    assert found(tensors | {"mtp.norm.weight": tensors[name]}).left_out == ["mtp.norm.weight"]


def test_bad_exports_name_what_a_family_lacks():
    gated = FAMILIES["qwen3_next"].to_model(HFConfig(CASES["qwen3_next"]["config"]))
    config = whole_run()[1].config
    record = incoming.Record("qwen3", "F32", {})
    with pytest.raises(InputError, match=r"qwen3: got|qwen3 has"):
        outgoing.family_of(config, record, None)
    assert outgoing.family_of(config, record, "qwen3_next").model_type == "qwen3_next"
    assert fitting_family(gated).model_type == "qwen3_next"
    # Our own default has a gate of its own projection, which no family has.
    with pytest.raises(InputError, match=r"its model is of no family; model\.layer 0"):
        fitting_family(ModelConfig(vocab_size=64))
