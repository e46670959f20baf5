"""The base model, its tokenizer and chat template."""
