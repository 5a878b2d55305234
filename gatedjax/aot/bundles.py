"""Parses the bundle listings that libtpu dumps: the final VLIW program of each kernel and of the
whole executable.

The listing to read is `*-packed-bundles-post-ra.txt`: one line a bundle, one bundle a cycle, empty
(stall) bundles included. The later `final_bundles` leaves the empty ones out, though the hardware
spends them.
"""

import dataclasses
import re
from pathlib import Path

# all that is read here; the rest is 20 x as much
DUMP_LABELS = "(packed-bundles-post-ra|pre-delay.*|deduplication-map)"
_LISTING = re.compile(r"^(\d+)-(.*)-(\d+)-packed-bundles-post-ra\.txt$")
_BUNDLE = re.compile(r"^\s*(0x[0-9a-f]+|\d+)\s+[A-Z: >]*\{")


@dataclasses.dataclass(frozen=True)
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
        if match and "schedule-analysis" not in path.name:
            stamp, name = match[1], match[2]
            use = sorted(
                folder.glob(
                    f"{stamp}-{_escaped(name)}-*-pre-delay_hlo-static-per-bundle-utilization.txt"
                )
            )
            found[name] = (path, use[0] if use else None)
    return found


def shared_listings(folder: Path) -> dict[str, list[str]]:
    """HLO names whose code is one and the same: libtpu lists it under one of them only."""
    groups = {}
    for path in folder.glob("*deduplication-map.txt"):
        for group in re.split(r"^key:", path.read_text(), flags=re.M)[1:]:
            names = [
                line.strip() for line in group.splitlines() if line.strip() and ":" not in line
            ]
            groups |= dict.fromkeys(names, names)
    return groups


def parse_listing(name: str, path: Path, slot_use: Path | None) -> Listing:
    """Reads one listing."""
    text = path.read_text()
    legend = text.find("= control target key end")
    if legend >= 0:
        text = text[text.index("\n", legend) + 1 :]
    text = re.sub(r"/\*.*?\*/", _one_line_comment, text, flags=re.S)
    bundles = []
    for line in text.splitlines():
        match = _BUNDLE.match(line)
        if match is None:
            continue
        if int(match[1], 0) != len(bundles):
            raise ValueError(f"{path.name}: bundle {match[1]} came, expected bundle {len(bundles)}")
        body = line[match.end() :]
        body = body[: body.rfind("}")] if "}" in body else body
        bundles.append([op for part in body.split(";;") if (op := parse_op(part)) is not None])
    return Listing(name, bundles, *_read_slots(slot_use))


def parse_op(text: str) -> Op | None:
    """One instruction, such as `%s3 = sadd.s32 (%p1), %s2, 1`; None for an empty or comment-only
    place.
    """
    comment = " ".join(re.findall(r"/\*(.*?)\*/", text, re.S))
    rest = re.sub(r"/\*.*?\*/", "", text, flags=re.S).strip()
    dest = re.match(r"^(%[\w.\-]+)\s*=\s*", rest)
    rest = rest[dest.end() :] if dest else rest
    rest = re.sub(r"^\d+\s*=\s*", "", rest)
    name = re.match(r"^[A-Za-z_][\w.\-]*(?:<[^>]*>)?", rest)
    if name is None:
        return None
    args, predicate, old = _predicated(
        name[0], re.sub(r"^\[thread:\$\d+\]\s*", "", rest[name.end() :].strip())
    )
    return Op(name[0], dest[1] if dest else None, args, predicate, old, text.strip(), comment)


def split_args(text: str) -> list[str]:
    """Splits at the commas that stand outside brackets."""
    parts, depth, start = [], 0, 0
    for i, char in enumerate(text):
        depth += (char in "([{") - (char in ")]}")
        if char == "," and depth == 0:
            parts.append(text[start:i].strip())
            start = i + 1
    return [*parts, text[start:].strip()] if text[start:].strip() else parts


def _predicated(name: str, rest: str) -> tuple[str, str | None, str | None]:
    """(arguments, predicate, old value): most ops carry `(%p, old),` in front, stores and scalar
    loads behind [].
    """
    if match := re.match(r"^\((!?%p\w+)(?:,\s*([^)]+))?\)\s*,?\s*", rest):
        return rest[match.end() :], match[1], match[2]
    if match := re.search(r"\]\s*\((!?%p\w+)\)\s*,", rest):
        return f"{rest[: match.start()]}],{rest[match.end() :]}", match[1], None
    if name == "sld" and (match := re.search(r"\s*\((!?%p\w+)\)\s*$", rest)):
        return rest[: match.start()], match[1], None
    if name == "sst" or name.startswith("vst"):
        rest = re.sub(r"\]\s+(%|-?\d)", r"], \1", rest, count=1)
    return rest, None, None


def _one_line_comment(match: re.Match) -> str:
    """A comment may hold line ends and the characters that separate ops and bundles."""
    return match[0].replace("\n", " ").replace(";;", ";").replace("}", ")").replace("{", "(")


def _read_slots(path: Path | None) -> tuple[dict[str, int], list[list[int]]]:
    if path is None:
        return {}, []
    lines = path.read_text().strip().splitlines()
    names = [x.strip() for x in lines[1].split(",")]
    return dict(zip(names, map(int, lines[2].split()))), [
        [int(x) for x in line.split()] for line in lines[4:] if line
    ]


def _escaped(name: str) -> str:
    return re.sub(r"([*?\[])", r"[\1]", name)
