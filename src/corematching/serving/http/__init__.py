"""The engine behind OpenAI's chat interface."""
