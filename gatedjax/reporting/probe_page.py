"""All probes of a model on one page: what they say in a table, and the pictures."""

import base64
import html
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from gatedjax.errors import InputError
from gatedjax.evaluation.probes import Probes
from gatedjax.reporting.probe_pictures import write_report

PAGE = "probes.html"

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 84em; padding: 0 1em; }
table { border-collapse: collapse; margin: 1em 0; }
td, th { border-bottom: 1px solid #ccc; padding: 0.2em 0.8em; text-align: right; }
th { font-weight: 600; }
.pictures { display: grid; gap: 1em; grid-template-columns: repeat(auto-fit, minmax(30em, 1fr)); }
.pictures img { width: 100%; }
.note { color: #555; }
"""

# Column -> the probe whose values it sums up, and how.
_COLUMNS = {
    "sink, mean over heads": ("first_token_fraction", np.mean),
    "sink, largest head": ("first_token_fraction", np.max),
    "mean gate": ("gate_mean", np.mean),
    "half-life, median": ("half_life", np.median),
    "half-life, longest": ("half_life", np.max),
    "busiest expert / even": ("expert_load", np.max),
    "idlest expert / even": ("expert_load", np.min),
    "largest activation": ("max_activation", np.max),
    "median activation": ("median_activation", np.max),
    "kurtosis": ("kurtosis", np.max),
    "mixer: largest": ("mixer_max_activation", np.max),
    "mixer: kurtosis": ("mixer_kurtosis", np.max),
}


def write_page(
    probes: Probes,
    folder: Path,
    title: str,
    notes: Sequence[str],
) -> list[Path]:
    """Writes what `write_report` does and probes.html, which needs no other file.

    Args:
      probes: of a model.
      folder: where to; it is made.
      title: of the page.
      notes: a line each: what was measured, on which text.

    Returns:
      The paths, the page last.

    Raises:
      InputError: no right to write, or matplotlib is not installed.
    """
    paths = write_report(probes, folder)
    path = folder / PAGE
    try:
        pictures = {path.stem: path.read_bytes() for path in paths if path.suffix == ".png"}
        path.write_text(page(probes, title, notes, pictures), encoding="utf-8")
    except OSError as error:
        raise InputError(f"could not write {path}: {error.strerror}") from error
    return [*paths, path]


def page(
    probes: Probes,
    title: str,
    notes: Sequence[str],
    pictures: Mapping[str, bytes],
) -> str:
    """The page as HTML.

    Args:
      probes: of a model.
      title: of the page.
      notes: a line each.
      pictures: PNGs by name.
    """
    shown_title = html.escape(title)
    lines = "\n".join(f'<p class="note">{html.escape(note)}</p>' for note in notes)
    inside = "\n".join(_picture(name, png) for name, png in pictures.items())
    return f"""<!DOCTYPE html>
<html lang="en">
<head><meta charset="utf-8"><title>{shown_title}</title><style>{_STYLE}</style></head>
<body>
<h1>{shown_title}</h1>
{lines}
{_table(probes)}
<div class="pictures">
{inside}
</div>
</body>
</html>
"""


def summary(probes: Probes) -> tuple[list[str], list[list[str]]]:
    """A row for each layer: the columns that some layer has something for, and the numbers."""
    columns = [name for name, (probe, _) in _COLUMNS.items() if probe in probes]
    layers = sorted({layer for by_layer in probes.values() for layer in by_layer})
    rows = []
    for layer in layers:
        row = [str(layer)]
        for name in columns:
            probe, summed_up = _COLUMNS[name]
            values = probes[probe].get(layer)
            row.append("" if values is None else f"{float(summed_up(values)):.3g}")
        row.append(_channels(probes, layer))
        rows.append(row)
    return ["layer", *columns, "massive channels"], rows


def _channels(probes: Probes, layer: int) -> str:
    """The channels with the largest magnitudes, where these are massive; "" where none is.

    Massive, as arXiv 2402.17762 has it: above 100, and a thousand times the median.
    """
    found = []
    if layer not in probes.get("massive_channels", {}):
        return ""
    least = max(100.0, 1000.0 * float(probes["median_activation"][layer]))
    largest = probes["massive_channels"][layer]
    for value, channel in zip(largest, probes["massive_channel_ids"][layer]):
        if value >= least:
            found.append(f"{int(channel)} ({value:.3g})")
    return ", ".join(found)


def _table(probes: Probes) -> str:
    names, rows = summary(probes)
    head = "".join(f"<th>{html.escape(name)}</th>" for name in names)
    lines = []
    for row in rows:
        cells = "".join(f"<td>{html.escape(cell)}</td>" for cell in row)
        lines.append(f"<tr>{cells}</tr>")
    body = "\n".join(lines)
    return f"<table>\n<tr>{head}</tr>\n{body}\n</table>"


def _picture(name: str, png: bytes) -> str:
    """The picture itself, inside the page."""
    text = base64.b64encode(png).decode("ascii")
    return f'<img alt="{html.escape(name)}" src="data:image/png;base64,{text}">'
