"""`ggtool serve`: every format of a model behind one HTTP API, with a page to talk to it.

A model runs in a child process (`engine/`); this process speaks HTTP (`api/`) and never loads a weight, so that a
native crash ends the requests of one model and nothing else.
"""
