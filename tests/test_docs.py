"""What is written in two places says the same in both."""

import re
import sys
import tomllib
from importlib.metadata import packages_distributions

import pytest
from conftest import CONTINUOUS, ROOT, TWINS

SCRIPTS = [*TWINS, *CONTINUOUS, "sprig_tabular"]


def inline_dependencies(name):
    block = re.search(r"^# /// script\n(.*?)^# ///$", (ROOT / f"{name}.py").read_text(), re.M | re.S).group(1)
    return tomllib.loads(re.sub(r"^# ?", "", block, flags=re.M))["dependencies"]


def normal(package):
    return package.lower().replace("_", "-")


@pytest.mark.parametrize("name", SCRIPTS)
def test_inline_metadata_pins_what_requirements_pin(name):
    dependencies = inline_dependencies(name)
    required = (ROOT / "requirements.txt").read_text().split()
    assert dependencies == [pin for pin in required if pin in dependencies]
    assert all("==" in dependency for dependency in dependencies)
    text = (ROOT / f"{name}.py").read_text()
    imported = set(re.findall(r"^ *(?:import|from) (\w+)", text, re.M)) - set(sys.stdlib_module_names)
    pinned = {normal(dependency.split("==")[0]) for dependency in dependencies}
    for package in imported - {"wandb"}:  # which is optional
        assert pinned & {normal(distribution) for distribution in packages_distributions()[package]}, package


def test_requirements_hold_nothing_that_no_script_asks_for():
    everything = {dependency for name in SCRIPTS for dependency in inline_dependencies(name)}
    assert everything == set((ROOT / "requirements.txt").read_text().split())


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
    code = "".join(path.read_text() for path in [*ROOT.glob("*.py"), *ROOT.glob("*/*.py")])
    for name in re.findall(r"`(\w+)`", text):
        assert re.search(rf"\b{name}\b", code), f"{document} names {name}"
    flags = {f"--{name.replace('_', '-')}" for name in re.findall(r"^    (\w+): ", code, re.M)}
    flags |= {"--help", "--nproc-per-node", "--shutdown-timeout", "--logdir", "--check", "--array", "--dist"}  # others'
    for flag in re.findall(r"(--[a-z][a-z-]+)", text):
        assert flag in flags or flag.replace("--no-", "--") in flags, f"{document} names {flag}"
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", text):
        assert ((ROOT / document).parent / target).exists(), f"{document} links to {target}"


@pytest.mark.parametrize("document", ["README.md", "docs/paper.md", "docs/results.md", "docs/speed.md"])
def test_links_within_a_document_lead_to_its_headings(document):
    text = (ROOT / document).read_text()
    headings = re.findall(r"^#+ (.+)$", text, re.M)
    anchors = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}  # as GitHub does
    links = set(re.findall(r"\]\(#([^)]+)\)", text))
    assert links <= anchors, f"{document} links to {links - anchors}"
    if document == "docs/results.md":  # every question has its short answer at the head
        answered = set(re.findall(r"\[([^]]+)\]\(#", text.replace("\n  ", " ")))
        assert {heading for heading in headings if heading.endswith("?")} <= answered
