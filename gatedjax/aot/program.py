"""Turns a parsed TPU program into Python functions that the replay calls.

The bundles between two branches become one function each, as a program runs millions of them. The
source of these functions is our own: a listing contributes numbers and register numbers only.

In that source R holds the registers, A says when each was assigned (for phis), X is the
`replay.Execution`, T the `Timeline`, and t0 the time at the block's first bundle.
"""

import collections
import dataclasses
import re
from collections.abc import Callable, Iterator

from gatedjax.aot.bundles import Listing, Op, split_args
from gatedjax.aot.targets import Tpu
from gatedjax.aot.values import (
    ALLOCATION_BITS,
    ALLOCATIONS,
    NAMES,
    OPERAND_BITS,
    OPERANDS,
    signed,
)

# A function of (registers, when each was assigned, timeline, execution): the next bundle to run.
type Block = Callable[..., int]

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
_COMPARE = {
    "eq": "eq({a},{b})",
    "ne": "ne({a},{b})",
    "lt": "({a}<{b})",
    "le": "({a}<={b})",
    "gt": "({a}>{b})",
    "ge": "({a}>={b})",
}
_SIMPLE = {
    "smov": "{0}",
    "pmov": "{0}",
    "por": "or_({0},{1})",
    "pand": "and_({0},{1})",
    "pnand": "not_(and_({0},{1}))",
    "pxor": "xor({0},{1})",
    "pneg": "not_({0})",
    "sc.u32": "carry({0},{1})",
    "scalar_select": "select({0},{1},{2})",
    "sdivrem.u32": "divrem({0},{1})",
    "sdivrem.s32": "divrem({0},{1})",
    "spop.drf": "X.pop({0})",
    "reloc": "0",
    # A number that a kernel made of vector data. Ours ask by it whether a tile has something out of
    # the ordinary, such as NaN, and 0 says no.
    "spop": "0",
}
# Their results come from vector data or from the runtime: unknown, and nothing to report.
_DATA_OPS = ("scalar_parameter_address", "sadd.f32")


@dataclasses.dataclass
class _BundleSource:
    """Source lines of one bundle, in the order in which they must run.

    All reads of a bundle come before its writes, but a phi's result is seen by the other ops, and
    so is the result of an op that takes no time (a late write).
    """

    phi_reads: list[str] = dataclasses.field(default_factory=list)
    phi_writes: list[str] = dataclasses.field(default_factory=list)
    reads: list[str] = dataclasses.field(default_factory=list)
    writes: list[str] = dataclasses.field(default_factory=list)
    late_writes: list[str] = dataclasses.field(default_factory=list)
    effects: list[str] = dataclasses.field(default_factory=list)

    def lines(self) -> list[str]:
        return [
            *self.phi_reads,
            *self.phi_writes,
            *self.reads,
            *self.writes,
            *self.late_writes,
            *self.effects,
        ]


@dataclasses.dataclass(frozen=True)
class _Branch:
    at: int  # the bundle that holds it
    to: int
    predicate: str | None


