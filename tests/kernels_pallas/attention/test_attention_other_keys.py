"""attention to keys of another length, under a block mask, with its log-sum-exp; parts merged."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import FLOAT32, assert_close, cast
from helpers import slow

from kernels_pallas.attention.documents import comparable_ids
from kernels_pallas.attention.inputs import MASK_BLOCK
from kernels_pallas.attention.tpu import block_lists
from kernels_pallas.attention.tpu import op as tpu_op
from kernels_pallas.attention.tpu.plan import Plan, Schedule
from kernels_pallas.attention.tpu.tuning import across_sequences
from kernels_pallas.ops import attention, attention_sharded, merge_attention

Q, K5, K7 = (jnp.zeros((2, n, h, 8)) for n, h in ((5, 4), (5, 2), (7, 2)))
# (y, lse) and their gradients must be right to a few bits in float64.
FLOAT64 = 1e-12


def draw(T, S, B=2, H=4, Hk=2, K=5, V=3, **options):
    """(float arrays by name, static options, which pairs are seen [B, H, T, S])."""
    rng = np.random.default_rng(T)
    arrays = {
        "q": rng.normal(size=(B, T, H, K)),
        "k": rng.normal(size=(B, S, Hk, K)),
        "v": rng.normal(size=(B, S, Hk, V)),
    }
    if options.pop("gate", False):
        arrays["gate_logits"] = rng.normal(size=(B, T, H, V))
    if options.pop("sinks", False):
        arrays["sink_logits"] = rng.normal(size=H)
    if options.pop("slopes", False):
        arrays["alibi_slopes"] = 0.1 * rng.normal(size=H)
    i, j = np.arange(T)[:, None], np.arange(S)
    seen = np.ones((B, H, T, S), bool)
    if options.setdefault("causal", False):
        seen &= j <= i
    if "window" in options:
        seen &= abs(i - j) < options["window"]
    if options.pop("segments", False):
        ids = rng.integers(0, 3, (B, T)), rng.integers(1, 4, (B, S))
        seen &= (ids[0][:, :, None] == ids[1][:, None])[:, None]
        options["segment_ids"] = ids
    if options.pop("mask", False):
        mask = rng.random((B, H, -(-T // MASK_BLOCK), -(-S // MASK_BLOCK))) < 0.5
        mask[..., -1] = False
        options["block_mask"] = mask
        pairs = mask.repeat(MASK_BLOCK, 2).repeat(MASK_BLOCK, 3)
        seen &= pairs[:, :, :T, :S]
    return arrays, options, seen


def formula(arrays, seen, logits_soft_cap=None):
    """(y, lse) as they are defined, with every weight in memory; lse is 0 where nothing is seen."""
    q, k, v = (arrays[name] for name in "qkv")
    group = q.shape[2] // k.shape[2]
    k, v = (jnp.repeat(x, group, 2) for x in (k, v))
    s = jnp.einsum("bthk,bshk->bhts", q, k) * q.shape[-1] ** -0.5
    if logits_soft_cap:
        s = logits_soft_cap * jnp.tanh(s / logits_soft_cap)
    if "alibi_slopes" in arrays:
        distance = abs(np.arange(s.shape[2])[:, None] - np.arange(s.shape[3]))
        s = s - arrays["alibi_slopes"][:, None, None] * distance
    p = jnp.where(seen, jnp.exp(jnp.where(seen, s, 0)), 0)
    total = jnp.sum(p, -1)
    if "sink_logits" in arrays:
        total = total + jnp.exp(arrays["sink_logits"])[:, None]
    safe = jnp.where(total == 0, 1, total)
    y = jnp.einsum("bhts,bshv->bthv", p / safe[..., None], v)
    if "gate_logits" in arrays:
        y = y * jax.nn.sigmoid(arrays["gate_logits"])
    return y, jnp.log(safe)


def op(arrays, implementation="xla", **options):
    """(y, lse) of the op; lse is 0 where nothing is seen."""
    options["interpret"] = implementation == "tpu"
    others = {name: x for name, x in arrays.items() if name not in "qkv"}
    y, lse = attention(
        *(arrays[name] for name in "qkv"),
        **others,
        **options,
        return_lse=True,
        implementation=implementation,
    )
    return y, jnp.where(lse == -jnp.inf, 0, lse)


def everything(f, *args, **options):
    """The function arrays -> {"y": y, "lse": lse, "q": dq, ...}, for one cotangent of each."""
    rng = np.random.default_rng(1)

    def loss(arrays):
        y, lse = f(arrays, *args, **options)
        weighted = jnp.sum(y * rng.normal(size=y.shape)) + jnp.sum(lse * rng.normal(size=lse.shape))
        return weighted, {"y": y, "lse": lse}

    def found(arrays):
        (_, results), gradients = jax.value_and_grad(loss, has_aux=True)(arrays)
        return {**results, **gradients}

    return jax.jit(found)


CASES = {
    "everything, more keys": dict(
        T=33, S=130, gate=True, sinks=True, slopes=True, segments=True, mask=True, window=99
    ),
    "fewer keys": dict(T=131, S=70, B=1, mask=True, logits_soft_cap=2.0),
    "causal, grouped, blocks": dict(T=200, S=200, B=1, mask=True, causal=True, gate=True),
    "one query": dict(T=1, S=65, mask=True, sinks=True),
}


@pytest.mark.parametrize("name", [n if i == 0 else slow(n) for i, n in enumerate(CASES)])
@pytest.mark.parametrize("implementation", [slow("reference"), "xla"])
def test_formula(implementation, name):
    """Values and gradients; and the same bits where keys that the block mask hides are NaN."""
    with jax.enable_x64(True):
        arrays, options, seen = draw(**CASES[name])
        cap = options.get("logits_soft_cap")
        want = everything(formula, seen, logits_soft_cap=cap)(arrays)
        run = everything(op, implementation, **options)
        got = run(arrays)
        assert_close(got, want, FLOAT64)
        hidden = arrays["k"].shape[1] // MASK_BLOCK * MASK_BLOCK
        assert not seen[..., hidden:].any()
        broken = {name: np.array(x) for name, x in arrays.items()}
        for name in "kv":
            broken[name][:, hidden:] = np.nan
        jax.tree.map(np.testing.assert_array_equal, run(broken), got)


TPU_CASES = {
    "everything, more keys": dict(
        T=130, S=300, B=1, H=2, Hk=1, gate=True, sinks=True, slopes=True, segments=True, window=99
    ),
    "fewer keys": dict(T=300, S=70, B=1, H=2, Hk=1, logits_soft_cap=2.0),
    "some see nothing": dict(T=260, S=5, B=1, H=1, Hk=1, window=7),
    "causal": dict(T=130, S=130, B=1, H=2, Hk=1, causal=True, gate=True),
}


@pytest.mark.parametrize("name", [n if i == 2 else slow(n) for i, n in enumerate(TPU_CASES)])
def test_formula_on_tpu(name, monkeypatch):
    """Tiles of 128 x 128, two spans of keys backward."""
    schedule = Schedule(128, 128, span=256)

    def schedules(T, K, V, window, num_keys):
        fitted = schedule.fitted(T), schedule.fitted(num_keys or T)
        return {way: across_sequences(way, *fitted) for way in ("forward", "backward")}

    monkeypatch.setattr(tpu_op, "schedules", schedules)
    arrays, options, seen = draw(**TPU_CASES[name])
    with jax.enable_x64(True):
        cap = options.get("logits_soft_cap")
        want = everything(formula, seen, logits_soft_cap=cap)(arrays)
    got = everything(op, "tpu", **options)(cast(arrays, jnp.float32))
    assert_close(got, want, FLOAT32)


TPU_MASK_CASES = {
    "everything, more keys": dict(
        T=130, S=330, B=1, H=2, Hk=1, gate=True, sinks=True, window=250, logits_soft_cap=2.0
    ),
    "causal, two programs": dict(T=600, S=600, B=1, H=2, Hk=1, causal=True),
    "fewer keys": dict(T=70, S=130, B=1, H=1, Hk=1),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", TPU_MASK_CASES)
def test_block_mask_on_tpu(name, monkeypatch):
    """Values and gradients; and the same numbers where what is off is NaN. In small pieces: the
    interpreter's program grows with them.
    """
    monkeypatch.setattr(block_lists, "CHUNK", 2)
    monkeypatch.setattr(block_lists, "GROUP", 2)
    arrays, options, seen = draw(**TPU_MASK_CASES[name], mask=True)
    with jax.enable_x64(True):
        cap = options.get("logits_soft_cap")
        want = everything(formula, seen, logits_soft_cap=cap)(arrays)
    run = everything(op, "tpu", **options)
    arrays = cast(arrays, jnp.float32)
    got = run(arrays)
    assert_close(got, want, FLOAT32)
    hidden = arrays["k"].shape[1] // MASK_BLOCK * MASK_BLOCK
    broken = {**arrays, **{name: arrays[name].at[:, hidden:].set(jnp.nan) for name in "kv"}}
    assert_close(run(broken), want, FLOAT32)


def test_lists_of_blocks():
    """How many are on, and which, in order; causality and a window take theirs out."""
    mask = np.zeros((1, 1, 4, 4), bool)
    mask[0, 0] = [[0, 1, 0, 0], [1, 1, 0, 1], [1, 0, 1, 0], [1, 1, 1, 1]]
    schedule = Schedule(256, 64)
    fields = dict.fromkeys(Plan._fields) | dict(T=250, forward=schedule)
    for options, wanted in {
        (False, None): [[1], [0, 1, 3], [0, 2], [0, 1, 2, 3]],
        (True, None): [[], [0, 1], [0, 2], [0, 1, 2, 3]],
        (True, 60): [[], [0, 1], [2], [2, 3]],
    }.items():
        causal, window = options
        plan = Plan(**fields | dict(causal=causal, window=window))
        counts, blocks = block_lists.lists_of(plan, jnp.asarray(mask))
        rows = np.asarray(blocks)[: 4 * block_lists.CHUNK].reshape(4, -1)
        found = [row[:count].tolist() for row, count in zip(rows, counts)]
        assert found == wanted, options


TPU_UNSUPPORTED = {
    "takes a block_mask with softmax, not Sigmoid": dict(normalizer="sigmoid"),
    "takes no segment_ids with a block_mask": dict(segment_ids=np.zeros((2, 5), int)),
    "takes no alibi_slopes with a block_mask": dict(alibi_slopes=jnp.zeros(4)),
}


@pytest.mark.parametrize("message", TPU_UNSUPPORTED)
def test_refused_with_a_block_mask_on_tpu(message):
    options = {"block_mask": np.ones((2, 4, 1, 1), bool)} | TPU_UNSUPPORTED[message]
    with pytest.raises(NotImplementedError, match=f"implementation='tpu' {message}"):
        attention(Q, K5, K5, **options, implementation="tpu", interpret=True)


def test_more_keys_than_fit_are_refused_on_tpu():
    shapes = [jax.ShapeDtypeStruct((1, n, 1, 128), jnp.bfloat16) for n in (64, 16385)]
    mask = jax.ShapeDtypeStruct((1, 1, 1, 257), jnp.bool_)

    def call(q, k, mask):
        options = dict(implementation="tpu", interpret=True)
        return attention(q, k, k, causal=False, block_mask=mask, **options)

    message = "takes a block_mask over up to 16384 keys of 128 and 128 channels, not 16385"
    with pytest.raises(NotImplementedError, match=message):
        jax.eval_shape(call, *shapes, mask)


def test_merge_of_parts_is_the_whole():
    """Values and gradients; one part sees nothing in some rows, one nothing at all."""
    T, S = 5, 12
    arrays, _, _ = draw(T, S, B=1, gate=True, sinks=True)
    ids = np.array([[0, 0, 1, 1, 2]]), np.array([[0] * 4 + [1] * 4 + [9] * 4])

    def whole(a):
        return op(a, "reference", causal=False, segment_ids=ids)

    def merged(a, cuts=(0, 4, 8, S)):
        parts = []
        for first, end in itertools.pairwise(cuts):
            y, lse = attention(
                a["q"],
                a["k"][:, first:end],
                a["v"][:, first:end],
                gate_logits=a["gate_logits"],
                sink_logits=None if first else a["sink_logits"],
                causal=False,
                segment_ids=(ids[0], ids[1][:, first:end]),
                return_lse=True,
                implementation="reference",
            )
            parts.append((y, lse))
        y, lse = merge_attention(parts)
        return y, jnp.where(lse == -jnp.inf, 0, lse)

    with jax.enable_x64(True):
        assert_close(everything(merged)(arrays), everything(whole)(arrays), FLOAT64)


def test_merge_of_nothing():
    y, lse = merge_attention([(jnp.zeros((1, 2, 3, 4)), jnp.full((1, 3, 2), -jnp.inf))] * 2)
    assert not np.asarray(y).any() and (np.asarray(lse) == -np.inf).all()
    with pytest.raises(ValueError, match="merge_attention: parts: got none, expected"):
        merge_attention([])
    with pytest.raises(
        ValueError, match=r"part 1: got y \(1, 2, 3, 5\) .* expected y \(1, 2, 3, 4"
    ):
        merge_attention([(y, lse), (jnp.zeros((1, 2, 3, 5)), lse)])


def largest_array(jaxpr):
    """Elements of the largest array that a program makes, in its loops too."""
    most = 0
    for equation in jaxpr.eqns:
        inner = [getattr(x, "jaxpr", x) for x in jax.tree.leaves(equation.params)]
        sizes = [largest_array(x) for x in inner if hasattr(x, "eqns")]
        most = max(most, *sizes, *(x.aval.size for x in equation.outvars), 0)
    return most


def test_memory_is_linear():
    T, S = 2048, 4096
    mask = jnp.ones((1, 1, T // 64, S // 64), bool)

    def loss(implementation, q, k):
        options = {"implementation": implementation, "return_lse": True, "block_mask": mask}
        y, lse = attention(q, k, k, causal=False, **options)
        return jnp.sum(y) + jnp.sum(lse)

    def largest(implementation):
        shapes = [jax.ShapeDtypeStruct((1, n, 1, 8), jnp.float32) for n in (T, S)]
        gradient = jax.grad(functools.partial(loss, implementation), (0, 1))
        return largest_array(jax.make_jaxpr(gradient)(*shapes).jaxpr)

    assert largest("xla") <= 16 * S
    assert largest("reference") >= T * S


@pytest.mark.slow
def test_second_derivatives():
    with jax.enable_x64(True):
        arrays, options, seen = draw(T=5, S=70, B=1, H=2, Hk=1, mask=True, gate=True)

        def twice(f, *args, **options):
            def norm(a):
                found = everything(f, *args, **options)(a)
                return sum(jnp.sum(found[name] ** 2) for name in arrays)

            return jax.grad(norm)(arrays)

        assert_close(twice(op, **options), twice(formula, seen), FLOAT64)


# --- arguments


def test_ids_of_two_sequences():
    """Equal where they were, whatever their width; ids need not be in order."""
    pairs = {
        np.uint8: (255, 255, 0),
        np.int32: (-1, -1, 2**31 - 1),
        np.uint32: (2**32 - 1, 2**32 - 1, 2**31),
        np.int64: (1, 1, 1 + 2**32),
    }
    for dtype, (query, same, other) in pairs.items():
        ids = np.array([[query]], dtype), np.array([[other, same]], dtype)
        of_queries, of_keys = comparable_ids(*ids)
        np.testing.assert_array_equal(of_queries == of_keys, [[False, True]], str(dtype))
    signs = np.array([[2**32 - 1]], np.uint32), np.array([[-1, 5]], np.int32)
    of_queries, of_keys = comparable_ids(*signs)
    assert not np.asarray(of_queries == of_keys).any()


IDS5, IDS7 = np.zeros((2, 5), int), np.zeros((2, 7), int)
REFUSED = {
    r"k: got shape \(2, 7, 2, 8\), expected 5 tokens": dict(),
    "segment_ids: got one array for 5 queries and 7 keys": dict(causal=False, segment_ids=IDS5),
    r"segment_ids of keys: got shape \(2, 5\)": dict(causal=False, segment_ids=(IDS5, IDS5)),
    "segment_ids: got 3 of them": dict(causal=False, segment_ids=(IDS5, IDS7, IDS7)),
    "segment_ids of keys: got dtype bool": dict(causal=False, segment_ids=(IDS5, IDS7 > 0)),
    "segment_ids: got a pair with causal=True": dict(
        k=K5, v=K5, causal=True, segment_ids=(IDS5, IDS5)
    ),
    r"block_mask: got shape \(2, 4, 1, 2\), expected \(2, 4, 1, 1\)": dict(
        causal=False, block_mask=np.ones((2, 4, 1, 2), bool)
    ),
    "block_mask: got dtype int": dict(causal=False, block_mask=np.ones((2, 4, 1, 1), int)),
    "return_lse: got 1, expected True or False": dict(causal=False, return_lse=1),
    "return_lse: got True with normalizer=Entmax": dict(
        causal=False, return_lse=True, normalizer="entmax"
    ),
}


@pytest.mark.parametrize("message", REFUSED)
def test_refused(message):
    options = {"k": K7, "v": K7} | REFUSED[message]
    with pytest.raises(ValueError, match=f"attention: {message}"):
        attention(Q, **options)


def test_refused_by_the_sharded_form():
    with pytest.raises(ValueError, match=r"attention: k: got shape \(2, 7, 2, 8\), expected 5"):
        attention_sharded(Q, K7, K7, axis_name="x", causal=False)


UNSUPPORTED = {
    "takes as many keys as queries, not 7 and 5": dict(k=K7, v=K7),
    "takes no segment_ids of keys": dict(segment_ids=(IDS5, IDS5)),
    "takes no block_mask": dict(block_mask=np.ones((2, 4, 1, 1), bool)),
    "returns no log-sum-exp": dict(return_lse=True),
}


@pytest.mark.parametrize("message", UNSUPPORTED)
@pytest.mark.parametrize("implementation", ["gpu", "cudnn", "mosaic_gpu"])
def test_refused_by_kernels(implementation, message):
    options = {"k": K5, "v": K5, "causal": False} | UNSUPPORTED[message]
    expected = f"attention: implementation='{implementation}' {message}"
    with pytest.raises(NotImplementedError, match=expected):
        attention(Q, **options, implementation=implementation)
