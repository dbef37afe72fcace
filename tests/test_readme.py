"""The README as a newcomer takes it: its commands as they stand there, its code, and where its links lead."""

import re

import pytest
from recipes import ROOT, shell

from data_pipeline.synthetic import SyntheticConfig, write

README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_the_code_is_that_of_the_page_which_a_test_runs():
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert code.strip() in (ROOT / "docs" / "python.md").read_text()


def test_from_a_log_to_an_auc_as_it_says(tmp_path):
    (tmp_path / "run.py").symlink_to(ROOT / "run.py")
    write(SyntheticConfig(out=tmp_path / "logs", rows=7000, days=1), lambda done, total: None)
    (log,) = (tmp_path / "logs").glob("day_*")
    log.rename(tmp_path / "train.txt")
    (commands,) = re.findall(r"```sh\n([^`]*prepare train\.txt[^`]*)```", README)
    done = shell(commands.replace(".venv/bin/", ""), tmp_path)
    assert done.returncode == 0, done.stderr
    assert re.search(r"test AUC 0\.\d+", done.stdout)


def anchors(page):
    """What a forge makes of the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        there = page.parent / name if name else page
        assert there.exists(), target
        assert not anchor or anchor in anchors(there), target
