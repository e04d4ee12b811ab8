"""Choosing codes with a calibration text: weights rounded for what a model does with them, not for themselves."""
