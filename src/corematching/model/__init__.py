"""The parts of a Hugging Face model, and patches on them."""
