"""The index of papers: what of the literature is here, where it lives, what to type.

    gatedjax-papers list [--status='in part'] [--family=router]
    gatedjax-papers search normalizer entropy
    gatedjax-papers show scalable-softmax

The same as docs/papers.md. `python -m gatedjax.papers` is the same command.
"""

import argparse
import signal
import sys
from typing import NoReturn

from gatedjax.errors import InputError
from gatedjax.papers import PREAMBLE, STATUSES, Paper, find, search, selected

EXIT_BAD_INPUT = 2
EXIT_NOTHING_FOUND = 1


class _Parser(argparse.ArgumentParser):
    """Errors in one line, as those of all commands."""

    def error(self, message: str) -> NoReturn:
        raise InputError(message)


def run() -> None:
    """The command, with its exit code."""
    # A reader that closes its end, such as head, ends the command without a traceback.
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    sys.exit(main(sys.argv[1:]))


def main(arguments: list[str]) -> int:
    """Arguments -> lines on stdout; the exit code."""
    try:
        args = _parser().parse_args(arguments)
        if args.action == "show":
            print(details(find(" ".join(args.title))))
            return 0
        if args.action == "list":
            found = selected(args.status, args.family)
        else:
            found = search(args.words)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    for paper in found:
        print(line(paper))
    return 0 if found else EXIT_NOTHING_FOUND


def line(paper: Paper) -> str:
    """A row in one line."""
    return f"{paper.status:8} {paper.family:18} {paper.title}"


def details(paper: Paper) -> str:
    """A whole row, a line or a block for each of its fields."""
    source = f"arXiv {paper.arxiv}, {paper.year}" if paper.arxiv else "no arXiv number known"
    lines = [f"{paper.title} ({source})", "", paper.about, ""]
    fields = {
        "family": paper.family,
        "status": paper.status,
        "missing": paper.missing,
        "where": paper.where,
        "test": paper.test,
        "differs": paper.differs,
    }
    lines += [f"{name:8} {value}" for name, value in fields.items() if value]
    if paper.command:
        lines += ["", paper.command]
    if paper.code:
        lines += ["", PREAMBLE.rstrip(), "", paper.code]
    return "\n".join(lines)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="gatedjax-papers",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    actions = parser.add_subparsers(dest="action", required=True, metavar="list|search|show")
    listing = actions.add_parser("list", help="all papers, or those of a status or a family")
    listing.add_argument("--status", help=", ".join(STATUSES))
    listing.add_argument("--family", help="router, normalizer ...")
    searching = actions.add_parser("search", help="the papers that hold every word")
    searching.add_argument("words", nargs="+")
    showing = actions.add_parser("show", help="one paper: where it lives, what to type")
    showing.add_argument("title", nargs="+", help="its title, the first words, or arXiv number")
    return parser


if __name__ == "__main__":
    run()
