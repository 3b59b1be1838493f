"""lm-eval's `LM` for a checkpoint: log-likelihoods and answers, in the order of their prompts, which share their keys.

Unlike mlx_lm.evaluate: the budget of an answer may have any of lm-eval's names, empty strings in `until` are ignored,
and prompts fit into the checkpoint's context.
"""

# lm-eval has no types, and is an extra:
# mypy: disable-error-code="import-untyped,import-not-found", allow-subclassing-any
from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import groupby, takewhile
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import can_trim_prompt_cache, trim_prompt_cache

from ..errors import ANOTHER, UsageError
from ..release import install_hint

try:
    from lm_eval.api.model import TemplateLM
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ModuleNotFoundError as error:
    raise UsageError(f"{error.name} is missing: {install_hint('eval')}") from None

from ..checkpoint import Checkpoint
from ..generation import prompt_tokens
from ..generation.cache import make_cache
from ..generation.kv_format import KVBits, KVFormat
from ..generation.prefill import STEP, prefill
from ..rope import expect
from ..run_log import Record
from .answers import greedy
from .responses import Response, Responses, temperature

BUDGET = 256  # tokens of an answer whose task does not say
BUDGET_NAMES = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # the first one counts
LOGITS = 2**24  # numbers that are scored at once
TRUNCATIONS = {"left": "at the beginning", "middle": "in the middle"}

Progress = Callable[[str, int, int], None]


