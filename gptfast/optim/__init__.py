"""The optimizer."""

from gptfast.optim.adamw import AdamW as AdamW
