"""What a Hugging Face model is made of, and what is put on it."""
