"""Prompts continued by a decoder."""
