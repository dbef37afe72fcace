"""Click logs from raw text to batches: schema, synthetic data, preparation, reading.

raw file -> shard -> batch, each step in its own module. A batch leaves this package as plain NumPy
arrays `(label, dense, ids)`; nothing here knows the model.
"""
