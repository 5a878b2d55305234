"""Claims of papers about attention and gates, each at a size at which it can be checked.

A module has the formulas of its paper and an experiment: a frozen dataclass that is called with a
seed and returns named numbers. `configs/studies/` makes grids of them, run by
`python -m gatedjax.study NAME`.
"""
