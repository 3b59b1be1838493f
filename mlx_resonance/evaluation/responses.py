"""Responses to lm-eval's requests, in a run log from which a killed run resumes."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from ..run_log import Record, RunLog, not_a_run_log
from ..storage import check_output

KIND = "harness"
KEY = ("request", "digest", "repeat")
FIELDS = {"request": str, "digest": str, "repeat": int, "truncated": int}
RESPONSES = {"loglikelihood": list, "loglikelihood_rolling": float, "generate_until": str, "result": dict}

Key = tuple[str, str, int]
Response = tuple[int, Any, bool]  # the number of a request, its response, whether its prompt was cut


class Responses:
    """The responses of a checkpoint, each saved as soon as it is computed, if there is a file for them.

    Args:
        output: the file of the run log, keyed by the kind of a request and its arguments; None for no file.
        settings: what all responses have in common.
        about: for the header of a new file.

    Raises:
        UsageError: the file is of other settings, or cannot be written.
    """

    def __init__(
        self, output: Path | None = None, settings: Mapping[str, Any] | None = None, about: Record | None = None
    ) -> None:
        self.output, self.settings, self.about = output, settings or {}, about
        self.asked = self.truncated = 0  # number of requests, and of those whose prompts were cut
        if output is not None:
            check_output(output)
            if output.exists():
                _ = self.log  # other settings are refused now

    @cached_property
    def log(self) -> RunLog:
        """The run log. A new file is made when it is first used: not for requests that are refused."""
        assert self.output is not None
        return RunLog(self.output, KIND, self.settings, about=self.about, key=KEY, fields=FIELDS)

    def respond(
        self, kind: str, arguments: Sequence[Sequence[Any]], compute: Callable[[list[int]], Iterator[list[Response]]]
    ) -> list[Any]:
        """The responses to requests: from the run log, or else computed.

        Args:
            kind: lm-eval's type of the requests.
            arguments: of each request.
            compute: given the numbers of requests, yields the responses that are ready together.
        """
        keys = request_keys(kind, arguments)
        known = {key: record for key in keys if (record := self.find(key)) is not None}
        missing = {key: i for i, key in enumerate(keys) if key not in known}
        for ready in compute(list(missing.values())):
            records = {keys[i]: _record(keys[i], response, cut) for i, response, cut in ready}
            if self.output is not None:
                self.log.append(*records.values())
            known |= records
        self.asked += len(keys)
        self.truncated += sum(known[key]["truncated"] for key in keys)
        return [known[key]["response"] for key in keys]

    def find(self, key: Key) -> Record | None:
        """The record of a request. Raises UsageError where its response is of the wrong type."""
        record = None if self.output is None else self.log.find(*key)
        if record is not None and type(found := record.get("response")) is not RESPONSES[key[0]]:
            raise not_a_run_log(self.log.path, KIND, f"a response to {key[0]} is {found!r:.40}")
        return record

    def add_result(self, tasks: Sequence[str], result: Record) -> None:
        """Append the result of some tasks, unless the run log has the same."""
        key = ("result", ",".join(sorted(tasks)), 0)
        if self.output is not None:
            same = self.find(key)
            if same is None or same["response"].get("results") != result["results"]:
                self.log.append(_record(key, result, self.truncated))


def _record(key: Key, response: Any, truncated: int) -> Record:
    return dict(zip(KEY, key, strict=True)) | {"truncated": int(truncated), "response": response}


def request_keys(kind: str, arguments: Sequence[Sequence[Any]]) -> list[Key]:
    """What identifies requests: their kind, a digest of their arguments, and for sampled answers the repetition."""
    seen: Counter[str] = Counter()
    keys = []
    for of_one in arguments:
        text = json.dumps(list(of_one), sort_keys=True, default=str)
        digest = hashlib.sha256(text.encode()).hexdigest()[:32]
        sampled = kind == "generate_until" and temperature(of_one[1]) > 0
        keys.append((kind, digest, seen[digest] if sampled else 0))
        seen[digest] += 1
    return keys


def temperature(options: Mapping[str, Any]) -> float:
    """The sampling temperature that a request asks for; 0 for greedy answers."""
    return float(options.get("temperature") or 0) if options.get("do_sample") is not False else 0.0
