"""A server: the scheduler of an engine with many clients, and OpenAI's protocol in front of it."""
