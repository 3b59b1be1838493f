"""`--ramp` of PosGen's commands: in training and in sweeps, and for weights that were trained with another."""

import json

from .test_posgen_commands import TRAIN


def test_weights_are_read_with_another_ramp(run, tmp_path) -> None:
    assert run(*TRAIN, tmp_path / "r")[0] == 0
    found = [
        json.loads(run("posgen", "eval", tmp_path / "r", *ramp, "--json")[1])
        for ramp in ((), ("--ramp", "13"), ("--ramp", "97"))
    ]
    assert found[0] == found[1] and [line["ramp"] for line in found] == [13, 13, 97]
    assert [line["settings"]["ramps"] for line in found] == [[13], [13], [97]] and "last" not in found[0]
    code, _, err = run("posgen", "eval", tmp_path / "r", "--encoding", "ntk", "--ramp", "13")
    assert code == 2 and "ramp must be given for YaRN alone, got 13" in err


def test_ramps_are_chosen_when_training(run, tmp_path) -> None:
    """A sweep takes several; they are in its settings, so that another one is refused."""
    sweep = f"posgen sweep --preset smoke --seeds 1 --subtask cot --output {tmp_path / 's.jsonl'}".split()
    found = json.loads(run(*sweep, "--encoding", "yarn", "--ramp", "97", "--ramp", "13", "--ramp", "97", "--json")[1])
    assert list(found["table"]["cot"]) == ["yarn/13", "yarn/97"] and found["results"] == 2
    header = json.loads((tmp_path / "s.jsonl").read_text().splitlines()[0])
    assert header["settings"]["ramps"] == [97, 13]
    code, _, err = run(*sweep, "--encoding", "yarn")
    assert code == 2 and "ramps" in err
    code, _, err = run(*sweep, "--encoding", "ntk", "--ramp", "97")
    assert code == 2 and "ramp must be given for YaRN alone, got 97" in err
    code, _, err = run("posgen", "sweep", "--preset", "smoke", "--ramp", "1", "--output", tmp_path / "one.jsonl")
    assert code == 2 and "--ramp" in err and not (tmp_path / "one.jsonl").exists()
    assert run(*TRAIN, tmp_path / "r", "--ramp", "97")[0] == 0
    assert json.loads(run("posgen", "eval", tmp_path / "r", "--json")[1])["ramp"] == 97
    code, _, err = run(
        "posgen", "train", "--subtask", "cot", "--encoding", "rope", "--ramp", "9", "--output", tmp_path / "n"
    )
    assert code == 2 and "ramp must be given for YaRN alone, got 9" in err and not (tmp_path / "n").exists()
