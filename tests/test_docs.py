"""What is written in two places says the same in both."""

import re
import sys
from importlib.metadata import packages_distributions

import pytest
from conftest import CONTINUOUS, ROOT, TWINS

DOCUMENTS = pytest.mark.parametrize("document", ["README.md", "docs/paper.md", "docs/results.md", "docs/speed.md"])


@pytest.mark.parametrize("name", [*TWINS, *CONTINUOUS, "sprig_tabular"])
def test_requirements_pin_what_the_scripts_import(name):
    pins = {
        pin.split("==")[0].lower() for pin in re.findall(r"^\S+==\S+", (ROOT / "requirements.txt").read_text(), re.M)
    }
    imported = re.findall(r"^ *(?:import|from) (\w+)(?:[\w.]* import .*)?$", (ROOT / f"{name}.py").read_text(), re.M)
    for package in {*imported} - {*sys.stdlib_module_names} - {"wandb", "minatar"}:  # which are optional
        assert pins & {x.lower().replace("_", "-") for x in packages_distributions()[package]}, package


@pytest.mark.parametrize("family", [TWINS, CONTINUOUS], ids=["atari", "continuous"])
def test_every_deviation_has_its_row_and_every_row_its_deviation(family):
    baseline, sprig = family
    in_code = set(re.findall(r"# DEVIATION: row (\d+)", (ROOT / f"{sprig}.py").read_text()))
    rows = re.findall(r"^\| (\d+) \|.*\| (yes|no) \|$", (ROOT / "docs" / "paper.md").read_text(), re.M)
    assert [int(row) for row, _ in rows] == list(range(1, 12))
    assert in_code == {row for row, marked in rows if marked == "yes"}
    assert "DEVIATION" not in (ROOT / f"{baseline}.py").read_text()


@DOCUMENTS
def test_documents_name_only_what_exists(document):
    text = (ROOT / document).read_text()
    code = "".join(path.read_text() for path in [*ROOT.glob("*.py"), *ROOT.glob("*/*.py"), *ROOT.glob("*/*/*.py")])
    flags = {f"--{name.replace('_', '-')}" for name in re.findall(r"^    (\w+): ", code, re.M)}
    flags |= {"--help", "--logdir"}  # others'
    unknown = [name for name in re.findall(r"`(\w+)`", text) if not re.search(rf"\b{name}\b", code)]
    unknown += [f for f in re.findall(r"(?<!\S)`?(--[a-z][a-z-]+)", text) if not {f, f.replace("--no-", "--")} & flags]
    links = re.findall(r"\]\((?!http)([^)#]+)\)", text)
    unknown += [target for target in links if not ((ROOT / document).parent / target).exists()]
    assert not unknown, f"{document} names {unknown}"


@DOCUMENTS
def test_links_within_a_document_lead_to_its_headings(document):
    text = (ROOT / document).read_text()
    headings = re.findall(r"^#+ (.+)$", text, re.M)
    anchors = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}  # as GitHub does
    assert set(re.findall(r"\]\(#([^)]+)\)", text)) <= anchors
