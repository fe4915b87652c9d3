"""The parts of `doctor`: findings about this machine."""
