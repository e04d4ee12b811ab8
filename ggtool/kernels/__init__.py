"""Products of float activations with packed weights; beside each one the plain torch reference it is tested on."""
