"""GPT-2's weights in the forms they are handed around in.

`load.py` tells the form; one file per form (`openai`, `transformers`, `nanogpt`, `llmc`, `book`)
makes `Weights` of it, tensors in GPT's names and layout that are read one by one; `convert.py`
writes.
"""
