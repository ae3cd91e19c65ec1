"""Arrays of examples: sources that configs name, packing, tokenizers."""
