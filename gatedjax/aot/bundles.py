"""Parses the bundle listings that libtpu dumps: the final VLIW program of each kernel and of the
whole executable.

The listing to read is `*-packed-bundles-post-ra.txt`: one line a bundle, one bundle a cycle, empty
(stall) bundles included. The later `final_bundles` leaves the empty ones out, though the hardware
spends them.
"""

import dataclasses
import functools
import re
from pathlib import Path

# All that is read here; the rest is 20 x as much.
DUMP_LABELS = "(packed-bundles-post-ra|pre-delay.*|deduplication-map)"
_LISTING = re.compile(r"^(\d+)-(.*)-(\d+)-packed-bundles-post-ra\.txt$")
_BUNDLE = re.compile(r"^\s*(0x[0-9a-f]+|\d+)\s+[A-Z: >]*\{")
_COMMENT = re.compile(r"/\*(.*?)\*/", re.S)
# Where the predicate is: `(%p1, %s9), ...` in front, `[...] (%p1), ...` behind an address, or
# `... (%p1)` at the end of a scalar load.
_PREDICATE_IN_FRONT = re.compile(r"^\((!?%p\w+)(?:,\s*([^)]+))?\)\s*,?\s*")
_PREDICATE_BEHIND_ADDRESS = re.compile(r"\]\s*\((!?%p\w+)\)\s*,")
_PREDICATE_AT_END = re.compile(r"\s*\((!?%p\w+)\)\s*$")


@dataclasses.dataclass(frozen=True, slots=True)
class Op:
    """One instruction. `predicate` is "%p3" or "!%p3"; `old` the value that a false predicate
    leaves.
    """

    name: str
    dest: str | None
    args: str
    predicate: str | None
    old: str | None
    text: str
    comment: str


@dataclasses.dataclass(frozen=True)
class Listing:
    """A program: bundles of ops; names and capacities of the slots, and for every bundle how many
    it uses, if known.
    """

    name: str
    bundles: list[list[Op]]
    slot_capacity: dict[str, int]
    slots_used: list[list[int]]


def find_listings(folder: Path) -> dict[str, tuple[Path, Path | None]]:
    """By HLO name: the listing, and the file of slot use per bundle if there is one."""
    found = {}
    for path in sorted(folder.glob("*-packed-bundles-post-ra.txt")):
        match = _LISTING.match(path.name)
        if match is None or "schedule-analysis" in path.name:
            continue
        stamp = match[1]
        name = match[2]
        use_suffix = "pre-delay_hlo-static-per-bundle-utilization.txt"
        use = sorted(folder.glob(f"{stamp}-{_escaped(name)}-*-{use_suffix}"))
        found[name] = (path, use[0] if use else None)
    return found


def shared_listings(folder: Path) -> dict[str, list[str]]:
    """HLO names whose code is one and the same: libtpu lists it under one of them only."""
    groups = {}
    for path in folder.glob("*deduplication-map.txt"):
        for group in re.split(r"^key:", path.read_text(), flags=re.M)[1:]:
            lines = [line.strip() for line in group.splitlines()]
            names = [line for line in lines if line and ":" not in line]
            groups |= dict.fromkeys(names, names)
    return groups


def parse_listing(name: str, path: Path, slot_use: Path | None) -> Listing:
    """Reads one listing.

    Raises:
      ValueError: its bundles are not numbered one after the other.
    """
    text = _without_legend(path.read_text())
    text = _COMMENT.sub(_one_line_comment, text)
    bundles = []
    for line in text.splitlines():
        match = _BUNDLE.match(line)
        if match is None:
            continue
        if int(match[1], 0) != len(bundles):
            raise ValueError(f"{path.name}: got bundle {match[1]}, expected bundle {len(bundles)}")
        body = line[match.end() :]
        if "}" in body:
            body = body[: body.rfind("}")]
        ops = [parse_op(part) for part in body.split(";;")]
        bundles.append([_lasting(op) for op in ops if op is not None])
    capacity, used = _read_slots(slot_use)
    return Listing(name, bundles, capacity, used)


