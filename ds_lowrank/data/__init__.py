"""Data for both programs: batches that do not depend on the number of ranks.

Pre-training: ``sources`` finds text or token ids, ``tokenizer`` and ``packing`` make sequences, ``batches`` shares them
out. Fine-tuning: ``rows`` reads labelled rows, ``example_tokenizer`` and ``examples`` make padded batches.
"""
