"""The parts of `chat` and `predict`: a loaded model, a conversation, and where it is held."""
