"""What a compiled program's HLO text says: its collectives, its kernels, the layouts of their
operands.
"""

import dataclasses
import math
import re
from collections import Counter

import numpy as np

_BITS = {"pred": 8, "bf16": 16, "f16": 16, "f32": 32, "f64": 64, "c64": 64, "token": 0}
_COLLECTIVES = "all-reduce|all-gather|reduce-scatter|ragged-all-to-all|all-to-all|collective-permute|collective-broadcast"
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%([\w.\-]+) = (.*)$")
_RESULT = re.compile(r"^\s*(?:ROOT )?%([\w.\-]+) = (\([^=]*?\)|\S+) [\w\-]+\(")
_COMPUTATION = re.compile(r"^(?:ENTRY )?%([\w.\-]+) \(.*\{$")
_KERNEL_TARGETS = ("tpu_custom_call", "__gpu$xla.gpu.triton", "mosaic_gpu", "triton_kernel_call")


@dataclasses.dataclass(frozen=True)
class Collective:
    """All collectives of one kind in a run of the program; `bytes` of a device's operand or result,
    the larger.
    """

    kind: str
    count: int
    bytes: int

    @property
    def sent_bytes(self) -> int:
        """What a device sends, on a ring of many: an all-reduce is a reduce-scatter and an
        all-gather.
        """
        return self.bytes * (2 if self.kind == "all-reduce" else 1)


@dataclasses.dataclass(frozen=True)
class KernelCall:
    """A call of a Pallas kernel. `operands`: (type, layout) such as ("f32[8,128]",
    "{1,0:T(8,128)}").
    """

    name: str
    op_name: str
    operands: tuple[tuple[str, str], ...]
    vmem_bytes: int | None


def joined(text: str) -> list[str]:
    """One instruction a line: attributes may hold line ends."""
    lines = []
    for line in text.splitlines():
        starts = _INSTRUCTION.match(line) or not line.strip() or line.strip() == "}" or not lines
        if starts or re.match(r"(ENTRY|%|HloModule|\w+Names|\w+Locations|StackFrames|\d+ )", line):
            lines.append(line)
        else:
            lines[-1] += f" {line}"
    return lines


def collectives(text: str) -> tuple[Collective, ...]:
    """Collectives by kind. Those in a loop's body count once for each of its trips, if the text
    tells how many.

    The TPU compiler writes a reduce-scatter as an all-reduce and a slice in a computation of that
    name.
    """
    lines = joined(text)
    count, total, trips, computation = Counter(), Counter(), _trips(lines), ""
    result = {m[1]: sum(type_bytes(m[2])) for line in lines if (m := _RESULT.match(line))}
    for line in lines:
        if head := _COMPUTATION.match(line):
            computation = head[1]
        match = re.match(
            rf"\s*(?:ROOT )?%[\w.\-]+ = (.*?) ({_COLLECTIVES})(-start)?\(([^)]*)\)", line
        )
        if match is None:
            continue
        kind = "reduce-scatter" if computation.startswith("all-reduce-scatter") else match[2]
        parts = type_bytes(match[1])
        # An asynchronous start returns its operand beside its result.
        received = max(parts) if match[3] and parts else sum(parts)
        sent = sum(result.get(name, 0) for name in re.findall(r"%([\w.\-]+)", match[4]))
        times = trips.get(computation, 1)
        count[kind] += times
        total[kind] += times * max(received, sent)
    return tuple(Collective(kind, count[kind], total[kind]) for kind in sorted(count))


def kernel_calls(text: str) -> tuple[KernelCall, ...]:
    """Every Mosaic or Triton kernel of the program, in the order of the text."""
    lines, types, calls = joined(text), {}, []
    for line in lines:
        if match := re.match(r"\s*(?:ROOT )?%([\w.\-]+) = (\w+\[[^\]]*\])(\{[^}]*\})?", line):
            types[match[1]] = (match[2], match[3] or "")
    for line in lines:
        match = re.match(
            r'\s*(?:ROOT )?%(\S+) = .*? custom-call\((.*?)\), custom_call_target="([^"]+)"(.*)$',
            line,
        )
        if match is None or match[3] not in _KERNEL_TARGETS:
            continue
        operands = re.findall(r"%([\w.\-]+)", re.sub(r"/\*.*?\*/", "", match[2]))
        vmem = re.search(
            r'"used_scoped_memory_configs":\[\{"memory_space":"1","offset":"\d+","size":"(\d+)"',
            match[4],
        )
        op_name = re.search(r'op_name="([^"]*)"', match[4])
        calls.append(
            KernelCall(
                match[1],
                op_name[1] if op_name else "",
                tuple(types.get(o, ("?", "")) for o in operands),
                int(vmem[1]) if vmem else None,
            )
        )
    return tuple(calls)


