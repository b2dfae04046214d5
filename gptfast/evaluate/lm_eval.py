"""gptfast's models under EleutherAI's lm-evaluation-harness (pip install lm_eval)."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from gptfast.engine.choice import decoder_for
from gptfast.evaluate.loss import Example, example, padded, window_length
from gptfast.generation.continuation import checked_stream_job, stream_pieces, text_options
from gptfast.generation.model_decoder import target_losses
from gptfast.generation.sequences import evaluating
from gptfast.model import GPT
from gptfast.tokenizer.bpe import END_OF_TEXT, Tokenizer, encode_opening
from gptfast.tokenizer.compare import fits
from gptfast.tokenizer.vocabulary import get_tokenizer

MAX_NEW_TOKENS = 256
"""New tokens per request that does not say how many."""

_TAKEN = {"until", "do_sample", "max_gen_toks", "temperature", "top_p", "top_k", "min_p"}
_TAKEN |= {"repetition_penalty", "use_cache"}
_OFF = {"num_beams": 1, "length_penalty": 1.0, "early_stopping": False, "typical_p": 1.0}
_OFF |= {"num_return_sequences": 1, "no_repeat_ngram_size": 0}
"""Options of transformers by the value with which they do nothing."""

_Request = tuple[Any, list[int], list[int]]


@register_model("gptfast")
class GPTFastLM(TemplateLM):
    """A GPT as the harness sees it.

    pretrained: a GPT, or what `GPT.from_pretrained` takes. tokenizer: a Tokenizer or its name; None
    takes that of the files, else GPT-2's. max_length: tokens per window, block_size if None.
    Raises ValueError for a max_length outside [1, block_size].
    """

    def __init__(
        self,
        pretrained: GPT | str,
        tokenizer: Tokenizer | str | None = None,
        batch_size: int | str = 8,
        device: str | None = None,
        max_length: int | None = None,
        **_: Any,
    ) -> None:
        super().__init__()
        model = GPT.from_pretrained(pretrained) if isinstance(pretrained, str) else pretrained
        self.model = model.to(device or model.device)
        if tokenizer is None or isinstance(tokenizer, str):
            tokenizer = get_tokenizer(tokenizer or model.tokenizer_name or "gpt2")
        if fits(tokenizer, model.vocabulary, model.tokenizer_name) is False:
            raise ValueError(
                f"tokenizer {tokenizer.name} has another vocabulary than the one that the model "
                "was trained with; leave it out"
            )
        self.tokens: Tokenizer = tokenizer
        self.batch_size = 8 if str(batch_size).startswith("auto") else int(batch_size)
        given = None if max_length is None else int(max_length)
        self.max_length = window_length(given, model.config.block_size)
        self._draws = 0

    @property
    def eot_token_id(self) -> int:
        return self.tokens.eot

    @property
    def tokenizer_name(self) -> str:
        return self.tokens.name

    def tok_encode(self, string: str, **_: Any) -> list[int]:
        # The harness's own models also read the name of end-of-text as the token.
        special = getattr(self.tokens, "special_tokens", {END_OF_TEXT: 0})
        return encode_opening(self.tokens, string, set(special))

    def _loglikelihood_tokens(
        self, requests: Sequence[_Request], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        """Return each continuation's log-likelihood, and whether greedy decoding gives it.

        requests: (key, context ids, continuation ids). Texts too long lose their beginning.
        """
        # Sorted by length, so that there is little padding.
        order = sorted(range(len(requests)), key=lambda i: -sum(map(len, requests[i][1:])))
        results: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
        bar = tqdm(total=len(requests), disable=disable_tqdm, desc="loglikelihood")
        with torch.inference_mode(), evaluating(self.model):
            for at in range(0, len(order), self.batch_size):
                batch = order[at : at + self.batch_size]
                x, y = padded([self._example(*requests[i][1:]) for i in batch])
                x, y = x.to(self.model.device), y.to(self.model.device)
                hidden = self.model.hidden(x)  # (B, T, C)
                losses = target_losses(self.model, hidden, y).sum(1).tolist()
                for k, i in enumerate(batch):
                    asked = y[k] != -100
                    likeliest = self.model.head(hidden[k, asked]).argmax(-1)
                    results[i] = (-losses[k], torch.equal(likeliest, y[k, asked]))
                    if requests[i][0] is not None:
                        self.cache_hook.add_partial("loglikelihood", requests[i][0], results[i])
                bar.update(len(batch))
        bar.close()
        return results

    def _example(self, context: list[int], continuation: list[int]) -> Example:
        if not 1 <= len(continuation) <= self.max_length:
            raise ValueError(
                f"a continuation has {len(continuation)} tokens; 1 to {self.max_length} can be "
                "scored"
            )
        # A context is empty if it was white space, which the harness moves to the continuation.
        whole = ((context or [self.prefix_token_id]) + continuation)[-(self.max_length + 1) :]
        return example(torch.tensor(whole, dtype=torch.int64), len(continuation))

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Return the log-likelihoods of whole texts, by windows that predict each token once."""
        windows: list[_Request] = []
        counts = []
        for request in requests:
            rolling = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            before = len(windows)
            windows += [(None, *make_disjoint_window(pair)) for pair in rolling]
            counts.append(len(windows) - before)
        scores = iter(self._loglikelihood_tokens(windows, disable_tqdm))
        return [sum(next(scores)[0] for _ in range(n)) for n in counts]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Return continuations up to a stop string: greedy, or sampled with a seed for each.

        A context that leaves too little room for its continuation loses its beginning.
        """
        texts = []
        decoder = decoder_for(self.model, MAX_NEW_TOKENS)  # packed once, not for each request
        for request in tqdm(requests, disable=disable_tqdm, desc="generate_until"):
            context, given = request.args
            options = normalize_gen_kwargs(dict(given), default_max_gen_toks=MAX_NEW_TOKENS)
            n = options["max_gen_toks"]
            ids = self.tok_encode(context) or [self.prefix_token_id]
            if n < self.max_length:
                ids = ids[-(self.max_length - n) :]
            self._draws += 1
            drawn = _drawing_options(options, self._draws)
            job = checked_stream_job(
                decoder, ids, n, text_options(self.tokens, drawn, decoder.eos_ids)
            )
            text = "".join(stream_pieces(decoder, job))
            texts.append(text)
            self.cache_hook.add_partial("generate_until", request.args, text)
        return texts


def _drawing_options(options: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """Return the harness's options as `generate` takes them.

    Raises ValueError for one that `generate_until` would have to ignore.
    """
    for name, value in options.items():
        if name not in _TAKEN and value is not None and value != _OFF.get(name, ...):
            raise ValueError(
                f"generate_until does not know {name}={value!r}; leave it out of the task's "
                "generation_kwargs (--gen_kwargs)"
            )
    stop, sampled = [s for s in options["until"] if s], options["do_sample"]
    names = ("top_p", "top_k", "min_p") if sampled else ()
    return {
        **{name: options.get(name) for name in names},
        "repetition_penalty": options.get("repetition_penalty") or 1.0,
        "temperature": float(options.get("temperature", 1.0)) if sampled else 0.0,
        "seed": seed if sampled else 0,
        "stop": stop or None,
    }
