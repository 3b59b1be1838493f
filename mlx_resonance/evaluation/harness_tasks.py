"""lm-eval's tasks: found fast, loaded with metadata and consent, limited by length, averaged by length."""

# lm-eval has no types, and is an extra:
# mypy: disable-error-code="import-untyped,import-not-found", allow-subclassing-any
from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from ..checkpoint import Checkpoint
from ..errors import MissingFileError, UsageError, check_option
from ..files import MAX_INDEX, read_json
from ..release import install_hint
from ..rope_types import LONGEST
from ..run_log import Record
from .own_files import LENGTHS, TOKENIZER
from .suites import SUITES

try:
    import lm_eval.tasks
    from lm_eval.tasks import TaskManager
except ModuleNotFoundError as error:
    raise UsageError(f"{error.name} is missing: {install_hint('eval')}") from None

OURS = Path(__file__).parent / "tasks"
LMEVALS = Path(lm_eval.tasks.__file__).parent
LONG = ("babilong", "graphwalks", "infinitebench", "longbench", "longbench2", "ruler")  # folders of long tasks
IN_EXTRA = ("fuzzywuzzy", "jieba", "nltk", "rouge", "rouge_score", "wonderwords")  # eval-long
ENDLESS = 1024  # tokens; lm-eval looks for shorter word lists and variables for ever
WITHOUT_LENGTH = -1  # RULER's score of a row at the lengths that are not its own


