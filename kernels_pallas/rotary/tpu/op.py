"""`rotary` on TPU (Pallas, Mosaic): one kernel forward, one backward.

Heads are columns, [rows, H D] with rows for tokens. A grid step takes some rows of all heads. The
rotation by 90 degrees is a product with a matrix of 0, 1 and -1, exact for 16-bit numbers: the
matrix unit has nothing else to do, and the unit that moves numbers along lanes has the sums of the
norm. Both kernels are bound by HBM then.

With n = x r, r = 1 / sqrt(mean(x^2) + eps), and Q the rotation by 90 degrees:

    y  = (n w) cos + ((n w) Q) sin
    dn = dy cos - (dy Q) sin                cos and sin are the same for both channels of a pair
    dw = sum over tokens and heads of dn n
    dx = r (w dn - n mean(w dn n))

Without pairs there is the norm alone: y = n w, dn = dy.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Float

from kernels_pallas.common.cost import moved
from kernels_pallas.common.mesh import like
from kernels_pallas.common.padding import round_up
from kernels_pallas.common.second_order import differentiable_gradient
from kernels_pallas.common.tpu import (
    LANES,
    SUBLANES,
    VMEM_LIMIT,
    Interpret,
    Ref,
    in_hbm,
    interpret_params,
)
from kernels_pallas.rotary import xla
from kernels_pallas.rotary.inputs import (
    RotaryInputs,
    RotaryOptions,
    of_channels,
    quarter_turned,
)

# Cosines and sines, for `jax.checkpoint` policies: all layers have the same ones.
ANGLES_NAME = "rotary_angles"
# Numbers of x in a block: 2 MiB. Larger blocks hide more of the first one's way to VMEM.
BLOCK = 2**20
MOST_ROWS = 1024
# Rows of a block are whole registers of 16-bit numbers.
ROW_MULTIPLE = 16
# Rows that are computed together, of one head after another: enough to hide that every step of a
# head waits for the last one.
GROUP_ROWS = 256
# With fewer, a call costs more than what it saves: a few tokens are rotated in passing.
LEAST_TOKENS = 128


def unsupported(inputs: RotaryInputs) -> str | None:
    """Why this backend cannot take a call, or None when it can."""
    B, T, _, D = inputs.x.shape
    if inputs.x.dtype != jnp.bfloat16:
        return f"takes x in bfloat16, not {inputs.x.dtype}"
    # A head is a whole number of registers wide.
    if D % LANES:
        return f"takes heads of a multiple of {LANES} channels, not {D}"
    if B * T < LEAST_TOKENS:
        return f"takes {LEAST_TOKENS} tokens or more, not {B * T}"
    return None


class _Call(NamedTuple):
    """The static arguments of a call.

    Attributes:
      options: those of the op.
      interpret: what `pallas_call` takes.
    """

    options: RotaryOptions
    interpret: Interpret


class _Inputs(NamedTuple):
    """The arrays of a call. Cosines and sines are made once, for forward and backward.

    Attributes:
      x: queries or keys.
      norm_scale: as of the op.
      cos, sin: float32; constants of the gradient. None without a rotation.
    """

    x: Float[Array, "B T H D"]
    norm_scale: Float[Array, " D"] | None
    cos: Float[Array, "B T D"] | None
    sin: Float[Array, "B T D"] | None


def rotary(
    inputs: RotaryInputs,
    options: RotaryOptions,
    interpret: Interpret,
) -> Float[Array, "B T H D"]:
    """As `api.rotary`, of the rows and heads of one device."""
    call = _Call(options, interpret_params(interpret, inputs.x))
    cos, sin = None, None
    if options.pairs.pairs:
        cos, sin = checkpoint_name(of_channels(inputs, options), ANGLES_NAME)
    return _rotary(call, _Inputs(inputs.x, inputs.norm_scale, cos, sin))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _rotary(call: _Call, inputs: _Inputs) -> Float[Array, "B T H D"]:
    columns = _as_columns(inputs, call.options)
    (y,) = _run(
        call,
        _forward_kernel,
        columns,
        [columns.x],
        [like(columns.x, columns.x.shape, columns.x.dtype)],
        name="rotary_forward",
    )
    return y.reshape(inputs.x.shape)


def _rotary_forward(call: _Call, inputs: _Inputs):
    return _rotary(call, inputs), inputs


def _rotary_backward(call: _Call, inputs: _Inputs, dy: Array) -> tuple[_Inputs]:
    gradients = differentiable_gradient(
        partial(_gradients, call),
        partial(_plain, call),
        inputs,
        inputs,
        dy,
    )
    return (gradients,)


_rotary.defvjp(_rotary_forward, _rotary_backward)


def _plain(call: _Call, inputs: _Inputs) -> Float[Array, "B T H D"]:
    """`_rotary` for second derivatives."""
    pairs = call.options.pairs
    x = xla.normed(inputs.x, inputs.norm_scale, call.options.eps)
    if inputs.cos is None or inputs.sin is None:
        return x
    # The same for both coordinates of a pair, and for all heads.
    left, _ = pairs.coordinates()
    cos, sin = inputs.cos[:, :, None, left], inputs.sin[:, :, None, left]
    return xla.turned(x, cos, sin, pairs.interleaved)


def _gradients(call: _Call, inputs: _Inputs, dy: Array) -> _Inputs:
    """Of x and the scale."""
    columns = _as_columns(inputs, call.options)
    rows, width = columns.x.shape
    D = inputs.x.shape[3]
    outputs = [like(columns.x, columns.x.shape, columns.x.dtype)]
    if inputs.norm_scale is not None:
        # A sum for every block of rows: they may be on different cores.
        num_blocks = pl.cdiv(rows, _block_rows(rows, width))
        outputs.append(like(columns.x, (num_blocks, SUBLANES, D), jnp.float32))
    dx, *dscale = _run(
        call,
        partial(_backward_kernel, rows),
        columns,
        [columns.x, dy.reshape(columns.x.shape)],
        outputs,
        name="rotary_backward",
    )
    scale = inputs.norm_scale
    return _Inputs(
        dx.reshape(inputs.x.shape),
        None if scale is None else dscale[0].sum((0, 1)).astype(scale.dtype),
        *jax.tree.map(jnp.zeros_like, (inputs.cos, inputs.sin)),
    )


class _Columns(NamedTuple):
    """The arrays of a call, as a kernel reads them.

    Attributes:
      x: heads as columns.
      norm_scales: float32, or None: of every channel, and of the other one of its pair.
      cos, sin: float32; or None.
    """

    x: Float[Array, "rows H*D"]
    norm_scales: Float[Array, "2 D"] | None
    cos: Float[Array, "rows D"] | None
    sin: Float[Array, "rows D"] | None


def _as_columns(inputs: _Inputs, options: RotaryOptions) -> _Columns:
    B, T, H, D = inputs.x.shape
    scales = None
    if inputs.norm_scale is not None:
        scale = inputs.norm_scale.astype(jnp.float32)
        scales = jnp.stack([scale, options.pairs.swapped(scale)])
    cos, sin = jax.tree.map(lambda z: z.reshape(B * T, D), (inputs.cos, inputs.sin))
    return _Columns(inputs.x.reshape(B * T, H * D), scales, cos, sin)


def _block_rows(rows: int, width: int) -> int:
    """How many rows a grid step takes."""
    fitting = min(BLOCK // width, MOST_ROWS, round_up(rows, ROW_MULTIPLE))
    # Whole groups, if there is room for one.
    multiple = GROUP_ROWS if fitting >= GROUP_ROWS else ROW_MULTIPLE
    return max(fitting // multiple, 1) * multiple


def _run(
    call: _Call,
    kernel: Callable[..., None],
    columns: _Columns,
    heads: list[Array],
    outputs: list[jax.ShapeDtypeStruct],
    *,
    name: str,
) -> Sequence[Array]:
    """Runs a kernel over blocks of rows.

    Args:
      call: the static arguments.
      kernel: called as kernel(options, tables, heads, outputs), the last two references.
      columns: the arrays of the call.
      heads: those of its inputs that are [rows, H D].
      outputs: as `heads`, or a part for each block, [blocks, 8, D].
      name: of the kernel, in profiles.
    """
    rows, width = heads[0].shape
    block_rows = _block_rows(rows, width)
    quarter_turn = None
    if columns.cos is not None:
        # 0, 1 and -1 are exact.
        quarter_turn = jnp.asarray(call.options.pairs.quarter_turn(), jnp.bfloat16)
    tables = _Tables(quarter_turn, columns.norm_scales, columns.cos, columns.sin)

    def of_rows(x: Array | jax.ShapeDtypeStruct) -> pl.BlockSpec:
        if x.ndim == 3:
            return pl.BlockSpec((1, *x.shape[1:]), lambda i: (i, 0, 0))
        return pl.BlockSpec((block_rows, x.shape[1]), lambda i: (i, 0))

    def of_all(x: Array) -> pl.BlockSpec:
        return pl.BlockSpec(x.shape, lambda i: (0, 0))

    of_each = (of_all, of_all, of_rows, of_rows)
    table_specs = [spec(x) for spec, x in zip(of_each, tables) if x is not None]
    of_tables, tree = jax.tree.flatten(tables)
    arrays = [*of_tables, *heads]

    def body(*refs: Ref) -> None:
        tables: _Tables = jax.tree.unflatten(tree, refs[: len(of_tables)])
        quarter_turn, norm_scales = jax.tree.map(lambda ref: ref[...], tables[:2])
        tables = tables._replace(quarter_turn=quarter_turn, norm_scales=norm_scales)
        kernel(call.options, tables, refs[len(of_tables) : len(arrays)], refs[len(arrays) :])

    D = call.options.pairs.channels
    return pl.pallas_call(
        body,
        grid=(pl.cdiv(rows, block_rows),),
        in_specs=[*table_specs, *map(of_rows, heads)],
        out_specs=list(map(of_rows, outputs)),
        out_shape=outputs,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel",),
            vmem_limit_bytes=VMEM_LIMIT,
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * rows * width * (1 if quarter_turn is None else D),
            transcendentals=rows * width // D,
            bytes_accessed=moved([*arrays, *outputs]),
        ),
        interpret=call.interpret,
        name=name,
    )(*[in_hbm(x, call.interpret) for x in arrays])


# --- the kernels


class _Tables(NamedTuple):
    """What is the same for all heads; None for what a call does not have.

    Attributes:
      quarter_turn: bfloat16 [D, D].
      norm_scales: as in `_Columns`.
      cos, sin: float32 [rows, D]; references inside of a kernel.
    """

    quarter_turn: Array | None
    norm_scales: Float[Array, "2 D"] | None
    cos: Ref | None
    sin: Ref | None

    def angles(self, group: Any) -> tuple[Array | float, Array | float]:
        """Cosines and sines of some rows; of no angle without a rotation."""
        if self.cos is None or self.sin is None:
            return 1.0, 0.0
        return self.cos[group, :], self.sin[group, :]


def _inverse_root(x: Float[Array, "rows D"], eps: float) -> Float[Array, "rows 1"]:
    """r of the module's docstring."""
    return lax.rsqrt(jnp.mean(x * x, axis=1, keepdims=True) + eps)


