"""What `evaluate` is made of: what a model makes of rows, and how sure a figure is."""