def type_bytes(text: str) -> list[int]:
    """Bytes of every array type in the text, padding not counted: "(f32[8,128]{1,0}, s32[])" ->
    [4096, 4].
    """
    sizes = []
    for dtype, shape in re.findall(r"\b([a-z]\w*)\[([\d,]*)\]", text):
        bits = _BITS.get(dtype) or int((re.search(r"\d+", dtype) or ["0"])[0])
        sizes.append(math.prod(int(d) for d in shape.split(",") if d) * bits // 8)
    return sizes


def memory_words(array, layout: str) -> np.ndarray:
    """The 32-bit words of an array in an XLA layout such as "{2,1,0:T(8,128)(4,1)}"."""
    a = np.asarray(array)
    a = a.astype({np.dtype(bool): np.int8, np.dtype(np.int64): np.int32}.get(a.dtype, a.dtype))
    match = re.match(r"\{([\d,]*)(?::(.*))?\}", layout or "{}")
    if order := [int(x) for x in match[1].split(",") if x]:
        a = a.transpose(order[::-1])
    a = a.reshape(1) if a.ndim == 0 else a
    for i, tile in enumerate(re.findall(r"\(([\d,]+)\)", re.sub(r"S\(\d+\)", "", match[2] or ""))):
        sizes = [int(x) for x in tile.split(",")]
        if i == 0 and len(sizes) > a.ndim:
            a = a.reshape((1,) * (len(sizes) - a.ndim) + a.shape)
        a = _tiled(a, sizes)
    raw = np.ascontiguousarray(a).tobytes()
    return np.frombuffer(raw + b"\0" * (-len(raw) % 4), np.int32)


def _tiled(a: np.ndarray, tile: list[int]) -> np.ndarray:
    """The last axes padded and cut into tiles, tiles' own axes last."""
    lead, k = a.ndim - len(tile), len(tile)
    a = np.pad(a, [(0, 0)] * lead + [(0, -size % t) for size, t in zip(a.shape[lead:], tile)])
    cut = [n for size, t in zip(a.shape[lead:], tile) for n in (size // t, t)]
    a = a.reshape(*a.shape[:lead], *cut)
    return a.transpose(
        *range(lead), *(lead + 2 * i for i in range(k)), *(lead + 2 * i + 1 for i in range(k))
    )


def _trips(lines: list[str]) -> dict[str, int]:
    """How often each computation runs: a loop's body up to the limit of its counter, times the loop
    around it.
    """
    limit = _counter_limits(lines)
    own, caller, computation = {}, {}, ""
    for line in lines:
        if head := _COMPUTATION.match(line):
            computation = head[1]
        if match := re.search(r" while\(.*condition=%([\w.\-]+), body=%([\w.\-]+)", line):
            known = re.search(r'"known_trip_count":\{"n":"(\d+)"', line)
            own[match[2]] = int(known[1]) if known else limit.get(match[1], 1)
            caller[match[2]] = computation
        else:
            for callee in re.findall(
                r"(?:to_apply|calls|branch_computations|true_computation)=\{?%([\w.\-]+)", line
            ):
                caller.setdefault(callee, computation)
    trips = {}

    def times(name: str) -> int:
        if name not in trips:
            trips[name] = own.get(name, 1) * (times(caller[name]) if name in caller else 1)
        return trips[name]

    return {name: times(name) for name in {*own, *caller}}


def _counter_limits(lines: list[str]) -> dict[str, int]:
    """For loop conditions "counter < constant", as a scan has them (its counter starts at 0): the
    constant.
    """
    limits, constants, computation = {}, {}, ""
    for line in lines:
        if head := _COMPUTATION.match(line):
            computation, constants = head[1], {}
        if match := re.match(r"\s*%([\w.\-]+) = s32\[\]\S* constant\((\d+)\)", line):
            constants[match[1]] = int(match[2])
        if match := re.match(
            r"\s*ROOT %\S+ = pred\S* compare\(%[\w.\-]+, %([\w.\-]+)\), direction=LT", line
        ):
            limits[computation] = constants.get(match[1], 1)
    return limits
