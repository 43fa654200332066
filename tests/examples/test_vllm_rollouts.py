"""The command line of the study of rollouts from vLLM; `.ci/vllm` runs the study."""

import pytest
from vllm_rollouts import parse_arguments


def test_each_command_has_the_options_that_it_reads() -> None:
    assert vars(parse_arguments(["prepare", "out"])) == {"command": "prepare", "folder": "out"}
    train = parse_arguments(["train", "out", "--r", "4", "--dtype", "bfloat16", "--steps", "2"])
    assert (train.r, train.dtype, train.steps) == (4, "bfloat16", 2)
    for wrong in (["prepare", "out", "--r", "4"], ["sync", "out", "--steps", "2"], ["sync"], ["measure", "out"], []):
        with pytest.raises(SystemExit):
            parse_arguments(wrong)
