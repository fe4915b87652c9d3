"""The figures and sample answers of a run: three files that are the truth, and the views made from them.

``metrics.jsonl``, ``samples.jsonl`` and ``others.jsonl``, figures that a logger was given under another number than
the optimizer step's, are the truth. A resume cuts them back to its checkpoint, always, and writes the views anew. The
model card and its picture are views as of one adapter, TensorBoard's file is one of the whole run.
"""
