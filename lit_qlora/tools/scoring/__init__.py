"""The parts of `evaluate`: scores of rows, and intervals of figures."""
