"""L-Eval (An et al. 2023, arXiv 2307.11088): its files, prompts and metrics.

Sources: OpenLMLab/LEval at cd34b05, Baselines/LEval_config.py and llama2-chat-test.py (prompts, which are the
benchmark's own words), Evaluation/auto_eval.py (how each answer is scored). What differs here:

- The system prompt is the beginning of the user's message: not every chat template has a system role.
- Documents are cut until prompt and answer fit into the context; L-Eval counts only document and answer.
- GSM's and CodeU's messages end like all others; L-Eval leaves out LLaMA-2's [/INST].
- The second question of SFiction, about the real world, uses the chat template.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from ..errors import UsageError
from ..run_log import Record
from . import scorers
from .answers import summarize
from .prompts import Prompt, read_lines

KIND = "leval"
BUDGET = 512  # tokens of an answer
METRICS, SKIPPED = ("exam", "f1", "rouge"), ("human", "LLM")  # values of a document's `evaluation`
CLOSED = (
    "Now you are given a very long document. Please follow the instruction based on this document. For multi-choice "
    "questions, there is only a sinlge correct option. Please only provide the letter corresponding to the answer "
    "(like A or B) when answering. For other questions, please directly give the concise and accurate answer. "
)
OPEN = (
    "Now you are given a very long document. Please follow the instruction after this document. These instructions may "
    "include summarizing a document, answering questions based on the document, or writing a required paragraph. "
)
STORY = "based on the world described in the document."
FACTS = "based on the real-world knowledge and facts up until your last training"
ANSWER_DIRECTLY = "Please directly answer without any additional output or explanation. "
DIRECTLY = "Please directly give the answer without any additional output or explanation "


@dataclass(frozen=True)
class LEvalTask:
    """A closed-ended task.

    Args:
        system: the beginning of the prompt.
        score: of an answer and its reference.
        plain: the prompt has no words around document and question.
        keep_end: cut the beginning of a long document.
        parts: names of its consecutive questions, if the score is the mean over these names.
    """

    system: str
    score: Callable[[str, str], float]
    plain: bool = False
    keep_end: bool = False
    parts: tuple[str, ...] = ()


TASKS = {
    "coursera": LEvalTask(
        "Now you are given a very long document. Please follow the instruction based on this document. For "
        "multi-choice questions, there could be a sinlge correct option or multiple correct options. Please only "
        "provide the letter corresponding to the answer (like A or AB) when answering. ",
        scorers.letters_choice,
    ),
    "quality": LEvalTask(CLOSED, scorers.letter_choice),
    "tpo": LEvalTask(CLOSED, scorers.letter_choice),
    "gsm100": LEvalTask(
        "Given several question answer pairs, you need to follow a similar format to answer the last question. Make "
        "sure the response is end with The answer is _ . ",
        scorers.last_number,
        plain=True,
    ),
    "topic_retrieval_longchat": LEvalTask(
        "Below is a record of our previous conversation on many different topics. You are the ASSISTANT, and I am the "
        "USER. At the beginning of each topic, the USER will say 'I would like to discuss the topic of <TOPIC>'. "
        "Memorize each <TOPIC>. At the end of the record, I will ask you to retrieve the first/second/third topic "
        "names. Now the record start. ",
        scorers.exact_match,
        plain=True,
        parts=("first", "second", "third"),
    ),
    "codeU": LEvalTask(
        "Now you are given a code base consisting of a large amount of functions and the corresponding comments. In "
        "the end, I will call some functions defined in the code base. Please carefully read these codes and comments "
        "and answer the question.",
        scorers.code_output,
        plain=True,
        keep_end=True,
    ),
    "sci_fi": LEvalTask(
        "Now you are given a scientific fiction. I will ask you some questions and the answer should be \"True\" or "
        "\"False\". Notice that you should answer the question based on the evidence in the document instead of your "
        "background knowledge.",
        scorers.truth,
        parts=("loyalty",),
    ),
}  # fmt: skip
OPEN_TASKS = (
    "financial_qa", "gov_report_summ", "legal_contract_qa", "meeting_summ", "multidoc_qa", "narrative_qa",
    "natural_question", "news_summ", "paper_assistant", "patent_summ", "review_summ", "scientific_qa", "tv_show_summ",
)  # fmt: skip


def make_prompts(paths: Sequence[Path], max_tokens: int | None = None) -> list[Prompt]:
    """The prompts of L-Eval's files.

    Args:
        paths: files of JSON lines, named after their task; a line has `input`, `instructions`, `outputs`, `evaluation`.
        max_tokens: of an answer, instead of the benchmark's 512.

    Raises:
        MissingFileError: there is no such file.
        UsageError: a file is not named after a task, or a line is wrong.
    """
    prompts: list[Prompt] = []
    seen: dict[str, Path] = {}
    for path in paths:
        task = path.stem
        if task not in TASKS and task not in OPEN_TASKS:
            known = ", ".join((*TASKS, *OPEN_TASKS))
            raise UsageError(f"{path} must be named after its task, one of {known}", option="data")
        if task in seen:
            raise UsageError(f"{path} and {seen[task]} are of the same task", option="data")
        seen[task] = path
        fields = {"input": str, "instructions": list, "outputs": list, "evaluation": str}
        for number, entry in read_lines(path, fields):
            _check(f"{path}, line {number}", task, entry)
            if entry["evaluation"] not in SKIPPED:
                prompts += _document_prompts(task, number, entry, max_tokens or BUDGET)
    if not prompts:
        skipped = " and ".join(SKIPPED)
        raise UsageError(f"no question is left: those that need {skipped} as judges are not asked", option="data")
    return prompts


def _check(where: str, task: str, entry: Record) -> None:
    questions, references, metric = len(entry["instructions"]), len(entry["outputs"]), entry["evaluation"]
    if questions != references:
        raise UsageError(f"{where} has {questions} instructions and {references} outputs", option="data")
    if metric not in (*METRICS, *SKIPPED) or (task in TASKS) != (metric == "exam"):
        raise UsageError(f"{where}: {task} has no evaluation {metric!r}", option="data")


def _document_prompts(task: str, document: int, entry: Record, budget: int) -> list[Prompt]:
    """All questions on a document; SFiction's are also asked about the real world, without the document."""
    found = []
    known = TASKS.get(task, LEvalTask(OPEN, scorers.f1))
    before = known.system + "\n\n" + ("" if known.plain else "Document is as follows. ")
    for i, (question, reference) in enumerate(zip(entry["instructions"], entry["outputs"], strict=True)):
        saved: Record = {"metric": entry["evaluation"], "reference": reference}
        if known.parts:
            saved["part"] = known.parts[i % len(known.parts)]
        name, start, fact = f"{document}.{i + 1}", "", ""
        if task == "sci_fi":
            saved["reference"], fact = _judgments(reference)
        if known.plain:
            after = "\n\n" + question
        elif task in TASKS:
            after, start = f" \nQuestion: {question}.  {DIRECTLY}", "\nAnswer:"
        else:
            after = f" Instruction: {question} \nAnswer this question with {len(reference.split())} words."
        document_text = entry["input"]
        found.append(
            Prompt(task, name, before, document_text, after, budget, saved, start=start, keep_end=known.keep_end)
        )
        if fact:
            text, more = question.replace(STORY, FACTS) + ANSWER_DIRECTLY, saved | {"reference": fact, "part": "fact"}
            found.append(Prompt(task, f"{name} fact", text, "", "", budget, more, start="\nAnswer:"))
    return found


