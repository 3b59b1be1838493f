"""lm-eval's tasks with our models: its `LM` for a checkpoint, and its evaluation as one call that resumes.

Unlike mlx_lm.evaluate: the budget of an answer may have any of lm-eval's names, empty strings in `until` are ignored,
prompts fit into the checkpoint's context, and the result has the model, its rope settings, the number of cut prompts.
"""

# lm-eval has no types, and is an extra:
# mypy: disable-error-code="import-untyped,import-not-found", allow-subclassing-any
from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from importlib.metadata import version
from itertools import groupby
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import can_trim_prompt_cache, trim_prompt_cache

from ..errors import ANOTHER, MissingFileError, UsageError, check_option
from ..release import install_hint

try:
    import lm_eval
    from lm_eval.api.model import TemplateLM
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import get_rolling_token_windows, handle_non_serializable, make_disjoint_window, make_table
    from tqdm import tqdm
except ModuleNotFoundError as error:
    raise UsageError(f"{error.name} is missing: {install_hint('eval')}") from None

from ..checkpoint import Checkpoint
from ..generation import prompt_tokens
from ..generation.cache import make_cache
from ..generation.kv_format import KVBits, KVFormat
from ..generation.prefill import prefill
from ..rope import expect
from ..run_log import Record
from ..wired import wired
from .answers import greedy
from .responses import Response, Responses, temperature

BUDGET = 256  # tokens of an answer whose task does not say
BUDGET_NAMES = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # the first one counts
LOGITS = 2**24  # numbers that are scored at once
SHOTS = 10_000  # the maximum number of examples in front


class ResonanceLM(TemplateLM):
    """lm-eval's language model: log-likelihoods and greedy answers of a checkpoint.

    A prompt that exceeds the context loses its beginning, as in lm-eval's own models.

    Args:
        checkpoint: its weights are read when the first response is missing.
        context: maximum number of tokens of a prompt and its answer.
        kv_bits: as in `stream_generate`.
        responses: where they are kept; None to keep none.
    """

    def __init__(
        self, checkpoint: Checkpoint, context: int, *, kv_bits: KVBits = None, responses: Responses | None = None
    ) -> None:
        super().__init__()
        self.checkpoint, self.tokenizer = checkpoint, checkpoint.tokenizer
        self.max_length, self.kv_bits = context, kv_bits
        self.responses = responses or Responses()

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
        versions = {f"{name}_version": version(name) for name in ("mlx", "mlx-lm", "mlx-resonance", "lm-eval")}
        about = {"model": self.checkpoint.name} | self.checkpoint.settings(KVFormat.of(self.kv_bits).value)
        return about | {"max_length": self.max_length, "truncated": self.responses.truncated} | versions

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
            for _, same in groupby(tqdm(sorted(missing, key=group), disable=disable_tqdm), key=group):
                places = list(same)
                scores = self._score(pairs[places[0]][0], [pairs[i][1] for i in places])
                yield [(i, score, pairs[i][2]) for i, score in zip(places, scores, strict=True)]

        arguments = [texts for texts, _, _ in requests]
        return [(total, is_greedy) for total, is_greedy in self.responses.respond("loglikelihood", arguments, compute)]

    def _split(self, texts: tuple[str, str], context: list[int], continuation: list[int]) -> tuple[Any, Any, bool]:
        """The tokens of a context and its continuation, within the maximum length, and whether they were cut."""
        # lm-eval gives no continuation if it merged into the last token of the context.
        continuation = continuation or self.tok_encode(texts[1], add_special_tokens=False)
        tokens, cut = _keep_end((context or [self.prefix_token_id]) + continuation, self.max_length + 1)
        split = max(1, len(tokens) - len(continuation))
        return tokens[:split], tokens[split:], cut

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts; each token of a long one is predicted once, in windows of the context."""
        arguments = [request.args for request in requests]

        def compute(missing: list[int]) -> Iterator[list[Response]]:
            for i in tqdm(missing, disable=disable_tqdm):
                tokens = self.tok_encode(arguments[i][0], add_special_tokens=False)
                windows = get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, context_len=1)
                pairs = [make_disjoint_window(window) for window in windows]
                yield [(i, float(sum(self._score(context, [part])[0][0] for context, part in pairs)), False)]

        return self.responses.respond("loglikelihood_rolling", arguments, compute)

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Answers, each up to the first of its stops."""
        arguments = [request.args for request in requests]
        budgets = [self._budget(options) for _, options in arguments]  # all are checked before the first answer

        def compute(missing: list[int]) -> Iterator[list[Response]]:
            for i in tqdm(missing, disable=disable_tqdm):
                context, options = arguments[i]
                yield [(i, *self._generate(context, options, budgets[i]))]

        return self.responses.respond("generate_until", arguments, compute)

    def _budget(self, options: Mapping[str, Any]) -> int:
        budget = int(next((options[name] for name in BUDGET_NAMES if options.get(name) is not None), BUDGET))
        if budget >= self.max_length:
            raise UsageError(
                f"answers of {budget} tokens leave no room for a prompt in a context of {self.max_length} tokens",
                remedies=[{"max_tokens": ANOTHER}, {"context": ANOTHER}],
            )
        return budget

    def _generate(self, context: str, options: Mapping[str, Any], budget: int) -> tuple[str, bool]:
        """An answer, and whether the prompt was cut."""
        until = options.get("until") or []
        stops = [stop for stop in ([until] if isinstance(until, str) else until) if stop]
        tokens, cut = _keep_end(self.tok_encode(context) or [self.prefix_token_id], self.max_length - budget)

        def end(text: str) -> int | None:
            return min((place for stop in stops if (place := text.find(stop)) >= 0), default=None)

        temp = temperature(options)
        text, *_ = greedy(self.model, self.tokenizer, tokens, budget, end, temp=temp, kv_bits=self.kv_bits)
        return text, cut

    def _score(self, context: list[int], continuations: Sequence[list[int]]) -> list[tuple[float, bool]]:
        """Log-likelihood, in nats, of each continuation of a context that is not empty."""
        longest = len(context) + max(map(len, continuations))
        expect(self.model, longest)
        cache: list[Any] = []
        results = []
        for continuation in continuations:
            if not cache or not can_trim_prompt_cache(cache):
                cache = make_cache(self.model, longest, self.kv_bits)
                prefill(self.model, context, cache)
            results.append(self._score_next([context[-1], *continuation], cache))
            trim_prompt_cache(cache, cache[0].offset - len(context) + 1)
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


