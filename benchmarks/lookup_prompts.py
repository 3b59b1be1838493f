"""Prompts of four kinds for lookup.py: quotes, edits of code, summaries, fresh text."""

from __future__ import annotations

import ast
import random
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from documents import FOLDER, documents

KINDS = ("quote", "code", "summary", "fresh")
MODULES = ("argparse", "ast", "bdb", "calendar", "cmd", "configparser", "csv", "difflib", "dis", "fileinput", "ftplib",
           "gettext", "imaplib", "inspect", "locale", "mailbox", "optparse", "pdb", "pprint", "shlex", "shutil",
           "smtplib", "socketserver", "tarfile", "textwrap", "trace", "turtle", "unittest/case", "zipfile")  # fmt: skip
WHO = ("a lighthouse keeper", "a retired engine driver", "two sisters", "a young cook", "an old beekeeper", "a clock",
       "the last librarian of a town", "a fisherman's daughter", "a painter without hands",
       "a night nurse")  # fmt: skip
WHAT = ("who finds a message in a bottle", "who misses the last ferry", "that must cross a desert",
        "and a letter that comes forty years late", "who learns to fly")  # fmt: skip
LEAST_LINES, MOST_LINES = 8, 40  # of a function to edit
LONG = 1000  # what the numbers of long prompts begin with


class Prompt(NamedTuple):
    """What a model is asked: its number within its kind, and its token ids."""

    kind: str
    number: int
    tokens: list[int]


def prompts(tokenizer: Any, kind: str, count: int, longest: int, work_dir: Path = FOLDER) -> list[Prompt]:
    """Prompts of a kind, of at most `longest` tokens, the same in every run with the same texts and Python.

    Quotes and edits are asked in two ways in turns: as a question to the chat, and as a text to continue.
    """
    found: list[Prompt] = []
    for text in {"quote": quotes, "code": edits, "summary": summaries, "fresh": stories}[kind](tokenizer, work_dir):
        if len(found) == count:
            break
        tokens = list(tokenizer.encode(text))
        if len(tokens) <= longest:
            found.append(Prompt(kind, len(found), tokens))
    return found


def long_prompts(tokenizer: Any, length: int, work_dir: Path = FOLDER) -> list[list[Prompt]]:
    """Ten prompts of about `length` tokens: five on a book, five on code; each five begin alike, to be read once."""
    book = next(text for name, text in documents(work_dir) if name == "debian-handbook")
    groups, numbers = [], dict.fromkeys(KINDS, 0)
    for text in (book[30_000:], source("argparse")):
        body = tokenizer.decode(list(tokenizer.encode(text))[: length - 60])
        asked = [
            ("summary", "Summarize the text above in one paragraph.", ""),
            ("fresh", f"Forget the text above. Write a story about {WHO[0]} {WHAT[0]}.", ""),
        ]
        functions = [found for found in named(body) if len(found[0]) < 800]
        if text.startswith("#"):  # code
            for function, name in (functions[len(functions) // 3], functions[-1]):
                asked.append(("code", f"Write out this function with {name} renamed.", after(function, name)))
        paragraphs = [part for part in body.split("\n\n") if 200 < len(part) < 500]
        for part in (paragraphs[len(paragraphs) // 3], paragraphs[-3], paragraphs[1])[: 5 - len(asked)]:
            asked.append(("quote", "Repeat the paragraph that begins as follows.", beginning(part)))
        group = []
        for kind, question, start in asked:
            tokens = tokenizer.encode(chat(tokenizer, f"{body}\n\n{question}") + start)
            group.append(Prompt(kind, LONG + numbers[kind], list(tokens)))
            numbers[kind] += 1
        groups.append(group)
    return groups


def chat(tokenizer: Any, text: str) -> str:
    """A question, in the chat template."""
    asked = [{"role": "user", "content": text}]
    return str(tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True))


def passages(work_dir: Path, seed: int) -> Iterator[str]:
    """Passages of whole paragraphs, of all documents in turns."""
    chosen, texts = random.Random(seed), [text.split("\n\n") for _, text in documents(work_dir)]
    while True:
        for parts in texts:
            start, length = chosen.randrange(len(parts) - 40), chosen.randrange(200, 1200)
            passage = ""
            for part in parts[start : start + 40]:
                passage += part + "\n\n"
                if len(passage) > length:
                    break
            yield passage.strip()


def quotes(tokenizer: Any, work_dir: Path) -> Iterator[str]:
    """Repeat a passage."""
    for i, text in enumerate(passages(work_dir, 1)):
        asked = chat(tokenizer, f"Repeat the following text word for word:\n\n{text}")
        yield asked if i % 2 else f"{text}\n\nThe text above once more, word for word:\n\n{beginning(text)}"


def summaries(tokenizer: Any, work_dir: Path) -> Iterator[str]:
    """Summarize a passage."""
    for text in passages(work_dir, 2):
        yield chat(tokenizer, f"Summarize the following text in one paragraph:\n\n{text}")


def stories(tokenizer: Any, work_dir: Path) -> Iterator[str]:
    """Write a story."""
    for what in WHAT:
        for who in WHO:
            yield chat(tokenizer, f"Write a story about {who} {what}.")


def edits(tokenizer: Any, work_dir: Path) -> Iterator[str]:
    """Rename a variable in a function of the standard library and write out the whole function."""
    found = [each for name in MODULES for each in named(source(name))]
    random.Random(3).shuffle(found)
    for i, (function, name) in enumerate(found):
        asked = f"Rename {name} to new_{name} in this function and write out the whole function:"
        question = chat(tokenizer, f"{asked}\n\n```python\n{function}\n```")
        yield question if i % 2 else f"{function}\n\n\n# The same with {name} renamed:\n\n{after(function, name)}"


def named(code: str) -> list[tuple[str, str]]:
    """Functions that assign to a variable and use it, in the order of the file, each with its most used one."""
    found: list[tuple[str, str]] = []
    while True:
        try:
            tree = ast.parse(code)
            break
        except SyntaxError as error:  # cut off in the middle
            code = "\n".join(code.split("\n")[: min((error.lineno or 1), code.count("\n")) - 1])
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and LEAST_LINES < (node.end_lineno or 0) - node.lineno < MOST_LINES:
            names = [part.id for part in ast.walk(node) if isinstance(part, ast.Name)]
            own = {part.id for part in ast.walk(node) if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store)}
            used = sorted(own, key=lambda name: (-names.count(name), name))
            if used and names.count(used[0]) > 2:
                found.append((ast.unparse(node), used[0]))
    return found


def beginning(text: str, words: int = 8) -> str:
    """The first words of a text."""
    end = 0
    for word in text.split()[:words]:
        end = text.index(word, end) + len(word)
    return text[:end]


def after(function: str, name: str) -> str:
    """The line that an edited function begins with, and the beginning of the next."""
    first = function.split("\n")[0]
    return f"{first.replace(name, f'new_{name}')}\n   "


def source(name: str) -> str:
    """A module of the standard library."""
    return (Path(sysconfig.get_paths()["stdlib"]) / f"{name}.py").read_text(encoding="utf-8", errors="replace")
