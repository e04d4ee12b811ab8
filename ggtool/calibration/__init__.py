"""Calibration: whatever looks at a model's activations or predictions to decide how its weights are quantized.

Importance matrices, GPTQ, AWQ, sensitivity, and the mix of types for a size.
"""
