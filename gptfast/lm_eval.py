"""gptfast's models under EleutherAI's lm-evaluation-harness (pip install 'gptfast[lm-eval]')."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from gptfast.evaluate import Row, padded, target_losses
from gptfast.generate import generate_text
from gptfast.model import GPT
from gptfast.sequences import evaluating
from gptfast.tokenizer import Tokenizer, get_tokenizer

_Request = tuple[Any, list[int], list[int]]


@register_model("gptfast")
class GPTFastLM(TemplateLM):
    """A GPT as the harness sees it.

    pretrained: a GPT, or what `GPT.from_pretrained` takes. tokenizer: a Tokenizer or its name; None
    takes that of the files, else GPT-2's.
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
        self.model = model.to(device or model.wte.weight.device)
        name = tokenizer if isinstance(tokenizer, str) else model.tokenizer_name or "gpt2"
        self.tokens = get_tokenizer(name) if tokenizer is None or tokenizer is name else tokenizer
        self.batch_size = 8 if batch_size == "auto" else int(batch_size)
        self.max_length = max_length or model.config.block_size

    @property
    def eot_token_id(self) -> int:
        return self.tokens.eot

    @property
    def tokenizer_name(self) -> str:
        return self.tokens.name

    def tok_encode(self, string: str, **_: Any) -> list[int]:
        return self.tokens.encode(string)

    def _loglikelihood_tokens(
        self, requests: Sequence[_Request], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        """Of each (key, context, continuation): its log-likelihood, and whether it is the greedy
        one. What is too long loses its beginning."""
        # Alike in length side by side, so that little is padding.
        order = sorted(range(len(requests)), key=lambda i: -sum(map(len, requests[i][1:])))
        results: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
        bar = tqdm(total=len(requests), disable=disable_tqdm, desc="loglikelihood")
        with torch.inference_mode(), evaluating(self.model):
            for at in range(0, len(order), self.batch_size):
                batch = order[at : at + self.batch_size]
                rows = [self._row(*requests[i][1:]) for i in batch]
                x, y = padded(self.model, rows)
                hidden = self.model.hidden(x)  # (B, T, C)
                losses = target_losses(self.model, hidden, y).sum(1).tolist()
                for k, i in enumerate(batch):
                    asked = y[k] != -100
                    likeliest = F.linear(hidden[k, asked], self.model.head_weight).argmax(-1)
                    results[i] = (-losses[k], torch.equal(likeliest, y[k, asked]))
                    if requests[i][0] is not None:
                        self.cache_hook.add_partial("loglikelihood", requests[i][0], results[i])
                bar.update(len(batch))
        bar.close()
        return results

    def _row(self, context: list[int], continuation: list[int]) -> Row:
        ids = torch.tensor((context + continuation)[-(self.max_length + 1) :])
        y = ids[1:].clone()
        y[: max(0, len(y) - len(continuation))] = -100
        return ids[:-1], y

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Of whole texts, in windows that each predict what no other does."""
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
        """Greedy continuations, or drawn with the temperature asked for, up to a stop string."""
        texts = []
        for request in tqdm(requests, disable=disable_tqdm, desc="generate_until"):
            context, options = request.args[0], dict(request.args[1])
            until = options.get("until") or []
            stop = [until] if isinstance(until, str) else list(until)
            n = int(options.get("max_gen_toks") or options.get("max_new_tokens") or 256)
            sampled = options.get("do_sample", False)
            text = generate_text(
                self.model,
                self.tokens,
                context,
                n,
                temperature=float(options.get("temperature") or 1.0) if sampled else 0.0,
                top_p=options.get("top_p") if sampled else None,
                top_k=options.get("top_k") if sampled else None,
                stop=[s for s in stop if s] or None,
            )
            texts.append(text[len(context) :])
            self.cache_hook.add_partial("generate_until", request.args, texts[-1])
        return texts