class ResonanceLM(TemplateLM):
    """lm-eval's language model: log-likelihoods and greedy answers of a checkpoint.

    Args:
        checkpoint: its weights are read when the first response is missing.
        context: maximum number of tokens of a prompt and its answer.
        kv_bits: as in `stream_generate`.
        truncation: what a prompt that exceeds the context loses: its beginning (left), as in lm-eval's own models, or
            its middle.
        responses: where they are kept; None to keep none.
        progress: called with the kind of requests, the number of their tokens read and their total.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        context: int,
        *,
        kv_bits: KVBits = None,
        truncation: str = "left",
        responses: Responses | None = None,
        progress: Progress | None = None,
    ) -> None:
        super().__init__()
        self.checkpoint, self.tokenizer = checkpoint, checkpoint.tokenizer
        self.max_length, self.kv_bits, self.truncation = context, kv_bits, truncation
        self.responses = responses or Responses()
        self._progress = progress or (lambda *_: None)
        self._caches: list[Any] = []  # of the prompt before: its tokens, and how many the caches have room for
        self._held: list[int] = []
        self._room = 0

    @cached_property
    def model(self) -> nn.Module:
        """The checkpoint with its weights."""
        return self.checkpoint.load()

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """The token before a text that has no context."""
        start = self.tokenizer.bos_token_id
        return self.eot_token_id if start is None else int(start)

    @property
    def tokenizer_name(self) -> str:
        """For lm-eval's cache of prompts."""
        return self.checkpoint.name.replace("/", "__")

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A chat as text. Raises UsageError where the tokenizer has no template."""
        if not self.tokenizer.has_chat_template:
            raise UsageError("the tokenizer has no chat template", option="apply_chat_template")
        options = {"add_generation_prompt": add_generation_prompt, "continue_final_message": not add_generation_prompt}
        return str(self.tokenizer.apply_chat_template(chat_history, tokenize=False, **options))

    def get_model_info(self) -> Record:
        """What lm-eval adds to the `config` of its result."""
        counts = {"requests": self.responses.asked, "truncated": self.responses.truncated}
        about = {"model": self.checkpoint.name} | self.checkpoint.settings(KVFormat.of(self.kv_bits).value)
        return about | {"max_length": self.max_length, "truncation": self.truncation} | counts

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids, with BOS in front if the tokenizer puts it there and the text has none."""
        if not string.strip() or add_special_tokens is not None:
            return list(self.tokenizer.encode(string, add_special_tokens=add_special_tokens is not False))
        return prompt_tokens(self.tokenizer, string)

    def _loglikelihood_tokens(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Log-likelihood of continuations, and whether each is the greedy one; those of one context share its keys."""
        pairs = [self._split(*request) for request in requests]
        changing = self.checkpoint.rope.depends_on_length  # keys are rotated for one length of the whole text

        def group(i: int) -> tuple[list[int], int]:
            return pairs[i][0], len(pairs[i][1]) if changing else 0

        def compute(missing: list[int]) -> Iterator[list[Response]]:
            groups = [list(same) for _, same in groupby(sorted(missing, key=group), key=group)]
            advance = self._counter("loglikelihood", sum(len(pairs[places[0]][0]) for places in groups))
            for places in groups:
                scores = self._score(pairs[places[0]][0], [pairs[i][1] for i in places])
                advance(len(pairs[places[0]][0]))
                yield [(i, score, pairs[i][2]) for i, score in zip(places, scores, strict=True)]

        arguments = [texts for texts, _, _ in requests]
        return [(total, is_greedy) for total, is_greedy in self.responses.respond("loglikelihood", arguments, compute)]

    def _split(self, texts: tuple[str, str], context: list[int], continuation: list[int]) -> tuple[Any, Any, bool]:
        """The tokens of a context and its continuation, within the maximum length, and whether they were cut."""
        # lm-eval gives no continuation if it merged into the last token of the context.
        continuation = continuation or self.tok_encode(texts[1], add_special_tokens=False)
        tokens, most = (context or [self.prefix_token_id]) + continuation, self.max_length + 1
        if self.truncation == "middle" and len(continuation) < most < len(tokens):
            return self._cut(context, most - len(continuation))[0], continuation, True
        split = max(1, len(tokens[-most:]) - len(continuation))
        return tokens[-most:][:split], tokens[-most:][split:], len(tokens) > most

    def _cut(self, tokens: list[int], most: int) -> tuple[list[int], bool]:
        """The tokens cut to at most `most`, and whether any were cut."""
        if len(tokens) <= most:
            return tokens, False
        head = most // 2 if self.truncation == "middle" else 0
        return tokens[:head] + tokens[len(tokens) - most + head :], True

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts; each token of a long one is predicted once, in windows of the context."""
        arguments = [request.args for request in requests]

        def compute(missing: list[int]) -> Iterator[list[Response]]:
            texts = {i: self.tok_encode(arguments[i][0], add_special_tokens=False) for i in missing}
            advance = self._counter("loglikelihood_rolling", sum(map(len, texts.values())))
            for i, tokens in texts.items():
                windows = get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, context_len=1)
                pairs = [make_disjoint_window(window) for window in windows]
                total = float(sum(self._score(context, [part])[0][0] for context, part in pairs))
                advance(len(tokens))
                yield [(i, total, False)]

        return self.responses.respond("loglikelihood_rolling", arguments, compute)

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Answers, each up to the first of its stops."""
        arguments = [request.args for request in requests]
        budgets = [self._budget(options) for _, options in arguments]  # all are checked before the first answer

        def compute(missing: list[int]) -> Iterator[list[Response]]:
            texts = {i: self.tok_encode(arguments[i][0]) or [self.prefix_token_id] for i in missing}
            prompts = {i: self._cut(tokens, self.max_length - budgets[i]) for i, tokens in texts.items()}
            advance = self._counter("generate_until", sum(len(tokens) for tokens, _ in prompts.values()))
            for i in sorted(missing, key=lambda i: prompts[i][0]):
                tokens, cut = prompts[i]
                text = self._generate(tokens, arguments[i][1], budgets[i])
                advance(len(tokens))
                yield [(i, text, cut)]

        return self.responses.respond("generate_until", arguments, compute)

    def _counter(self, kind: str, total: int) -> Callable[[int], None]:
        done = 0

        def advance(tokens: int) -> None:
            nonlocal done
            done += tokens
            self._progress(kind, done, total)

        self._progress(kind, 0, total)
        return advance

    def _budget(self, options: Mapping[str, Any]) -> int:
        budget = int(next((options[name] for name in BUDGET_NAMES if options.get(name) is not None), BUDGET))
        if budget >= self.max_length:
            raise UsageError(
                f"answers of {budget} tokens leave no room for a prompt in a context of {self.max_length} tokens",
                remedies=[{"max_tokens": ANOTHER}, {"context": ANOTHER}],
            )
        return budget

    def _generate(self, tokens: list[int], options: Mapping[str, Any], budget: int) -> str:
        """The answer to a prompt."""
        until = options.get("until") or []
        stops = [stop for stop in ([until] if isinstance(until, str) else until) if stop]

        def end(text: str) -> int | None:
            return min((place for stop in stops if (place := text.find(stop)) >= 0), default=None)

        caches, temp = self._open(tokens, len(tokens) + budget), temperature(options)
        rest = tokens[caches[0].offset :]
        text, *_ = greedy(
            self.model, self.tokenizer, rest, budget, end, temp=temp, kv_bits=self.kv_bits, prompt_cache=caches
        )
        return text

    def _open(self, tokens: list[int], room: int) -> list[Any]:
        """Caches with room for `room` tokens that hold the beginning which this prompt shares with the last one.

        Only whole chunks count: then a prompt is read in the same chunks whichever was read before it, and a resumed
        run computes the same bits.
        """
        caches, self._caches = self._caches, []
        shared = 0
        if caches and room <= self._room and can_trim_prompt_cache(caches):
            same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(self._held, tokens, strict=False)))
            shared = 0 if self.checkpoint.rope.depends_on_length else min(same, len(tokens) - 1) // STEP * STEP
        if shared:
            trim_prompt_cache(caches, caches[0].offset - shared)
        else:
            caches = []  # freed before the next ones are made
            self._room = min(-(-room // STEP) * STEP, max(room, self.max_length))
            caches = make_cache(self.model, self._room, self.kv_bits)
        self._caches, self._held = caches, tokens
        return caches

    def _score(self, context: list[int], continuations: Sequence[list[int]]) -> list[tuple[float, bool]]:
        """Log-likelihood, in nats, of each continuation of a context that is not empty."""
        longest = len(context) + max(map(len, continuations))
        expect(self.model, longest)
        caches: list[Any] = []
        results = []
        for continuation in continuations:
            if not caches or not can_trim_prompt_cache(caches):
                caches = self._open(context, longest)
                prefill(self.model, context, caches)
            results.append(self._score_next([context[-1], *continuation], caches))
            trim_prompt_cache(caches, caches[0].offset - len(context) + 1)
        return results

    def _score_next(self, tokens: list[int], cache: list[Any]) -> tuple[float, bool]:
        """The log-likelihood of tokens after the first, given those in the cache; whether they are the greedy ones."""
        size = max(1, min(512, LOGITS // self.model.args.vocab_size))
        total, is_greedy = 0.0, True
        for start in range(0, len(tokens) - 1, size):
            part = mx.array(tokens[start : start + size + 1])
            logits = self.model(part[None, :-1], cache=cache)[0].astype(mx.float32)
            right = mx.take_along_axis(logits, part[1:, None], axis=-1)[:, 0]
            total += float((right - mx.logsumexp(logits, axis=-1)).sum())
            is_greedy = is_greedy and bool((logits.argmax(axis=-1) == part[1:]).all())
            mx.clear_cache()
        if not math.isfinite(total):
            raise UsageError(f"a log-likelihood is {total}: the weights are damaged, or need another type")
        return total, is_greedy