def _lasting(op: Op) -> Op:
    """What is kept of an op. Of vectors the replay needs the name only, and they are most of the
    hundreds of megabytes that a whole step is listed in.
    """
    is_vector = op.name.startswith("vst") or (op.dest or "").startswith("%v")
    return _vector_op(op.name) if is_vector else op


@functools.cache
def _vector_op(name: str) -> Op:
    return Op(
        name=name,
        dest=None,
        args="",
        predicate=None,
        old=None,
        text=name,
        comment="",
    )


def _without_legend(text: str) -> str:
    """A listing may open with a legend of its control targets."""
    end = text.find("= control target key end")
    if end < 0:
        return text
    return text[text.index("\n", end) + 1 :]


def parse_op(text: str) -> Op | None:
    """One instruction, such as `%s3 = sadd.s32 (%p1), %s2, 1`; None for an empty or comment-only
    place.
    """
    comment = " ".join(_COMMENT.findall(text))
    rest = _COMMENT.sub("", text).strip()
    dest = re.match(r"^(%[\w.\-]+)\s*=\s*", rest)
    if dest is not None:
        rest = rest[dest.end() :]
    rest = re.sub(r"^\d+\s*=\s*", "", rest)
    name = re.match(r"^[A-Za-z_][\w.\-]*(?:<[^>]*>)?", rest)
    if name is None:
        return None
    rest = rest[name.end() :].strip()
    rest = re.sub(r"^\[thread:\$\d+\]\s*", "", rest)
    args, predicate, old = _predicated(name[0], rest)
    return Op(
        name=name[0],
        dest=dest[1] if dest else None,
        args=args,
        predicate=predicate,
        old=old,
        text=text.strip(),
        comment=comment,
    )


def split_args(text: str) -> list[str]:
    """Splits at the commas outside brackets."""
    parts = []
    depth = 0
    start = 0
    for i, char in enumerate(text):
        if char in "([{":
            depth += 1
        elif char in ")]}":
            depth -= 1
        elif char == "," and depth == 0:
            parts.append(text[start:i].strip())
            start = i + 1
    last = text[start:].strip()
    if last:
        parts.append(last)
    return parts


def _predicated(name: str, rest: str) -> tuple[str, str | None, str | None]:
    """(arguments, predicate, old value): most ops carry `(%p, old),` in front, stores and scalar
    loads behind [].
    """
    match = _PREDICATE_IN_FRONT.match(rest)
    if match is not None:
        return rest[match.end() :], match[1], match[2]
    match = _PREDICATE_BEHIND_ADDRESS.search(rest)
    if match is not None:
        before = rest[: match.start()]
        after = rest[match.end() :]
        return f"{before}],{after}", match[1], None
    if name == "sld":
        match = _PREDICATE_AT_END.search(rest)
        if match is not None:
            return rest[: match.start()], match[1], None
    if name == "sst" or name.startswith("vst"):
        # A store without a predicate has no comma behind its address.
        rest = re.sub(r"\]\s+(%|-?\d)", r"], \1", rest, count=1)
    return rest, None, None


def _one_line_comment(match: re.Match) -> str:
    """A comment may hold line ends and the characters that separate ops and bundles."""
    text = match[0].replace("\n", " ")
    text = text.replace(";;", ";")
    return text.replace("}", ")").replace("{", "(")


def _read_slots(path: Path | None) -> tuple[dict[str, int], list[list[int]]]:
    """Capacity by slot, and the use of each by every bundle. Line 1 names the slots, line 2 has
    their capacities; bundles begin at line 4.
    """
    if path is None:
        return {}, []
    lines = path.read_text().strip().splitlines()
    names = [name.strip() for name in lines[1].split(",")]
    capacities = [int(number) for number in lines[2].split()]
    used = []
    for line in lines[4:]:
        if line:
            used.append([int(number) for number in line.split()])
    return dict(zip(names, capacities)), used


def _escaped(name: str) -> str:
    """For `glob`."""
    return re.sub(r"([*?\[])", r"[\1]", name)
