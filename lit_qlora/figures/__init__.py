"""The figures and sample answers of a run: two files that are the truth, and the views made from them.

``metrics.jsonl`` and ``samples.jsonl`` are the truth. A resume cuts them back to its checkpoint, always, and writes
the views anew. The model card and its picture are views as of one adapter, TensorBoard's file is one of the whole run.
"""
