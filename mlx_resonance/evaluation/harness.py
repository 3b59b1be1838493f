"""lm-eval's tasks with our models: its `LM`, with a checkpoint behind it, and its evaluation as one call.

Against mlx_lm.evaluate: the budget of an answer may have any of lm-eval's names, an empty `until` is none, prompts keep
to the checkpoint's context, and the result says which model, which rope settings and how many prompts were cut.
"""

# lm-eval has no types, and is an extra:
# mypy: disable-error-code="import-untyped,import-not-found", allow-subclassing-any
from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from itertools import groupby
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import can_trim_prompt_cache, trim_prompt_cache

try:
    import lm_eval
    from lm_eval.api.model import TemplateLM
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import get_rolling_token_windows, handle_non_serializable, make_disjoint_window, make_table
    from tqdm import tqdm
except ModuleNotFoundError as error:
    raise ValueError(f"[harness] {error.name} is missing: pip install 'mlx-resonance[eval]'") from None

from ..generation import prompt_tokens
from ..generation.cache import make_cache
from ..generation.prefill import prefill
from ..records import Record
from ..rope import expect
from .answers import greedy
from .checkpoint import Checkpoint

BUDGET = 256  # tokens of an answer whose task does not say
BUDGET_NAMES = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # the first one counts
LOGITS = 2**24  # numbers that are scored at once


class ResonanceLM(TemplateLM):
    """lm-eval's language model: log-likelihoods and greedy answers of a checkpoint.

    What is beyond the context loses its beginning, as with lm-eval's own models; `truncated` counts these.

    Args:
        checkpoint: its weights are read at once.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        super().__init__()
        self.checkpoint, self.tokenizer, self.max_length = checkpoint, checkpoint.tokenizer, checkpoint.context
        self.model = checkpoint.load()
        self.truncated = 0

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """The token that is before a text without a context."""
        start = self.tokenizer.bos_token_id
        return self.eot_token_id if start is None else int(start)

    @property
    def tokenizer_name(self) -> str:
        """For lm-eval's cache of prompts."""
        return str(self.checkpoint.header["model"]).replace("/", "__")

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A chat as text; raises ValueError where the tokenizer has no template."""
        if not self.tokenizer.has_chat_template:
            raise ValueError("[harness] the tokenizer has no chat template: leave --apply-chat-template out")
        options = {"add_generation_prompt": add_generation_prompt, "continue_final_message": not add_generation_prompt}
        return str(self.tokenizer.apply_chat_template(chat_history, tokenize=False, **options))

    def get_model_info(self) -> Record:
        """What lm-eval adds to the `config` of its result."""
        versions = {f"{name}_version": version(name) for name in ("mlx", "mlx-lm", "mlx-resonance", "lm-eval")}
        return self.checkpoint.header | {"max_length": self.max_length, "truncated": self.truncated} | versions

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids, BOS in front where the tokenizer puts it there and the text has none."""
        if not string.strip() or add_special_tokens is not None:
            return list(self.tokenizer.encode(string, add_special_tokens=add_special_tokens is not False))
        return prompt_tokens(self.tokenizer, string)

    def _loglikelihood_tokens(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Log-likelihood of continuations, and whether each is the greedy one; those on one context share its keys."""
        pairs = []
        for (_, text), context, continuation in requests:
            # None is left where it has become a part of the context's last token.
            continuation = continuation or self.tok_encode(text, add_special_tokens=False)
            whole = self._keep_end((context or [self.prefix_token_id]) + continuation, self.max_length + 1)
            split = max(1, len(whole) - len(continuation))
            pairs.append((whole[:split], whole[split:]))
        order = sorted(range(len(pairs)), key=lambda i: pairs[i][0])
        results: dict[int, tuple[float, bool]] = {}
        for _, same in groupby(tqdm(order, disable=disable_tqdm), key=lambda i: pairs[i][0]):
            places = list(same)
            scores = self._score(pairs[places[0]][0], [pairs[i][1] for i in places])
            results.update(zip(places, scores, strict=True))
        return [results[i] for i in range(len(pairs))]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts; each token of a long one is predicted once, in windows of the context."""
        totals = []
        for request in tqdm(requests, disable=disable_tqdm):
            tokens = self.tok_encode(request.args[0], add_special_tokens=False)
            windows = get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, context_len=1)
            pairs = [make_disjoint_window(window) for window in windows]
            totals.append(sum(self._score(context, [part])[0][0] for context, part in pairs))
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Answers, each up to the first of its stops."""
        return [self._generate(*request.args) for request in tqdm(requests, disable=disable_tqdm)]

    def _generate(self, context: str, options: Mapping[str, Any]) -> str:
        until = options.get("until") or []
        stops = [stop for stop in ([until] if isinstance(until, str) else until) if stop]
        budget = int(next((options[name] for name in BUDGET_NAMES if options.get(name) is not None), BUDGET))
        if budget >= self.max_length:
            raise ValueError(
                f"[harness] answers of {budget} tokens leave no room for a prompt in a context of {self.max_length}: "
                "give fewer --max-tokens or more --context"
            )
        sampled = options.get("do_sample") is not False
        temp = float(options.get("temperature") or 0) if sampled else 0.0
        tokens = self._keep_end(self.tok_encode(context) or [self.prefix_token_id], self.max_length - budget)

        def end(text: str) -> int | None:
            return min((place for stop in stops if (place := text.find(stop)) >= 0), default=None)

        text, *_ = greedy(self.model, self.tokenizer, tokens, budget, end, temp=temp, kv_bits=self._kv_bits)
        return text

    @property
    def _kv_bits(self) -> int | None:
        bits: int | None = self.checkpoint.header["kv_bits"]
        return bits

    def _keep_end(self, tokens: list[int], most: int) -> list[int]:
        self.truncated += len(tokens) > most
        return tokens[-most:]

    def _score(self, context: list[int], continuations: Sequence[list[int]]) -> list[tuple[float, bool]]:
        """Log-likelihood, in nats, of each continuation of a context that is not empty."""
        longest = len(context) + max(map(len, continuations))
        expect(self.model, longest)
        cache: list[Any] = []
        results = []
        for continuation in continuations:
            if not cache or not can_trim_prompt_cache(cache):
                cache = make_cache(self.model, longest, self._kv_bits)
                prefill(self.model, context, cache)
            results.append(self._score_next([context[-1], *continuation], cache))
            trim_prompt_cache(cache, cache[0].offset - len(context) + 1)
        return results

    def _score_next(self, tokens: list[int], cache: list[Any]) -> tuple[float, bool]:
        """Of all tokens but the first, after those in the cache."""
        size = max(1, min(512, LOGITS // self.model.args.vocab_size))
        total, is_greedy = 0.0, True
        for start in range(0, len(tokens) - 1, size):
            part = mx.array(tokens[start : start + size + 1])
            logits = self.model(part[None, :-1], cache=cache)[0].astype(mx.float32)
            right = mx.take_along_axis(logits, part[1:, None], axis=-1)[:, 0]
            total += float((right - mx.logsumexp(logits, axis=-1)).sum())
            is_greedy = is_greedy and bool((logits.argmax(axis=-1) == part[1:]).all())
            mx.clear_cache()
        return total, is_greedy


class Tasks(TaskManager):
    """lm-eval's tasks; ValueError in one line where one cannot be loaded."""

    def load(self, task_list: Any) -> Any:
        """The tasks of these names."""
        try:
            return super().load(task_list)
        except (OSError, ValueError):  # no network, no such file, …
            raise
        except Exception as error:
            raise ValueError(f"[harness] a task cannot be loaded: {type(error).__name__}: {error}") from None


