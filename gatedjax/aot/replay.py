"""Replays a parsed TPU program on the scalar side: how many cycles its schedule takes, what it
moves, where it waits.

Scalar registers, predicates, SMEM, branches (with their delay slots), DMA issue and DMA waits are
executed; vector values are ignored. That gives trip counts, executed bundles, DMA bytes and
matrix-unit work exactly, and the time lost on DMA by a simple model: one first-in first-out HBM
channel of the chip's public bandwidth and a fixed latency.

How far to trust it. The schedule: within about 3 % of measured cycles on v4 and v5e. The time:
within 5 % of published v5e times of seven matmuls (`tests/gatedjax/aot/test_tpu_model.py`); v5p,
v6e and v7x share the mechanism but were never checked against hardware. Not modeled: strided or
narrow DMAs, HBM refresh and bank conflicts, VMEM ports shared with DMA, instruction fetch of huge
bodies, barriers between two cores, the interconnect, clock throttling, and the host's 0.1 ms a
call. Differences below 5 % are noise. A branch or size that depends on data is reported as unknown,
and the branch taken as not taken.

The bundles between two branches are turned into one Python function each, as a program runs
millions of them. The source of these functions is our own: a listing contributes numbers and
register numbers only.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence

from gatedjax.aot.bundles import Listing, Op, split_args
from gatedjax.aot.targets import Tpu

MAX_BLOCKS = 3_000_000
LOCAL_DMA_CYCLES, LOCAL_DMA_BYTES_PER_CYCLE = (
    100,
    512,
)  # between on-chip memories; a guess that no time depended on
# Addresses are plain numbers: symbols and operands are given ranges far above what a program
# computes with.
_ADDRESS_FLOOR, _ALLOCATIONS, _OPERANDS = 1 << 39, 1 << 41, 1 << 50
_ALLOCATION_BITS, _OPERAND_BITS = 24, 40
_HBM_SHIFT = 4  # what a program shifts an HBM operand's address by before a DMA reads it


class _Unknown:
    """A value that depends on vector data; it absorbs every operation."""

    def _absorb(self, *_):
        return self

    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __and__ = __rand__ = __or__ = (
        __ror__
    ) = _absorb
    __xor__ = __rxor__ = __rshift__ = __rrshift__ = __neg__ = __lt__ = __le__ = __gt__ = __ge__ = (
        _absorb
    )


UNKNOWN = _Unknown()


def _signed(x):
    """Wraps to 32 bits; addresses pass."""
    if type(x) is not int or -(2**31) <= x < 2**31 or x >= _ADDRESS_FLOOR:
        return x
    return _wrapped(x)


def _wrapped(x):
    """32 bits of it. Of numbers only: a shift may take one as far as addresses begin."""
    return ((x + 2**31) & 0xFFFFFFFF) - 2**31


def _unsigned(x):
    return x & 0xFFFFFFFF if type(x) is int and -_ADDRESS_FLOOR < x < 0 else x


def _known(fn: Callable) -> Callable:
    """`fn`, or UNKNOWN as soon as an argument is."""
    return lambda *args: UNKNOWN if any(a is UNKNOWN for a in args) else fn(*args)


def _or(a, b):
    return (
        True
        if a is True or b is True
        else UNKNOWN
        if a is UNKNOWN or b is UNKNOWN
        else bool(a or b)
    )


def _and(a, b):
    return (
        False
        if a is False or b is False
        else UNKNOWN
        if a is UNKNOWN or b is UNKNOWN
        else bool(a and b)
    )


def _select(p, a, b):
    return UNKNOWN if p is UNKNOWN else (a if p else b)


def _divrem(a, b):
    return (
        [UNKNOWN, UNKNOWN]
        if a is UNKNOWN or b is UNKNOWN or b == 0
        else list(divmod(_unsigned(a), _unsigned(b)))
    )


# What the generated functions may call.
_NAMES = {
    "UNKNOWN": UNKNOWN,
    "signed": _signed,
    "unsigned": _unsigned,
    "not_": _known(lambda a: not a),
    "or_": _or,
    "and_": _and,
    "xor": _known(lambda a, b: bool(a) != bool(b)),
    "select": _select,
    "eq": _known(lambda a, b: a == b),
    "ne": _known(lambda a, b: a != b),
    "min_": _known(min),
    "max_": _known(max),
    "divrem": _divrem,
    "shr": _known(lambda a, b: a >> b if a >= _ADDRESS_FLOOR else (a & 0xFFFFFFFF) >> b),
    "shl": _known(lambda a, b: a << b if a >= _ADDRESS_FLOOR else _wrapped(a << (b & 63))),
    "carry": _known(lambda a, b: _unsigned(a) + _unsigned(b) > 0xFFFFFFFF),
}
_BINARY = {
    "sadd": "signed({a}+{b})",
    "ssub": "signed({a}-{b})",
    "smul": "signed({a}*{b})",
    "sand": "signed({a}&{b})",
    "sor": "signed({a}|{b})",
    "sxor": "signed({a}^{b})",
    "sshll": "shl({a},{b})",
    "sshrl": "shr({a},{b})",
    "sshra": "({a}>>{b})",
    "smin": "min_({a},{b})",
    "smax": "max_({a},{b})",
}
_COMPARE = {"eq": "eq({a},{b})", "ne": "ne({a},{b})"} | {
    name: f"({{a}}{sign}{{b}})"
    for name, sign in (("lt", "<"), ("le", "<="), ("gt", ">"), ("ge", ">="))
}
_PREDICATE = {
    "por": "or_({0},{1})",
    "pand": "and_({0},{1})",
    "pxor": "xor({0},{1})",
    "pneg": "not_({0})",
}


class Timeline:
    """A core's clock, its DMAs in flight, and the chip's HBM channel, of which it may have a share
    only.
    """

    def __init__(self, chip: Tpu, hbm_fraction: float = 1.0):
        self.chip, self.time, self.stall = chip, 0, 0
        self.hbm_bytes = 0
        self.unknown = collections.Counter()
        self._hbm_free = 0.0
        self._bytes_per_cycle = chip.hbm_bytes_per_second / chip.clock_hz * hbm_fraction
        self._in_flight = collections.defaultdict(list)  # semaphore -> [time done, size units]

    def start(self, kind: str, now: int, size, semaphore, predicate) -> None:
        """Issues a DMA of `size` units."""
        if predicate is False:
            return
        if predicate is UNKNOWN or type(size) is not int:
            self.unknown["DMA"] += 1
            size = size if type(size) is int else 0
        moved = _unsigned(size) * self.chip.dma_granule
        if "hbm" in kind or kind == "general":
            self.hbm_bytes += moved
            self._hbm_free = max(self._hbm_free, now) + moved / self._bytes_per_cycle
            done = self._hbm_free + self.chip.hbm_latency_cycles
        else:
            done = now + LOCAL_DMA_CYCLES + moved / LOCAL_DMA_BYTES_PER_CYCLE
        self._in_flight[semaphore].append([done, _unsigned(size)])

    def wait(self, now: int, semaphore, size, predicate) -> int:
        """The time at which `size` units have arrived at `semaphore`."""
        if predicate is UNKNOWN:
            self.unknown["wait"] += 1
        queue = self._in_flight.get(semaphore)
        if predicate is not True or not queue or type(size) is not int:
            return now
        missing, ready = _unsigned(size), now
        queue.sort()
        for done, units in queue:
            ready, missing = max(ready, done), missing - units
            if missing <= 0:
                break
        ready = math.ceil(ready)
        self.stall += ready - now
        return ready

    def take(self, semaphore, change, predicate) -> None:
        """A waiter lowers the semaphore: what it waited for is no longer in flight."""
        queue = self._in_flight.get(semaphore)
        if predicate is not True or not queue or type(change) is not int:
            return
        taken = max(0, -_signed(change))
        while queue and taken > 0:
            if queue[0][1] > taken:
                queue[0][1] -= taken
                return
            taken -= queue.pop(0)[1]


class Program:
    """A listing made executable, block by block, as they are reached."""

    def __init__(self, listing: Listing, chip: Tpu):
        self.listing, self.chip = listing, chip
        self.unhandled = collections.Counter()
        self._registers: dict[str, int] = {}
        self._allocations: dict[str, int] = {}
        self._blocks: dict[int, Callable] = {}
        ops = (op for bundle in listing.bundles for op in bundle)
        self._merged = {
            arg for op in ops if op.name in ("sphi", "pphi") for arg in split_args(op.args)
        }

    @property
    def split_over_cores(self) -> bool:
        """Whether the program asks on which core it runs."""
        return any("core id" in op.comment for bundle in self.listing.bundles for op in bundle)

    def block(self, start: int) -> Callable:
        """The function of the bundles from `start` up to the next branch and its delay slots."""
        if start not in self._blocks:
            scope = dict(_NAMES)
            exec(
                compile("\n".join(self._source(start)), f"<{self.listing.name}@{start}>", "exec"),
                scope,
            )
            self._blocks[start] = scope["block"]
        return self._blocks[start]

    def in_smem(self, operand: int) -> bool:
        """Whether this operand of the kernel is passed in SMEM."""
        for op in (op for bundle in self.listing.bundles[:64] for op in bundle):
            if op.name.startswith("inlined_call_operand") and f"index: {operand}," in op.text:
                return op.name.endswith(".smem")
        return False

    def _source(self, start: int) -> list[str]:
        """R: registers; A: when each was assigned (for phis); X: the execution; T: the timeline;
        t0: time at start.
        """
        lines, branch, at = ["def block(R, A, T, X):", " t0=T.time"], None, start
        bundles = self.listing.bundles
        while at < len(bundles) and not (branch and at - branch[0] > self.chip.branch_delay):
            phi_reads, reads, phi_writes, writes, late, effects = [], [], [], [], [], []
            for k, op in enumerate(bundles[at]):
                if op.name in ("sphi", "pphi"):
                    read, write = self._phi(op, k)
                    phi_reads, phi_writes = [read, *phi_reads], [*write, *phi_writes]
                elif op.name.startswith("sbr"):
                    branch = (at, int(re.search(r"bundleno\s*=\s*(\d+)", op.args)[1]), op.predicate)
                elif op.name != "vphi":
                    r, w, z, e = self._op(op, at - start, k)
                    reads, writes, late, effects = reads + r, writes + w, late + z, effects + e
            # All reads of a bundle come before its writes, but a phi's result is seen by the
            # others.
            lines += [f" {x}" for x in (*phi_reads, *phi_writes, *reads, *writes, *late, *effects)]
            if branch and branch[0] == at:
                lines.append(f" taken={self._value(branch[2]) if branch[2] else True}")
            at += 1
        lines += [f" T.time=t0+{at - start}", f" X.count({start},{at})"]
        if branch is None:
            return [*lines, f" return {at}"]
        return [
            *lines,
            " if taken is UNKNOWN: X.unknown['branch'] += 1; taken = False",
            f" return {branch[1]} if taken else {at}",
        ]

    def _phi(self, op: Op, k: int) -> tuple[str, list[str]]:
        """A phi takes whichever of its sources was assigned last."""
        sources, dest = (
            tuple(self._register(x) for x in split_args(op.args)),
            self._register(op.dest),
        )
        latest = (
            f"R[max({sources!r},key=A.__getitem__)]" if len(sources) > 1 else f"R[{sources[0]}]"
        )
        return f"h{k}={latest}", [f"R[{dest}]=h{k}", *self._stamp(op.dest)]

    def _op(self, op: Op, offset: int, k: int) -> tuple[list[str], list[str], list[str], list[str]]:
        """Source lines of one op: reads, writes, writes that same-bundle reads may see, effects."""
        predicate = self._value(op.predicate) if op.predicate else "True"
        args = split_args(op.args)
        if op.name in ("dma.done.wait", "dma.done"):
            call = f"T.wait(t0+{offset},{self._value(args[0])},{self._value(args[1])},{predicate})"
            return [], [], [], [f"t0={call}-{offset}"]
        if op.name.startswith("dma."):
            return [], [], [], self._dma(op.name[4:], args, offset, predicate)
        if op.name == "vsyncadd":
            return (
                [],
                [],
                [],
                [f"T.take({self._value(args[0])},{self._value(args[1])},{predicate})"],
            )
        if op.name == "inlined_call":
            return (
                [],
                [],
                [],
                [f"T.time=t0+{offset}", f"X.call({_callee(op)!r},T)", f"t0=T.time-{offset}"],
            )
        if op.name.startswith("inlined_call_operand"):
            return [], [f"R[{self._register(op.dest)}]={self._operand(op)}"], [], []
        if op.name == "sst":
            reads = [f"a{k}={self._address(args[0])}", f"v{k}={self._value(args[1])}"]
            return reads, [], [], [f"X.store(a{k},v{k},{predicate})"]
        if op.dest is None or not (re.match(r"%[sp]", op.dest) or op.name.startswith("sdivrem")):
            return [], [], [], []
        if op.name.startswith("int_to_ptr"):  # takes no time
            value = self._value(re.sub(r"^\[resolvable:\$\w+\]\s*", "", op.args))
            return [], [], [f"R[{self._register(op.dest)}]={value}", *self._stamp(op.dest)], []
        return self._assign(op, self._expression(op, args), predicate, k)

    def _assign(self, op: Op, value: str, predicate: str, k: int):
        write, stamp = f"R[{self._register(op.dest)}]=v{k}", self._stamp(op.dest)
        if op.predicate and op.old is not None:
            value = f"select({predicate},{value},{self._value(op.old)})"
        elif op.predicate:  # where the predicate is false nobody reads the value
            value = f"{value} if ({predicate}) is not False else UNKNOWN"
            stamp = [f"if ({predicate}) is not False: {s}" for s in stamp]
        return [f"v{k}={value}"], [write, *stamp], [], []

    def _expression(self, op: Op, args: list[str]) -> str:
        base, *kinds = op.name.split(".")
        if base in _BINARY and len(args) == 2 and "f32" not in kinds:
            a, b = (self._value(x) for x in args)
            if base in ("smin", "smax") and "u32" in kinds:
                a, b = f"unsigned({a})", f"unsigned({b})"
            return _BINARY[base].format(a=a, b=b)
        if base == "scmp" and kinds[1] in ("s32", "u32"):
            a, b = (
                self._value(x) if kinds[1] == "s32" else f"unsigned({self._value(x)})" for x in args
            )
            return _COMPARE[kinds[0]].format(a=a, b=b)
        if op.name in _PREDICATE:
            return _PREDICATE[op.name].format(*(self._value(x) for x in args))
        if op.name == "sld":
            return (
                "X.core"
                if "core id" in op.comment
                else f"X.memory.get({self._address(args[0])},UNKNOWN)"
            )
        if base == "scalar_lea":
            offset = args[1] if len(args) > 1 else "0"
            offset = offset if offset.startswith("[") else offset.split("[")[0]
            return f"signed({self._value(args[0])}+{self._value(offset)})"
        values = [self._value(x) for x in args]
        simple = {
            "smov": "{0}",
            "pmov": "{0}",
            "sc.u32": "carry({0},{1})",
            "scalar_select": "select({0},{1},{2})",
            "pnand": "not_(and_({0},{1}))",
            "sdivrem.u32": "divrem({0},{1})",
            "sdivrem.s32": "divrem({0},{1})",
            "spop.drf": "X.pop({0})",
            "reloc": "0",
        }
        if op.name in simple:
            return simple[op.name].format(*values)
        if op.name not in ("spop", "scalar_parameter_address") and base != "scmp":
            self.unhandled[op.name] += 1
        return "UNKNOWN"

    def _dma(self, kind: str, args: list[str], offset: int, predicate: str) -> list[str]:
        if kind == "smem_to_host_iova":
            return []
        source, size, dest, semaphore = (self._value(x) for x in args[:4])
        lines = [f"T.start({kind!r},t0+{offset},{size},{semaphore},{predicate})"]
        if kind.endswith("_to_smem") or kind == "general":
            lines.append(f"X.fill_smem({source},{dest},{size})")
        return lines

    def _operand(self, op: Op) -> str:
        index = int(re.search(r"index:\s*(-?\d+)", op.text)[1])
        if index < 0:  # a table of XLA's own, whose values the listing does not give
            return "UNKNOWN"
        if "no memory space" in op.text[:80]:  # a scalar, passed by value
            return f"X.operand_value({index})"
        return str(_OPERANDS + (index << _OPERAND_BITS))

    def _stamp(self, name: str) -> list[str]:
        return [f"A[{self._register(name)}]=X.tick()"] if name in self._merged else []

    def _register(self, name: str) -> int:
        return self._registers.setdefault(name, len(self._registers))

    def _address(self, token: str) -> str:
        """`[smem:[%s1 + $0x2]]`, `[#allocation3 + $0x1]` as an expression."""
        inside = re.sub(r"^\[?(?:smem|sflag|vmem):", "", token.strip()).strip("[] ")
        terms = []
        for part in re.split(r"\s\+\s", inside):
            if part.startswith("#"):
                number = self._allocations.setdefault(part, len(self._allocations))
                terms.append(str(_ALLOCATIONS + (number << _ALLOCATION_BITS)))
            elif part.startswith("%"):
                terms.append(f"R[{self._register(part)}]")
            elif re.fullmatch(r"\$?(0x[0-9a-f]+|-?\d+)", part):
                terms.append(str(int(part.lstrip("$"), 0)))
            else:
                return "UNKNOWN"
        return f"({'+'.join(terms)})"

    def _value(self, token: str) -> str:
        token = token.strip()
        if token.startswith("!"):
            return f"not_({self._value(token[1:])})"
        if token.startswith("%"):
            return f"R[{self._register(token)}]"
        if token.startswith(("[", "#")):
            return self._address(token)
        if re.fullmatch(r"-?\d+|0x[0-9a-f]+", token):
            return str(_signed(int(token, 0)))
        return token.capitalize() if token in ("true", "false") else "UNKNOWN"


class Execution:
    """One run of a program on one core: SMEM, and how often each stretch of bundles was executed.

    Args:
      operands: by index, the 32-bit words of operands that steer control flow (scalar prefetch).
      call: runs a called HLO on the timeline (whole programs).
    """

    def __init__(
        self,
        program: Program,
        core: int = 0,
        operands: Mapping[int, Sequence[int]] | None = None,
        call: Callable[[str, Timeline], None] | None = None,
    ):
        self.program, self.core, self.memory = program, core, {}
        self.unknown = collections.Counter()
        self._operands, self._call = operands or {}, call
        self._runs, self._ticks = collections.Counter(), 0

    def run(self, timeline: Timeline) -> None:
        """Executes the program from its first bundle to its last.

        Raises:
          RuntimeError: it does not end within MAX_BLOCKS blocks, so some value is misread.
        """
        for index, words in self._operands.items():
            if self.program.in_smem(index):
                base = _OPERANDS + (index << _OPERAND_BITS)
                self.memory |= {base + i: int(word) for i, word in enumerate(words)}
        registers, assigned = collections.defaultdict(lambda: UNKNOWN), collections.defaultdict(int)
        at, end = 0, len(self.program.listing.bundles)
        for _ in range(MAX_BLOCKS):
            if at >= end:
                return
            at = self.program.block(at)(registers, assigned, timeline, self)
        raise RuntimeError(f"{self.program.listing.name}: no end after {MAX_BLOCKS} blocks")

    def executions(self) -> list[int]:
        """How often each bundle was executed."""
        change = [0] * (len(self.program.listing.bundles) + 1)
        for (start, end), times in self._runs.items():
            change[start] += times
            change[end] -= times
        total, counts = 0, []
        for step in change[:-1]:
            total += step
            counts.append(total)
        return counts

    # What the generated functions call.

    def tick(self) -> int:
        self._ticks += 1
        return self._ticks

    def count(self, start: int, end: int) -> None:
        self._runs[start, end] += 1

    def store(self, address, value, predicate) -> None:
        if address is not UNKNOWN and predicate is not False:
            self.memory[address] = value if predicate is True else UNKNOWN

    def pop(self, queue):
        return queue.pop(0) if isinstance(queue, list) and queue else UNKNOWN

    def operand_value(self, index: int):
        return int(self._operands[index][0]) if index in self._operands else UNKNOWN

    def fill_smem(self, source, dest, size) -> None:
        """A DMA into SMEM, whose words are known if it copies a known operand from its
        beginning.
        """
        if (
            type(source) is not int
            or type(dest) is not int
            or type(size) is not int
            or source < _OPERANDS
        ):
            return
        if source >= _OPERANDS << _HBM_SHIFT:  # an operand that XLA left in HBM
            source >>= _HBM_SHIFT
        index, offset = divmod(source - _OPERANDS, 1 << _OPERAND_BITS)
        words = self._operands.get(index)
        if words is not None and offset == 0:
            count = min(len(words), _unsigned(size) * self.program.chip.dma_granule // 4)
            self.memory |= {dest + i: int(words[i]) for i in range(count)}

    def call(self, name: str, timeline: Timeline) -> None:
        if self._call is not None:
            self._call(name, timeline)


@dataclasses.dataclass(frozen=True)
class Schedule:
    """What one run of a kernel executed. Shares are of the executed bundles."""

    bundles: int  # executed, empty ones too: the cycles of the schedule
    cycles: int  # with the waits for DMA
    hbm_bytes: int
    matrix_busy: float  # share of the matrix units' cycles
    slots: dict[
        str, float
    ]  # share of each slot's capacity: VALU, VLOAD, VSTORE, EUP, XLU, SALU ...
    spills: int  # vector registers stored to and filled from memory
    empty: float
    unknown: dict[str, int]  # branches, sizes and ops that could not be followed


def summarize(execution: Execution, timeline: Timeline) -> Schedule:
    """The figures of a finished run."""
    program, counts = execution.program, execution.executions()
    listing, chip, total = program.listing, program.chip, max(1, sum(counts))
    busy = sum(
        n * _matrix_cycles(op, chip) for n, ops in zip(counts, listing.bundles) if n for op in ops
    )
    used = dict.fromkeys(listing.slot_capacity, 0)
    if len(listing.slots_used) == len(counts):
        for n, row in zip(counts, listing.slots_used):
            if n:
                for name, slots in zip(used, row):
                    used[name] += n * slots
    return Schedule(
        bundles=sum(counts),
        cycles=timeline.time,
        hbm_bytes=timeline.hbm_bytes,
        matrix_busy=busy / (chip.mxus * total),
        slots={
            name: used[name] / (total * size)
            for name, size in listing.slot_capacity.items()
            if size
        },
        spills=used.get("VSTORE:SPILL", 0) + used.get("VLOAD:FILL", 0),
        empty=sum(n for n, ops in zip(counts, listing.bundles) if not ops) / total,
        unknown=dict(timeline.unknown + execution.unknown + program.unhandled),
    )


def _matrix_cycles(op: Op, chip: Tpu) -> int:
    """Cycles that one matrix op keeps its unit: 8 rows of float32, or 16 packed rows of anything
    smaller.
    """
    if not op.name.startswith("vmatmul"):
        return 0
    packed = re.search(r"\.(bf16|f16|s8|u8|x8)|f8", op.name)
    return chip.cycles_per_8_rows * (2 if packed else 1)


def _callee(op: Op) -> str:
    match = re.search(r"%([\w.\-]+)\s*=", op.comment) or re.search(r"<([\w\-]+)>", op.comment)
    name = match[1] if match else "?"
    return f"<{name}>" if name.startswith("late-") else name
