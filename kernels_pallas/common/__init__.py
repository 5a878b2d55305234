"""What the ops share, written once: see the docstring of each module."""