def _judgments(reference: str) -> tuple[str, str]:
    """The references in the story and in the real world, e.g. of `True [fact: False]`."""
    story, _, fact = reference.partition("[fact:")
    return story.strip(), fact.strip(" ]")


def score(line: Record) -> dict[str, float]:
    """The scores of an answer by each measure of its task, 0 to 1."""
    said, reference = line["prediction"], line["reference"]
    if line["metric"] == "f1":
        return {"f1": scorers.f1(said, reference)}
    if line["metric"] == "rouge":
        grams = {f"rouge{n}": scorers.rouge_n(said, reference, n) for n in (1, 2)}
        return grams | {"rougeL": scorers.rouge_l(said, reference)}
    return {line.get("part", "exam"): TASKS[line["task"]].score(said, reference)}


def summary(lines: Sequence[Record]) -> list[Record]:
    """A row for each task, in percent: the geometric mean of the three ROUGE scores, the mean of a task's parts.

    Source: L-Eval's Evaluation/auto_eval.py, DATASET_TO_METRICS and its last lines.
    """
    return summarize(lines, score, ("task", "metric"), _combine)


def _combine(means: dict[str, float]) -> float:
    if "rougeL" in means:
        return float((means["rouge1"] * means["rouge2"] * means["rougeL"]) ** (1 / 3))
    return fmean(means.values())
