"""How logits become weights: softmax, sigmoid, softpick and their relatives."""
