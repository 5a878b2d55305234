"""From a configuration to a train step: losses, optimizer, checkpoints, FLOPs."""
