"""The TPU backend of `causal_conv`."""
