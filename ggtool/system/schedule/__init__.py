"""Work spread over machines: what is to be done, on which node, by a scheduler here or on a Ray cluster."""

# The address of a cluster that is started for one run, on this machine.
LOCAL = "local"
