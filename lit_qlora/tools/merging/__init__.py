"""The parts of `merge`: the folder, the arithmetic, the forward pass that checks it, and the comparison."""