def _keep_end(tokens: list[int], most: int) -> tuple[list[int], bool]:
    return tokens[-most:], len(tokens) > most


class Tasks(TaskManager):
    """lm-eval's tasks, with errors of one line."""

    def load(self, task_list: Any) -> Any:
        """The tasks of these names. Raises UsageError where one cannot be loaded."""
        try:
            return super().load(task_list)
        except (OSError, ValueError):  # no network, no such file, …
            raise
        except Exception as error:
            why = f"a task cannot be loaded: {type(error).__name__}: {error}"
            raise UsageError(why, option="tasks") from None


def find_tasks(names: Sequence[str], include_path: Path | None) -> Tasks:
    """The task manager that knows tasks of these names. Raises UsageError where there is no such task or folder."""
    if include_path is not None:
        if not include_path.is_dir():
            raise MissingFileError(f"{include_path} is not a folder of tasks", option="include_path")
        own = Tasks(include_path=include_path, include_defaults=False)
        if set(names) <= set(own.all_subtasks):  # lm-eval's own take half a minute to read
            return own
    manager = Tasks(include_path=include_path)
    for name in names:
        if not manager.match_tasks([name]):
            raise UsageError(f"lm-eval has no task named {name!r}", option="tasks")
    return manager


@wired()
def run_harness(
    checkpoint: Checkpoint,
    tasks: Sequence[str],
    *,
    context: int,
    kv_bits: KVBits = None,
    include_path: Path | None = None,
    num_shots: int | None = None,
    limit: int | None = None,
    max_tokens: int | None = None,
    chat: bool = False,
    output: Path | None = None,
) -> Record:
    """Run lm-eval's tasks.

    Args:
        checkpoint: the model.
        tasks: names of tasks, groups or tags.
        context: maximum number of tokens of a prompt and its answer.
        kv_bits: as in `stream_generate`.
        include_path: a folder with more tasks, as YAML.
        num_shots: solved examples in front; None for the task's own number.
        limit: ask only the first documents of each task, up to this number.
        max_tokens: of an answer, instead of the task's own budget.
        chat: use the tokenizer's chat template.
        output: the file of a run log: each response, then the result. A killed run resumes, more tasks add to it.

    Returns:
        lm-eval's result: `results`, `groups` if there are any, `n-samples`, `config`, `versions`, …

    Raises:
        UsageError: an argument is out of range, a task is unknown, or the file has responses of other settings.
    """
    check_option("num_shots", num_shots is None or 0 <= num_shots <= SHOTS, f"in [0, {SHOTS}]", num_shots)
    check_option("limit", limit is None or limit >= 1, "at least 1", limit)
    check_option("max_tokens", max_tokens is None or max_tokens >= 1, "at least 1", max_tokens)
    settings = checkpoint.settings(KVFormat.of(kv_bits).value) | {"context": context, "max_tokens": max_tokens}
    settings |= {"num_shots": num_shots, "limit": limit, "chat_template": chat}
    responses = Responses(output, settings, about={"model": checkpoint.name})
    logging.getLogger("lm_eval").setLevel(logging.WARNING)
    manager = find_tasks(tasks, include_path)
    result = lm_eval.simple_evaluate(
        model=ResonanceLM(checkpoint, context, kv_bits=kv_bits, responses=responses),
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
    responses.add_result(tasks, plain)
    return plain


def tables(result: Record) -> str:
    """lm-eval's own tables of a result: of its tasks, and of its groups if there are any."""
    return "\n".join(make_table(result, part) for part in ("results", "groups") if result.get(part))
