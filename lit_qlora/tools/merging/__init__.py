"""What `merge` is made of: the arithmetic, the forward pass that checks it, and the comparison."""
