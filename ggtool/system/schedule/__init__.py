"""Work spread over machines: what is to be done, on which node, by a scheduler here or on a Ray cluster."""