class Program:
    """A listing made executable, block by block, as they are reached."""

    def __init__(self, listing: Listing, chip: Tpu):
        self.listing = listing
        self.chip = chip
        self.unhandled = collections.Counter()
        self._registers: dict[str, int] = {}
        self._allocations: dict[str, int] = {}
        self._blocks: dict[int, Block] = {}
        # Registers whose time of assignment matters, because a phi chooses by it.
        self._merged: set[str] = set()
        for op in self._ops():
            if op.name in ("sphi", "pphi"):
                self._merged.update(split_args(op.args))

    def _ops(self) -> Iterator[Op]:
        for bundle in self.listing.bundles:
            yield from bundle

    @property
    def split_over_cores(self) -> bool:
        """Whether the program asks on which core it runs."""
        return any("core id" in op.comment for op in self._ops())

    def block(self, start: int) -> Block:
        """The function of the bundles from `start` up to the next branch and its delay slots."""
        if start not in self._blocks:
            source = "\n".join(self._source(start))
            code = compile(source, f"<{self.listing.name}@{start}>", "exec")
            scope = dict(NAMES)
            exec(code, scope)
            self._blocks[start] = scope["block"]
        return self._blocks[start]

    def in_smem(self, operand: int) -> bool:
        """Whether this operand of the kernel is passed in SMEM."""
        # Operands are declared in a program's first bundles.
        for bundle in self.listing.bundles[:64]:
            for op in bundle:
                is_operand = op.name.startswith("inlined_call_operand")
                if is_operand and f"index: {operand}," in op.text:
                    return op.name.endswith(".smem")
        return False

    def _source(self, start: int) -> list[str]:
        """The source of the block that begins at bundle `start`."""
        lines = ["def block(R, A, T, X):", " t0=T.time"]
        bundles = self.listing.bundles
        branch = None
        at = start
        while at < len(bundles):
            # The bundles in a branch's delay slots still run, then the block ends.
            if branch is not None and at - branch.at > self.chip.branch_delay:
                break
            source, branch_here = self._bundle(at, start)
            lines += [f" {line}" for line in source.lines()]
            if branch_here is not None:
                branch = branch_here
                taken = self._value(branch.predicate) if branch.predicate else True
                lines.append(f" taken={taken}")
            at += 1
        lines += [f" T.time=t0+{at - start}", f" X.count({start},{at})"]
        if branch is None:
            lines.append(f" return {at}")
        else:
            lines += [
                " if taken is UNKNOWN: taken = X.unknown_branch()",
                f" return {branch.to} if taken else {at}",
            ]
        return lines

    def _bundle(self, at: int, start: int) -> tuple[_BundleSource, _Branch | None]:
        """The ops of bundle `at`, in a block that begins at `start`; and its branch."""
        source = _BundleSource()
        branch = None
        for place, op in enumerate(self.listing.bundles[at]):
            if op.name in ("sphi", "pphi"):
                self._phi(op, place, source)
            elif op.name.startswith("sbr"):
                branch = _Branch(at, _branch_target(op), op.predicate)
            elif op.name != "vphi":
                self._op(op, at - start, place, source)
        return source, branch

    def _phi(self, op: Op, place: int, source: _BundleSource) -> None:
        """A phi takes whichever of its sources was assigned last."""
        sources = tuple(self._register(name) for name in split_args(op.args))
        register = self._destination(op)
        if len(sources) > 1:
            latest = f"R[max({sources!r},key=A.__getitem__)]"
        else:
            latest = f"R[{sources[0]}]"
        source.phi_reads.insert(0, f"h{place}={latest}")
        writes = [f"R[{register}]=h{place}", *self._stamp(op)]
        source.phi_writes = writes + source.phi_writes

    def _op(self, op: Op, offset: int, place: int, source: _BundleSource) -> None:
        """Appends the source of one op.

        Args:
          op: neither a phi nor a branch.
          offset: cycles since the start of the block.
          place: of the op in its bundle, which makes its local names unique.
          source: of the bundle.
        """
        predicate = self._value(op.predicate) if op.predicate else "True"
        args = split_args(op.args)
        if op.name in ("dma.done.wait", "dma.done"):
            semaphore = self._value(args[0])
            size = self._value(args[1])
            ready = f"T.wait(t0+{offset},{semaphore},{size},{predicate})"
            source.effects.append(f"t0={ready}-{offset}")
        elif op.name.startswith("dma."):
            kind = op.name.removeprefix("dma.")
            source.effects += self._dma(kind, args, offset, predicate)
        elif op.name == "vsyncadd":
            semaphore = self._value(args[0])
            change = self._value(args[1])
            source.effects.append(f"T.take({semaphore},{change},{predicate})")
        elif op.name == "inlined_call":
            source.effects += [
                f"T.time=t0+{offset}",
                f"X.call({_callee(op)!r},T)",
                f"t0=T.time-{offset}",
            ]
        elif op.name.startswith("inlined_call_operand"):
            register = self._destination(op)
            source.writes.append(f"R[{register}]={self._operand(op)}")
        elif op.name == "sst":
            address = self._address(args[0])
            value = self._value(args[1])
            source.reads += [f"a{place}={address}", f"v{place}={value}"]
            source.effects.append(f"X.store(a{place},v{place},{predicate})")
        elif _writes_a_scalar(op):
            self._assign(op, args, predicate, place, source)

    def _assign(
        self,
        op: Op,
        args: list[str],
        predicate: str,
        place: int,
        source: _BundleSource,
    ) -> None:
        """An op that computes a scalar or a predicate; see `_op` for the arguments."""
        if op.name.startswith("int_to_ptr"):  # takes no time
            value = self._value(re.sub(r"^\[resolvable:\$\w+\]\s*", "", op.args))
            register = self._destination(op)
            source.late_writes += [f"R[{register}]={value}", *self._stamp(op)]
            return
        value = self._expression(op, args)
        register = self._destination(op)
        stamp = self._stamp(op)
        if op.predicate and op.old is not None:
            old = self._value(op.old)
            value = f"select({predicate},{value},{old})"
        elif op.predicate:  # where the predicate is false nobody reads the value
            value = f"{value} if ({predicate}) is not False else UNKNOWN"
            stamp = [f"if ({predicate}) is not False: {line}" for line in stamp]
        source.reads.append(f"v{place}={value}")
        source.writes += [f"R[{register}]=v{place}", *stamp]

    def _expression(self, op: Op, args: list[str]) -> str:
        """What the op computes, as a Python expression."""
        base, *kinds = op.name.split(".")
        if base in _BINARY and len(args) == 2 and "f32" not in kinds:
            return self._binary(base, kinds, args)
        if base == "scmp" and kinds[1] in ("s32", "u32", "f32"):
            return self._comparison(kinds, args)
        if op.name == "sld":
            return self._load(op, args)
        if base == "scalar_lea":
            return self._effective_address(args)
        values = [self._value(arg) for arg in args]
        if op.name in _SIMPLE:
            return _SIMPLE[op.name].format(*values)
        # Any other op is one that was never seen before.
        if op.name not in _DATA_OPS and base != "scmp":
            self.unhandled[op.name] += 1
        return "UNKNOWN"

    def _binary(self, base: str, kinds: list[str], args: list[str]) -> str:
        a, b = (self._value(arg) for arg in args)
        if base in ("smin", "smax") and "u32" in kinds:
            a = f"unsigned({a})"
            b = f"unsigned({b})"
        return _BINARY[base].format(a=a, b=b)

    def _comparison(self, kinds: list[str], args: list[str]) -> str:
        """`kinds`: how it compares, and what: ["lt", "s32", ...]."""
        a, b = (self._value(arg) for arg in args)
        if kinds[1] == "u32":
            a = f"unsigned({a})"
            b = f"unsigned({b})"
        return _COMPARE[kinds[0]].format(a=a, b=b)

    def _load(self, op: Op, args: list[str]) -> str:
        if "core id" in op.comment:
            return "X.core"
        return f"X.memory.get({self._address(args[0])},UNKNOWN)"

    def _effective_address(self, args: list[str]) -> str:
        """`scalar_lea %s1, 16[...]`: a base and an offset, whose brackets only name a memory."""
        offset = args[1] if len(args) > 1 else "0"
        if not offset.startswith("["):
            offset = offset.split("[")[0]
        base = self._value(args[0])
        return f"signed({base}+{self._value(offset)})"

    def _dma(self, kind: str, args: list[str], offset: int, predicate: str) -> list[str]:
        """The start of a DMA, whose arguments are source, size, destination and semaphore. Only
        what arrives in SMEM is copied: nothing else is read by scalar code.
        """
        if kind == "smem_to_host_iova":
            return []
        source, size, dest, semaphore = (self._value(arg) for arg in args[:4])
        now = f"t0+{offset}"
        lines = [f"T.start({kind!r},{now},{size},{semaphore},{predicate})"]
        if kind.endswith("_to_smem") or kind == "general":
            lines.append(f"X.fill_smem({source},{dest},{size})")
        return lines

    def _operand(self, op: Op) -> str:
        match = re.search(r"index:\s*(-?\d+)", op.text)
        assert match is not None, op.text
        index = int(match[1])
        if index < 0:  # a table of XLA's own, whose values the listing does not give
            return "UNKNOWN"
        if "no memory space" in op.text[:80]:  # a scalar, passed by value
            return f"X.operand_value({index})"
        return str(OPERANDS + (index << OPERAND_BITS))

    def _stamp(self, op: Op) -> list[str]:
        """Notes the time of assignment, if a phi will ask for it."""
        if op.dest not in self._merged:
            return []
        return [f"A[{self._destination(op)}]=X.tick()"]

    def _destination(self, op: Op) -> int:
        assert op.dest is not None, op.text
        return self._register(op.dest)

    def _register(self, name: str) -> int:
        return self._registers.setdefault(name, len(self._registers))

    def _address(self, token: str) -> str:
        """`[smem:[%s1 + $0x2]]`, `[#allocation3 + $0x1]` as an expression."""
        inside = re.sub(r"^\[?(?:smem|sflag|vmem):", "", token.strip()).strip("[] ")
        terms = []
        for part in re.split(r"\s\+\s", inside):
            if part.startswith("#"):
                number = self._allocations.setdefault(part, len(self._allocations))
                base = ALLOCATIONS + (number << ALLOCATION_BITS)
                terms.append(str(base))
            elif part.startswith("%"):
                terms.append(f"R[{self._register(part)}]")
            elif re.fullmatch(r"\$?(0x[0-9a-f]+|-?\d+)", part):
                number = int(part.lstrip("$"), 0)
                terms.append(str(number))
            else:
                return "UNKNOWN"
        return f"({'+'.join(terms)})"

    def _value(self, token: str) -> str:
        """A register, an address, a number or a truth value as an expression."""
        token = token.strip()
        if token.startswith("!"):
            return f"not_({self._value(token[1:])})"
        if token.startswith("%"):
            return f"R[{self._register(token)}]"
        if token.startswith(("[", "#")):
            return self._address(token)
        if re.fullmatch(r"-?\d+|0x[0-9a-f]+", token):
            return str(signed(int(token, 0)))
        if token == "0.0":
            # Of floats only the bits are kept: those of no other number are needed.
            return "0"
        if token in ("true", "false"):
            return token.capitalize()
        return "UNKNOWN"


def _branch_target(op: Op) -> int:
    match = re.search(r"bundleno\s*=\s*(\d+)", op.args)
    assert match is not None, op.text
    return int(match[1])


def _writes_a_scalar(op: Op) -> bool:
    """Whether the op assigns a scalar or predicate register, or the queue of a division."""
    if op.dest is None:
        return False
    return op.dest.startswith(("%s", "%p")) or op.name.startswith("sdivrem")


def _callee(op: Op) -> str:
    """The HLO that an `inlined_call` runs, which only its comment names."""
    match = re.search(r"%([\w.\-]+)\s*=", op.comment)
    if match is None:
        match = re.search(r"<([\w\-]+)>", op.comment)
    name = match[1] if match else "?"
    return f"<{name}>" if name.startswith("late-") else name
