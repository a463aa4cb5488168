"""What is written in two places says the same in both."""

import re

import pytest
from conftest import CONTINUOUS, ROOT, TWINS


@pytest.mark.parametrize("family", [TWINS, CONTINUOUS], ids=["atari", "continuous"])
def test_every_deviation_has_its_row_and_every_row_its_deviation(family):
    baseline, sprig = family
    in_code = set(re.findall(r"# DEVIATION: row (\d+)", (ROOT / f"{sprig}.py").read_text()))
    rows = re.findall(r"^\| (\d+) \|.*\| (yes|no) \|$", (ROOT / "docs" / "paper.md").read_text(), re.M)
    assert [int(row) for row, _ in rows] == list(range(1, 12))
    assert in_code == {row for row, marked in rows if marked == "yes"}
    assert "DEVIATION" not in (ROOT / f"{baseline}.py").read_text()


@pytest.mark.parametrize("document", ["README.md", "docs/paper.md", "docs/results.md", "docs/speed.md"])
def test_documents_name_only_what_exists(document):
    text = (ROOT / document).read_text()
    code = "".join(path.read_text() for path in [*ROOT.glob("*.py"), *ROOT.glob("*/*.py"), *ROOT.glob("*/*/*.py")])
    flags = {f"--{name.replace('_', '-')}" for name in re.findall(r"^    (\w+): ", code, re.M)}
    flags |= {"--help", "--logdir", "--dist", "--array"}  # others'
    unknown = [name for name in re.findall(r"`(\w+)`", text) if not re.search(rf"\b{name}\b", code)]
    unknown += [f for f in re.findall(r"(?<!\S)`?(--[a-z][a-z-]+)", text) if not {f, f.replace("--no-", "--")} & flags]
    links = re.findall(r"\]\((?!http)([^)#]+)\)", text)
    unknown += [target for target in links if not ((ROOT / document).parent / target).exists()]
    assert not unknown, f"{document} names {unknown}"
