"""The parts of `chat` and `predict`: a loaded model, a conversation, and where it is held.

`choose_adapter`, which finds the adapter that the options name, is for all verbs that take one.
"""
