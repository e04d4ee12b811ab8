"""Texts are drawn from the model's distribution, with random numbers that no format changes."""

import numpy as np
from table_backend import TableBackend

from ggtool.metrics.continuation import Draw, continue_tokens
