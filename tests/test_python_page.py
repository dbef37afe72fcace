"""docs/python.md, run as it stands there on the run of docs/own_data.md."""

import re

from recipes import ROOT, blocks, shell


def test_the_page_runs_from_top_to_bottom(tmp_path):
    (tmp_path / "run.py").symlink_to(ROOT / "run.py")
    ((name, text),) = blocks("own_data.md", "file")
    (tmp_path / name).write_text(text)
    for _, commands in blocks("own_data.md", "run"):
        done = shell(commands, tmp_path)
        assert done.returncode == 0, done.stderr
    parts = [code for _, code in blocks("python.md", "python")]
    assert len(parts) == (ROOT / "docs" / "python.md").read_text().count("```python")
    (tmp_path / "page.py").write_text("\n".join(parts))
    done = shell("python -W error page.py", tmp_path)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    # What the page says is printed.
    assert "(2, 16)" in lines
    assert "ids, row 1, column 1: is 300, but must be from 0 to 299" in lines
    before, after = map(float, re.search(r"loss (\S+) -> (\S+)", done.stdout).groups())
    assert after < before - 0.1
