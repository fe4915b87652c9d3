"""Several processes that train one adapter, one on each device: how they start, what they agree on, who does what.

The configuration says what is learned, devices how fast: each process counts all micro-batches of a run, as one process
would, and computes those that are dealt to it.
"""
