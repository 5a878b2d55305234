"""Grids of small runs that ask one question: `python -m gatedjax.study NAME`.

See `grid.py`.
"""

from gatedjax.study.grid import Cell, Picture, Study

__all__ = ["Cell", "Picture", "Study"]
