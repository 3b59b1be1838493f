"""LongBench (Bai et al. 2023, arXiv 2308.14508): its files, prompts, budgets and metrics, and LongBench-E's.

Sources: THUDM/LongBench at 2e00731, LongBench/config (prompts, which are the benchmark's own words, and budgets),
pred.py (chat templates, SAMSum's one line), eval.py (metrics). What differs here: all answers that are scored by their
first line end after it, not only SAMSum's, which saves time and changes no score.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import UsageError
from ..run_log import Record, check_field
from . import scorers
from .answers import summarize
from .prompts import Prompt, read_lines

KIND = "longbench"
METRICS: dict[str, Callable[[str, str], float]] = {
    "f1": scorers.f1,
    "rouge": scorers.rouge_l_sentences,
    "numbers": scorers.part_of_numbers,
    "edit similarity": scorers.edit_similarity,
}
SEGMENTED = ("multifieldqa_zh", "dureader", "vcsum")
BRACKETS = ((4000, "0-4k"), (8000, "4-8k"))  # LongBench-E's, of the field `length`
PASSAGES = (
    "Answer the question based on the given passages. Only give me the answer and do not output any other words.\n\n"
    "The following are given passages.\n{context}\n\nAnswer the question based on the given passages. Only give me the "
    "answer and do not output any other words.\n\nQuestion: {input}\nAnswer:"
)
QASPER = (
    'Answer the question {}as concisely as you can, using a single phrase or sentence if possible. If the question '
    'cannot be answered based on the information in the article, write "unanswerable". If the question is a yes/no '
    'question, answer "yes", "no", or "unanswerable". Do not provide any explanation.'
)  # fmt: skip


@dataclass(frozen=True)
class LongBenchTask:
    """A task.

    Args:
        prompt: with {context} once, and {input}.
        budget: maximum number of tokens of an answer.
        metric: a name of `METRICS`, or classes.
        chat: whether the benchmark uses a chat template.
        one_line: only the first line of an answer counts.
    """

    prompt: str
    budget: int
    metric: str = "f1"
    chat: bool = True
    one_line: bool = False


TASKS = {
    "narrativeqa": LongBenchTask(
        "You are given a story, which can be either a novel or a movie script, and a question. Answer the question "
        "asconcisely as you can, using a single phrase if possible. Do not provide any explanation.\n\nStory: {context}"
        "\n\nNow, answer the question based on the story asconcisely as you can, using a single phrase if possible. Do "
        "not provide any explanation.\n\nQuestion: {input}\n\nAnswer:",
        128,
    ),
    "qasper": LongBenchTask(
        "You are given a scientific article and a question. " + QASPER.format("") + "\n\nArticle: {context}\n\n "
        + QASPER.format("based on the above article ") + "\n\nQuestion: {input}\n\nAnswer:",
        128,
    ),
    "multifieldqa_en": LongBenchTask(
        "Read the following text and answer briefly.\n\n{context}\n\nNow, answer the following question based on the "
        "above text, only give me the answer and do not output any other words.\n\nQuestion: {input}\nAnswer:",
        64,
    ),
    "hotpotqa": LongBenchTask(PASSAGES, 32),
    "2wikimqa": LongBenchTask(PASSAGES, 32),
    "musique": LongBenchTask(PASSAGES, 32),
    "gov_report": LongBenchTask(
        "You are given a report by a government agency. Write a one-page summary of the report.\n\nReport:\n{context}"
        "\n\nNow, write a one-page summary of the report.\n\nSummary:",
        512, "rouge",
    ),
    "qmsum": LongBenchTask(
        "You are given a meeting transcript and a query containing a question or instruction. Answer the query in one "
        "or more sentences.\n\nTranscript:\n{context}\n\nNow, answer the query based on the above meeting transcript "
        "in one or more sentences.\n\nQuery: {input}\nAnswer:",
        512, "rouge",
    ),
    "multi_news": LongBenchTask(
        "You are given several news passages. Write a one-page summary of all news. \n\nNews:\n{context}\n\nNow, write "
        "a one-page summary of all the news.\n\nSummary:",
        512, "rouge",
    ),
    "trec": LongBenchTask(
        "Please determine the type of the question below. Here are some examples of questions.\n\n{context}\n{input}",
        64, "classes", chat=False, one_line=True,
    ),
    "triviaqa": LongBenchTask(
        "Answer the question based on the given passage. Only give me the answer and do not output any other words. "
        "The following are some examples.\n\n{context}\n\n{input}",
        32, chat=False, one_line=True,
    ),
    "samsum": LongBenchTask(
        "Summarize the dialogue into a few short sentences. The following are some examples.\n\n{context}\n\n{input}",
        128, "rouge", chat=False, one_line=True,
    ),
    "lsht": LongBenchTask(
        "请判断给定新闻的类别，下面是一些例子。\n\n{context}\n{input}", 64, "classes", chat=False, one_line=True
    ),
    "passage_count": LongBenchTask(
        "There are some paragraphs below sourced from Wikipedia. Some of them may be duplicates. Please carefully read "
        "these paragraphs and determine how many unique paragraphs there are after removing duplicates. In other "
        "words, how many non-repeating paragraphs are there in total?\n\n{context}\n\nPlease enter the final count of "
        "unique paragraphs after removing duplicates. The output format should only contain the number, such as 1, 2, "
        "3, and so on.\n\nThe final answer is: ",
        32, "numbers",
    ),
    "passage_retrieval_en": LongBenchTask(
        "Here are 30 paragraphs from Wikipedia, along with an abstract. Please determine which paragraph the abstract "
        "is from.\n\n{context}\n\nThe following is an abstract.\n\n{input}\n\nPlease enter the number of the paragraph "
        'that the abstract is from. The answer format must be like "Paragraph 1", "Paragraph 2", etc.\n\n'
        "The answer is: ",
        32, "numbers",
    ),
    "passage_retrieval_zh": LongBenchTask(
        "以下是若干段落文字，以及其中一个段落的摘要。请确定给定的摘要出自哪一段。\n\n{context}\n\n下面是一个摘要\n\n{input}\n\n"
        '请输入摘要所属段落的编号。答案格式必须是"段落1"，"段落2"等格式\n\n答案是：',
        32, "numbers",
    ),
    "lcc": LongBenchTask(
        "Please complete the code given below. \n{context}Next line of code:\n", 64, "edit similarity", False
    ),
    "repobench-p": LongBenchTask(
        "Please complete the code given below. \n{context}{input}Next line of code:\n", 64, "edit similarity", False
    ),
}  # fmt: skip


def make_prompts(paths: Sequence[Path], max_tokens: int | None = None) -> list[Prompt]:
    """The prompts of LongBench's files.

    Args:
        paths: files of JSON lines; a line has `input`, `context`, `answers`, and `dataset` if the file is not named
            after its task. A file whose name ends with `_e` is scored as in LongBench-E, by length.
        max_tokens: of an answer, instead of the benchmark's budget for the task.

    Raises:
        MissingFileError: there is no such file.
        UsageError: a task is unknown, or a line is wrong.
    """
    prompts: dict[tuple[str, str], Prompt] = {}
    for path in paths:
        by_length = path.stem.endswith("_e")
        for number, entry in read_lines(path, {"input": str, "context": str, "answers": list}):
            where = f"{path}, line {number}"
            prompt = _prompt(where, path.stem, str(number), entry, max_tokens, by_length)
            if (prompt.task, prompt.id) in prompts:
                raise UsageError(f"{where}: another file is of the same task, {prompt.task}", option="data")
            prompts[prompt.task, prompt.id] = prompt
    return list(prompts.values())


def _prompt(where: str, stem: str, number: str, entry: Record, max_tokens: int | None, by_length: bool) -> Prompt:
    name = str(entry.get("dataset") or stem).removesuffix("_e")
    task = _task(where, name)
    saved: Record = {"metric": task.metric, "references": entry["answers"]}
    if task.metric == "classes":
        check_field(where, entry, "all_classes", list, option="data")
        saved["classes"] = entry["all_classes"]
    if by_length:
        check_field(where, entry, "length", int, option="data")
        saved["bracket"] = next((bracket for limit, bracket in BRACKETS if entry["length"] < limit), "8k+")
    before, after = (part.replace("{input}", entry["input"]) for part in task.prompt.split("{context}"))
    name, budget = name + "_e" * by_length, max_tokens or task.budget
    parts = before, entry["context"], after
    return Prompt(name, number, *parts, budget, saved, chat=task.chat, one_line=task.one_line)


def _task(where: str, name: str) -> LongBenchTask:
    if name in SEGMENTED:
        why = "is scored by Chinese words, which need a segmenter: use lm-eval's longbench"
        raise UsageError(f"{where}: {name} {why}", option="data")
    if name not in TASKS:
        raise UsageError(f"{where}: no task is named {name!r}; known are {', '.join(TASKS)}", option="data")
    return TASKS[name]


def score(line: Record) -> dict[str, float]:
    """The score of an answer, 0 to 1: the highest over its references.

    Source: LongBench/eval.py, scorer and scorer_e.
    """
    said = line["prediction"]
    if TASKS[line["task"].removesuffix("_e")].one_line:
        said = said.lstrip("\n").split("\n")[0]
    if line["metric"] == "classes":
        values = [scorers.classification(said, reference, line["classes"]) for reference in line["references"]]
    else:
        values = [METRICS[line["metric"]](said, reference) for reference in line["references"]]
    return {str(line.get("bracket", line["metric"])): max(values)}


def summary(lines: Sequence[Record]) -> list[Record]:
    """A row for each task, in percent; a score of LongBench-E is the mean over its three lengths."""
    return summarize(lines, score)
