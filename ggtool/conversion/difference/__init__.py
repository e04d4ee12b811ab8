"""What differs between two models: keys, tensors, and how far each tensor's weights are apart."""
