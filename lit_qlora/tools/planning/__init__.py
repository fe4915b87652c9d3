"""The parts of `plan`: the rows as far as they are known here, and the words."""
