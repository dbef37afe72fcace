"""A loss of power, at a random moment and right after the end; `python tests/power_loss.py` tries more."""

import subprocess

import power_loss
import pytest


def test_what_has_a_name_after_a_loss_of_power_is_whole():
    try:
        found = list(power_loss.trials(["prepare", "train"], 1))
    except (subprocess.CalledProcessError, FileNotFoundError) as error:
        pytest.skip(f"no file system can be mounted here: {getattr(error, 'stderr', None) or error}")
    assert [how for _, how in found[::2]] == ["ended", "ended"]
    assert len(found) == 4