def _heads(x: Ref, D: int) -> list[slice]:
    """The columns of every head."""
    return [slice(start, start + D) for start in range(0, x.shape[1], D)]


def _by_groups(block_rows: int, body: Callable[[Any, Any], Any], start: Any = None) -> Any:
    """`carry = body(rows, carry)` for every group of rows of a block."""
    group = min(GROUP_ROWS, block_rows)

    def step(i: Array, carry: Any) -> Any:
        return body(pl.ds(pl.multiple_of(i * group, group), group), carry)

    return lax.fori_loop(0, block_rows // group, step, start)


def _forward_kernel(
    options: RotaryOptions,
    tables: _Tables,
    inputs: Sequence[Ref],
    outputs: Sequence[Ref],
) -> None:
    """y of a block of rows."""
    (x_ref,) = inputs
    (y_ref,) = outputs

    def add_group(group: Any, carry: None) -> None:
        cos, sin = tables.angles(group)
        if tables.norm_scales is not None:
            # (n w) Q = (n Q) w', with w' the scale of the other channel of a pair.
            cos, sin = cos * tables.norm_scales[0:1], sin * tables.norm_scales[1:2]
        for head in _heads(x_ref, options.pairs.channels):
            x = x_ref[group, head]
            wide = x.astype(jnp.float32)
            y = wide * cos
            if tables.quarter_turn is not None:
                y = y + quarter_turned(x, tables.quarter_turn) * sin
            if tables.norm_scales is not None:
                y = y * _inverse_root(wide, options.eps)
            y_ref[group, head] = y.astype(y_ref.dtype)

    _by_groups(x_ref.shape[0], add_group)


def _backward_kernel(
    rows: int,
    options: RotaryOptions,
    tables: _Tables,
    inputs: Sequence[Ref],
    outputs: Sequence[Ref],
) -> None:
    """dx of a block of rows, and its part of the scale's gradient. `rows`: how many there are."""
    x_ref, dy_ref = inputs
    dx_ref, *dscale_ref = outputs
    D = options.pairs.channels
    block_rows = x_ref.shape[0]
    first_row = pl.program_id(0) * block_rows

    def add_group(group: Any, dscale: Array | None) -> Array | None:
        cos, sin = tables.angles(group)
        for head in _heads(x_ref, D):
            dy = dy_ref[group, head]
            dn = dy.astype(jnp.float32)
            if tables.quarter_turn is not None:
                dn = dn * cos - quarter_turned(dy, tables.quarter_turn) * sin
            if tables.norm_scales is None:
                dx_ref[group, head] = dn.astype(dx_ref.dtype)
                continue
            x = x_ref[group, head].astype(jnp.float32)
            r = _inverse_root(x, options.eps)
            n = x * r
            added = dn * n
            if rows % block_rows:
                # Behind the last row of all is what happens to be there.
                row = first_row + group.start + lax.broadcasted_iota(jnp.int32, added.shape, 0)
                added = jnp.where(row < rows, added, 0.0)
            dscale = dscale + added.reshape(-1, SUBLANES, D).sum(0)
            # Of w n.
            dn = dn * tables.norm_scales[0:1]
            dx = r * (dn - n * jnp.mean(dn * n, axis=1, keepdims=True))
            dx_ref[group, head] = dx.astype(dx_ref.dtype)
        return dscale

    start = jnp.zeros((SUBLANES, D), jnp.float32) if dscale_ref else None
    dscale = _by_groups(block_rows, add_group, start)
    if dscale_ref:
        dscale_ref[0][0] = dscale
