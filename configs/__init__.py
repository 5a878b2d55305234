"""One file an experiment: `--config=NAME`. Installed as `gatedjax.configs`."""
