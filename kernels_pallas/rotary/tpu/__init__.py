"""The TPU backend of `rotary`."""
