"""The parts of `evaluate`: multiple-choice questions, scores of rows, and intervals of figures."""
