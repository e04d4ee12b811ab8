"""Matrix products of float activations with packed weights, each beside the plain torch code that it is tested against."""