def find_tasks(names: Sequence[str], include_path: Path | None) -> Tasks:
    """What knows tasks of these names. Raises ValueError where there is none, FileNotFoundError where no folder is."""
    if include_path is not None:
        if not include_path.is_dir():
            raise FileNotFoundError(f"[harness] --include-path {include_path} is no folder of tasks")
        own = Tasks(include_path=include_path, include_defaults=False)
        if set(names) <= set(own.all_subtasks):  # lm-eval's own take half a minute to read
            return own
    manager = Tasks(include_path=include_path)
    for name in names:
        if not manager.match_tasks([name]):
            raise ValueError(f"[harness] lm-eval has no task named {name!r}: see lm-eval ls tasks, or --include-path")
    return manager


def run_harness(
    checkpoint: Checkpoint,
    tasks: Sequence[str],
    *,
    include_path: Path | None = None,
    num_shots: int | None = None,
    limit: int | None = None,
    max_tokens: int | None = None,
    chat: bool = False,
) -> Record:
    """Run lm-eval's tasks.

    Args:
        checkpoint: the model.
        tasks: names of tasks, groups or tags.
        include_path: a folder with more tasks, as YAML.
        num_shots: solved examples in front; None for the task's own number.
        limit: so many documents of each task, the first ones.
        max_tokens: of an answer, instead of the task's own budget.
        chat: use the tokenizer's chat template.

    Returns:
        lm-eval's result: `results`, `groups` where there are some, `n-samples`, `config`, `versions`, …

    Raises:
        ValueError: an argument is out of range, or a task is unknown.
    """
    for name, value, least in (("num_shots", num_shots, 0), ("limit", limit, 1), ("max_tokens", max_tokens, 1)):
        if value is not None and value < least:
            raise ValueError(f"[harness] {name} must be at least {least}, got {value}")
    logging.getLogger("lm_eval").setLevel(logging.WARNING)
    manager = find_tasks(tasks, include_path)
    result = lm_eval.simple_evaluate(
        model=ResonanceLM(checkpoint),
        tasks=list(tasks),
        num_fewshot=num_shots,
        limit=limit,
        gen_kwargs=None if max_tokens is None else {"max_gen_toks": max_tokens},
        apply_chat_template=chat,
        task_manager=manager,
        log_samples=False,
    )
    # NumPy's numbers become JSON's, and NaN and infinity null.
    plain: Record = json.loads(json.dumps(result, default=handle_non_serializable), parse_constant=lambda _: None)
    return plain


def tables(result: Record) -> str:
    """lm-eval's own tables of a result: of its tasks, and of its groups where there are some."""
    return "\n".join(make_table(result, part) for part in ("results", "groups") if result.get(part))
