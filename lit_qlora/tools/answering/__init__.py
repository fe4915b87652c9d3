"""What `chat` and `predict` answer with: a loaded model, a conversation, and where it is held."""
