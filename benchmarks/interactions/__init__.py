"""The rows of wrapper_matrix.py's table, by what is done with a wrapper; they stand in the order of the imports."""

from interactions import schedules, precision, accelerating, checkpoints, steps, bases, models, trainers  # noqa: F401, I001
from interactions.peers import ROWS

__all__ = ["ROWS"]
