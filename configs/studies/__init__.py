"""One file a question: `gatedjax-study NAME`."""
