"""PosGen's rows as the paper defines them, token by token: the other side of the tests of tasks and data."""

import hashlib
import math

import numpy as np


def sha256(rows):
    assert rows.dtype == np.int32
    return hashlib.sha256(rows.astype("<i4").tobytes(order="C")).hexdigest()


def distinct(rows):
    return {row.tobytes() for row in rows}


def plain_result(arithmetic, total, modulus):
    if arithmetic == "mod_addition":
        return total % modulus
    if arithmetic == "pow_sin":
        return math.floor(math.sin(total) ** 2 * modulus)
    # The order of operations matters: with modulus 12, 7 gives 5, in another order 6.
    return math.floor(abs(math.sin(2 * math.pi * (total % modulus) / modulus)) * modulus)


def plain_row(task, seed, length):
    """The paper's definition, token by token."""
    row = [int(token) for token in seed]
    window = produced = 0
    while len(row) < length:
        before_near = len(row) - task.near
        if task.subtask == "recursive":
            far = row[before_near - task.far : before_near]
        elif task.subtask == "cot":
            far = row[: task.far]
        else:
            far = row[window : window + task.far]
        row.append(plain_result(task.arithmetic, sum(row[before_near:]) + sum(far), task.modulus))
        produced += 1
        if produced % 2 == 0:
            window += 1
    return row


def plain_rows(task, seeds, length):
    return [plain_row(task, seed, length) for seed in seeds]