class Tasks(TaskManager):
    """lm-eval's tasks, with errors of one line, the first documents of each length, and consent for code.

    Args:
        metadata: passed to the tasks that make or read their own data.
        limit: ask only the first documents of each task and length.
        unsafe: run tasks that execute what the model writes.
        chat: whether prompts will go through the chat template.
        options: of lm-eval's class.

    Attributes:
        chosen: the numbers of the documents to ask, by task; lm-eval looks into it once the tasks are loaded.
    """

    def __init__(
        self,
        metadata: Record | None = None,
        limit: int | None = None,
        unsafe: bool = False,
        chat: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(metadata=metadata, **options)
        self.limit, self.unsafe, self.chat, self.chosen = limit, unsafe, chat, dict[str, list[int]]()

    def load(self, task_list: Any) -> Any:
        """The tasks of these names. Raises UsageError where one cannot be loaded."""
        try:
            loaded = super().load(task_list)
        except (OSError, ValueError):  # no network, no such file, …
            raise
        except Exception as error:
            missing = getattr(error, "name", None) or getattr(error.__cause__, "name", None)
            if isinstance(error, ImportError) and missing in IN_EXTRA:
                raise UsageError(f"{missing} is missing: {install_hint('eval-long')}") from None
            if TOKENIZER not in (self.metadata or {TOKENIZER: ""}) and "okenizer" in str(error):
                why = "a task would run the code that comes with the tokenizer (auto_map)"
                raise UsageError(why, remedies=[{"trust_remote_code": True}]) from None
            why = f"a task cannot be loaded: {type(error).__name__}: {error}"
            raise UsageError(why, option="tasks") from None
        makers = [task for task in loaded["tasks"].values() if getattr(task.config, "custom_dataset", None)]
        if LENGTHS in (self.metadata or {}) and not makers:
            raise UsageError("none of these tasks comes in several lengths", option="lengths")
        for name, task in loaded["tasks"].items():
            if getattr(task, "UNSAFE_CODE", False) and not self.unsafe:
                consent = {"confirm_run_unsafe_code": True}
                raise UsageError(f"{name} runs code that the model writes", remedies=[consent])
            if self.chat and (task.config.metadata or {}).get("rendered"):
                raise UsageError(f"the prompts of {name} are chats already", option="apply_chat_template")
            if self.limit is not None:
                self.chosen[name] = first_of_each_length(task.eval_docs, self.limit)
        return loaded


def first_of_each_length(documents: Any, limit: int) -> list[int]:
    """The numbers of the first documents, up to a limit for each `max_length`, which RULER's rows have."""
    columns = getattr(documents, "column_names", None)
    if columns is not None and "max_length" not in columns:
        return list(range(min(limit, len(documents))))
    lengths = documents["max_length"] if columns else [document.get("max_length") for document in documents]
    seen, chosen = Counter[Any](), []
    for number, length in enumerate(lengths):
        seen[length] += 1
        if seen[length] <= limit:
            chosen.append(number)
    return chosen


def find_tasks(names: Sequence[str], include_path: Path | None, **options: Any) -> Tasks:
    """The task manager that knows tasks of these names.

    Args:
        names: of tasks, groups or tags.
        include_path: a folder with more tasks.
        options: of `Tasks`.

    Raises:
        UsageError: a task or the folder does not exist.
    """
    if include_path is not None and not include_path.is_dir():
        raise MissingFileError(f"{include_path} is not a folder of tasks", option="include_path")
    own = [OURS, *([] if include_path is None else [include_path])]
    few = Tasks(include_path=[*(LMEVALS / name for name in LONG), *own], include_defaults=False, **options)
    if set(names) <= {*few.all_subtasks, *LONG, *(tasks for tasks, _ in SUITES.values())}:
        return few  # all of lm-eval's take half a minute to read
    manager = Tasks(include_path=own, **options)
    for name in names:
        if not manager.match_tasks([name]):
            raise UsageError(f"lm-eval has no task named {name!r}", option="tasks")
    return manager


def complete_metadata(
    metadata: Mapping[str, Any] | None,
    lengths: Sequence[int] | None,
    names: Sequence[str],
    checkpoint: Checkpoint,
    trusted: bool,
) -> Record:
    """lm-eval's metadata, with lengths as the tasks want them, and a tokenizer.

    RULER and others load the tokenizer together with the code that comes with it: without consent, they get none that
    has any.

    Args:
        metadata: as the user gave it.
        lengths: tokens of prompts.
        names: of the tasks.
        checkpoint: its folder has the tokenizer.
        trusted: whether code that comes with a tokenizer may run.

    Raises:
        UsageError: lengths are given twice, are out of range, or are too many for a task.
    """
    complete = dict(metadata or {})
    if lengths is not None:
        if LENGTHS in complete:
            raise UsageError(f"lengths are given twice: {LENGTHS} in metadata has some, too", option="lengths")
        check_lengths(lengths)
        complete[LENGTHS] = sorted(lengths)
        if any(name.startswith("babilong") for name in names):
            complete[LENGTHS] = _thousands(lengths, names)
    if min(lengths_in(complete), default=ENDLESS) < ENDLESS and set(names) & {"ruler", "ruler_cwe", "ruler_vt"}:
        why = f"RULER makes no prompts of less than {ENDLESS} tokens: it would not end"
        raise UsageError(why, option="lengths")
    complete.setdefault(TOKENIZER, str(checkpoint.folder))
    if not (trusted or _has_no_code(Path(str(complete[TOKENIZER])))):
        del complete[TOKENIZER]
    return complete


def check_lengths(lengths: Sequence[int]) -> None:
    """Raise UsageError where lengths, in tokens, are out of range."""
    right = bool(lengths) and all(1 <= length <= LONGEST for length in lengths)
    check_option("lengths", right, "in [1, 2**31] tokens", list(lengths))


def _thousands(lengths: Sequence[int], names: Sequence[str]) -> str:
    """The one length of babilong's files, such as 4k."""
    if len(lengths) > 1 or not all(name.startswith("babilong") for name in names):
        raise UsageError("babilong takes one length, and no other tasks beside it", option="lengths")
    if lengths[0] % 1024:
        raise UsageError(f"babilong has lengths of 1024, 2048, 4096, …, not {lengths[0]}", option="lengths")
    return f"{lengths[0] // 1024}k"


def _has_no_code(folder: Path) -> bool:
    """Whether loading a tokenizer from here runs none of its own; of a name on the hub, nobody knows."""
    configs = (folder / "config.json", folder / "tokenizer_config.json")
    return folder.is_dir() and not any("auto_map" in read_json(path, MAX_INDEX) for path in configs if path.is_file())


def lengths_in(metadata: Mapping[str, Any]) -> list[int]:
    """The lengths that metadata ask for, in tokens; empty if they are not numbers."""
    lengths = metadata.get(LENGTHS)
    return lengths if isinstance(lengths, list) and all(type(length) is int for length in lengths) else []


def add_means(result: Record) -> None:
    """Put the scores by length of tasks and groups into lm-eval's result: it averages one length only.

    `lengths` has, by length, the score of each task and their mean.
    """
    results, table = result["results"], dict[str, dict[str, float]]()
    for name, metrics in results.items():
        for key in [key for key in metrics if key.partition(",")[0].isdecimal()]:
            length, _, kind = key.partition(",")
            if metrics[key] == WITHOUT_LENGTH or name not in result["configs"]:
                for of in (results[name], result.get("groups", {}).get(name, {})):
                    of.pop(key, None), of.pop(f"{length}_stderr,{kind}", None)
            else:
                table.setdefault(length, {})[name] = metrics[key]
    table = {length: table[length] for length in sorted(table, key=int)}
    for group, of in result.get("groups", {}).items():
        for length, scores in table.items():
            inside = [scores[task] for task in leaves(result["group_subtasks"], group) if task in scores]
            if inside:
                results[group][f"{length},none"] = of[f"{length},none"] = fmean(inside)
    if table:
        result["lengths"] = {length: {"mean": fmean(scores.values())} | scores for length, scores in table.items()}


def leaves(children: Mapping[str, Sequence[str]], name: str) -> list[str]:
    """The tasks of a group, those of its groups included."""
    return [leaf for child in children[name] for leaf in leaves(children, child)] if name in children else [name]
