"""From texts, documents and conversations to the token ids of a prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mlx_lm.tokenizer_utils import TokenizerWrapper

from ..errors import UsageError
from ..tokenizer import check_ids, template_error
from .prompt_cache import common_prefix

Message = Mapping[str, Any]  # role, content; also tool_calls and so on, as the chat template has them
BETWEEN = "\n\n"  # documents, and the question about them


def prompt_tokens(
    tokenizer: TokenizerWrapper, prompt: str | list[int], chat: bool = False, rows: int | None = None
) -> list[int]:
    """The token ids of a prompt.

    Args:
        tokenizer: from `load`.
        prompt: text, or token ids, which are returned as they are.
        chat: put the text as a user message into the tokenizer's chat template, if it has one.
        rows: number of ids in the model's vocabulary; None if the prompt is a text and the tokenizer, from `load`,
            checks it.

    Raises:
        UsageError: the prompt is empty, has a token outside the vocabulary, or the chat template fails.
    """
    if not prompt or (isinstance(prompt, str) and not prompt.strip()):
        raise UsageError("the prompt is empty", option="prompt")
    if not isinstance(prompt, str):
        tokens = list(prompt)
    elif chat and tokenizer.has_chat_template:
        tokens = chat_tokens(tokenizer, [{"role": "user", "content": prompt}])
    else:
        tokens = _tokens_of_text(tokenizer, prompt)
    if rows is not None:
        check_ids(tokenizer, tokens, rows)
    return tokens


def _tokens_of_text(tokenizer: TokenizerWrapper, prompt: str) -> list[int]:
    _check_text(prompt)
    starts_with_bos = tokenizer.bos_token is not None and prompt.startswith(tokenizer.bos_token)
    tokens = list(tokenizer.encode(prompt, add_special_tokens=not starts_with_bos))
    if not tokens:
        raise UsageError("the tokenizer makes no tokens of the prompt", option="prompt")
    return tokens


def _check_text(text: str) -> None:
    if not text.isprintable() and any("\ud800" <= character <= "\udfff" for character in text):
        raise UsageError("the prompt is not UTF-8 text", option="prompt")


def chat_tokens(tokenizer: TokenizerWrapper, messages: Sequence[Message], **template: Any) -> list[int]:
    """The token ids of a conversation, up to where the model's answer begins.

    Args:
        tokenizer: from `load`. One without a chat template gets the texts of the messages, blank lines between them.
        messages: each with a `role` and a `content`.
        template: further variables of the chat template, such as `tools`.

    Raises:
        UsageError: there are no messages, or the chat template fails; without a template, there is a system message.
    """
    if not messages:
        raise UsageError("there are no messages")
    for message in messages:
        if isinstance(content := message.get("content"), str):
            _check_text(content)
    if tokenizer.has_chat_template:
        tokens = list(
            tokenizer.apply_chat_template(
                [dict(message) for message in messages], add_generation_prompt=True, return_dict=False, **template
            )
        )
        if not tokens:
            raise template_error("makes an empty prompt")
        return tokens
    if any(message.get("role") == "system" for message in messages):
        raise UsageError("without a chat template there is no place for a system prompt", option="system_prompt")
    return _tokens_of_text(tokenizer, BETWEEN.join(str(message.get("content") or "") for message in messages))


def question_messages(texts: Sequence[str], question: str | None, system_prompt: str | None = None) -> list[Message]:
    """A question about documents as messages: the documents first, so that the next question shares its beginning.

    Args:
        texts: the documents.
        question: what follows them; None if the documents are the whole prompt.
        system_prompt: text of a system message.

    Raises:
        UsageError: there is nothing to ask.
    """
    parts = [*(text.rstrip("\n") for text in texts), question] if question is not None else list(texts)
    content = BETWEEN.join(parts)
    if not content.strip():
        raise UsageError("the prompt is empty", option="prompt")
    system = [{"role": "system", "content": system_prompt}] if system_prompt is not None else []
    return [*system, {"role": "user", "content": content}]


def question_tokens(
    tokenizer: TokenizerWrapper,
    texts: Sequence[str],
    question: str | None,
    system_prompt: str | None = None,
    chat: bool = True,
) -> list[int]:
    """The token ids of a question about documents.

    Args:
        tokenizer: from `load`.
        texts, question, system_prompt: as in `question_messages`.
        chat: use the chat template, if the tokenizer has one.

    Raises:
        UsageError: there is nothing to ask, the chat template fails, or without one there is a system prompt.
    """
    messages = question_messages(texts, question, system_prompt)
    if chat and tokenizer.has_chat_template:
        return chat_tokens(tokenizer, messages)
    if system_prompt is not None:
        raise UsageError("without a chat template there is no place for a system prompt", option="system_prompt")
    return prompt_tokens(tokenizer, messages[-1]["content"])


def document_tokens(
    tokenizer: TokenizerWrapper, texts: Sequence[str], system_prompt: str | None = None, chat: bool = True
) -> list[int]:
    """The token ids that every question about some documents begins with. Arguments as in `question_tokens`."""
    one, other = (question_tokens(tokenizer, texts, question, system_prompt, chat) for question in ("A", "7 b"))
    return one[: common_prefix(one, other)]
