"""FFN weights outside fast memory."""
