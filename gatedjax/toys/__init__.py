"""Small examples that are no sequence models, on generated data: `python -m gatedjax.toys`."""
