"""A model sent to the Hugging Face Hub, as `save_pretrained(push_to_hub=...)` does."""

import os
import re
from collections.abc import Mapping
from os import PathLike
from pathlib import Path

from torch import Tensor

from gptfast.checks import one_line
from gptfast.config import PRESETS, GPTConfig
from gptfast.installed import DISTRIBUTION, has_library
from gptfast.weights import adapter
from gptfast.weights.adapter import AdapterConfig, fingerprint
from gptfast.weights.card import CARD, Facts, facts_of, is_own, model_card
from gptfast.weights.checkpoint import find_checkpoint, is_run
from gptfast.weights.open import open_weights
from gptfast.weights.pretrained import TOKENIZER_FILES

_OF_MODEL = ("config.json", "generation_config.json", "model.safetensors")
FILES = (
    *_OF_MODEL,
    CARD,
    *adapter.FILES,
    *TOKENIZER_FILES,
)
"""What is sent of a directory; nothing else is."""


def check_repository(name: str) -> None:
    """Raise ValueError for a name that no repository can have, or without huggingface_hub."""
    if not isinstance(name, str) or not re.fullmatch(r"[\w.-]+/[\w.-]+", name, re.ASCII):
        raise ValueError(f"{name!r:.100} is no repository of the Hub: name it as USER/NAME")
    if not has_library("huggingface_hub"):
        raise ValueError(
            f"{name} on the Hub needs huggingface_hub: pip install '{DISTRIBUTION}[hub]'"
        )


def check(name: str, config: AdapterConfig | None) -> None:
    """Raise ValueError for a name as `check_repository`, and for an adapter nobody else could use.

    config: that of the adapter; None for a whole model. The Hub is asked whether it has the base.
    Raises OSError if it does not answer.
    """
    check_repository(name)
    if config is None or config.base in PRESETS:
        return
    base, where = config.base, ""
    if base is None or Path(base).is_absolute() or Path(base).exists():
        where = "is on this machine only"
    elif not _is_on_hub(base):
        where = "is no model of the Hub that you can see"
    if where:
        raise ValueError(
            f"the base of the adapter, {base}, {where}: send the whole model "
            f"(merge_adapters, or gptfast convert --merge ADAPTER hf:{name})"
        )


def _is_on_hub(name: str) -> bool:
    """Return whether the Hub has a model. Raises OSError if it does not answer."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError

    try:
        HfApi().model_info(name)
    except GatedRepoError:  # which is there, for who is let in
        return True
    except (HFValidationError, RepositoryNotFoundError):
        return False
    except Exception as error:  # of any transport that huggingface_hub uses
        raise OSError(f"{name} could not be looked up: {_without_token(error)}") from None
    return True


def facts_for(
    run: str | PathLike | None, source: str | None, state: Mapping[str, Tensor]
) -> Facts | None:
    """Return what the card tells of the training of a model with this state dictionary.

    run: a run or a checkpoint, as it is. source: where the weights were loaded from, which counts
    if they are those still. Raises CheckpointError for a run that is none.
    """
    if run is not None:
        return facts_of(find_checkpoint(run))
    if source is None or not is_run(Path(source)):
        return None
    same = fingerprint(open_weights(source).tensors) == fingerprint(state)
    return facts_of(find_checkpoint(source)) if same else None


def card(
    name: str,
    config: GPTConfig,
    state: Mapping[str, Tensor],
    facts: Facts | None,
    of_adapter: AdapterConfig | None,
) -> str:
    """Return the model card of a model or, with its configuration, of an adapter."""
    n = sum(values.numel() for values in state.values())
    base = None if of_adapter is None else of_adapter.base
    return model_card(name, config, n, facts, base=base)


def push(directory: Path, name: str, text: str, *, private: bool = False) -> str:
    """Send a directory's FILES to the repository user/name, in one commit; return its address.

    Of a directory with an adapter, no model is sent. text: the card, written to README.md unless
    one of somebody else is there. The repository is created if it is not there. private: as a
    private one; an existing public one is refused. The token is that of `hf auth login` or
    $HF_TOKEN, and no message shows it. Raises OSError, and ValueError for a refused repository.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    if not (directory / CARD).exists() or is_own((directory / CARD).read_bytes()):
        (directory / CARD).write_text(text, "utf-8")
    files = [directory / file for file in FILES if (directory / file).is_file()]
    if (directory / adapter.CONFIG).is_file():
        files = [file for file in files if file.name not in _OF_MODEL]
    api, is_open = HfApi(), False
    try:
        address = api.create_repo(name, private=private or None, exist_ok=True)
        # One that was there stays as open as it was.
        is_open = private and not api.model_info(name).private
        if not is_open:
            api.create_commit(
                name,
                [CommitOperationAdd(file.name, str(file)) for file in files],
                commit_message="Upload a model of gptfast",
            )
    except Exception as error:  # of any transport that huggingface_hub uses
        raise OSError(f"{name} could not be sent to the Hub: {_without_token(error)}") from None
    if is_open:
        raise ValueError(
            f"{name} is there already, and all can see it: nothing was sent; make it private, name "
            "another, or leave out --private"
        )
    return str(address)


def _without_token(error: Exception) -> str:
    """Return what an error says, without the token that a server's answer may repeat."""
    from huggingface_hub import get_token

    text = one_line(error) or type(error).__name__
    for token in {get_token(), os.environ.get("HF_TOKEN")} - {None, ""}:
        text = text.replace(str(token), "***")
    return text if get_token() else f"{text}; log in (hf auth login), or set HF_TOKEN"
