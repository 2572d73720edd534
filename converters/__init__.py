"""Command-line converters between Hugging Face folders and Orbax checkpoints."""
