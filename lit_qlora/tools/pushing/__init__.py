"""The parts of `push`: the hub's side."""
