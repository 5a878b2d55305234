"""What a run writes and draws: console, metrics file, TensorBoard, pictures."""
