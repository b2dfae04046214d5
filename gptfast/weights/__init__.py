"""GPT-2's weights, in each form in which they are handed around.

`open.py` recognises the form. `checkpoint`, `openai`, `transformers` and `llmc` turn it into
`Weights`: a configuration, and tensors in GPT's names and layout that are read one at a time.
`pretrained.py` and `convert.py` write, with `nanogpt`, `book` and `llmc`. Nothing here knows the
model: readers check against `config.parameter_shapes`, writers take a configuration and a state
dictionary.
"""
