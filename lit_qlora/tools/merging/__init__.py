"""The parts of `merge`: the arithmetic, the forward pass that checks it, and the comparison."""
