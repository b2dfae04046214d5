"""GPT-2's weights in the forms they are handed around in, one file per format."""
