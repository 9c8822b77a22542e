"""Text or token ids in, packed sequences out: `sources`, then `tokenizer`, then `packing`, then `batches`."""
