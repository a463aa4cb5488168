"""What is written in two places says the same in both."""

import re
import sys
import tomllib
from importlib.metadata import packages_distributions

import pytest
from conftest import ROOT, TWINS


@pytest.mark.parametrize("name", [*TWINS, "sprig_tabular"])
def test_inline_metadata_pins_what_requirements_pin(name):
    text = (ROOT / f"{name}.py").read_text()
    block = re.search(r"^# /// script\n(.*?)^# ///$", text, re.M | re.S).group(1)
    metadata = tomllib.loads(re.sub(r"^# ?", "", block, flags=re.M))
    pinned = (ROOT / "requirements.txt").read_text().split()
    assert metadata["dependencies"] == [pin for pin in pinned if pin in metadata["dependencies"]]
    assert all("==" in dependency for dependency in metadata["dependencies"])

    imported = set(re.findall(r"^ *(?:import|from) (\w+)", text, re.M)) - set(sys.stdlib_module_names)
    for name in imported - {"wandb"}:  # which is optional
        assert {pin.split("==")[0] for pin in metadata["dependencies"]} & {*packages_distributions()[name]}, name


def test_every_deviation_has_its_row_and_every_row_its_deviation():
    in_code = set(re.findall(r"# DEVIATION: row (\d+)", (ROOT / "sprig_atari.py").read_text()))
    rows = re.findall(r"^\| (\d+) \|.*\| (yes|no) \|$", (ROOT / "docs" / "paper.md").read_text(), re.M)
    assert [int(row) for row, _ in rows] == list(range(1, 11))
    assert in_code == {row for row, marked in rows if marked == "yes"}
    assert "DEVIATION" not in (ROOT / "ppo_atari_baseline.py").read_text()


@pytest.mark.parametrize("document", ["README.md", "docs/paper.md"])
def test_documents_name_only_what_exists(document):
    text = (ROOT / document).read_text()
    code = "".join(path.read_text() for path in [*ROOT.glob("*.py"), *ROOT.glob("*/*.py")])
    for name in re.findall(r"`(\w+)`", text):
        assert re.search(rf"\b{name}\b", code), f"{document} names {name}"
    flags = {f"--{name.replace('_', '-')}" for name in re.findall(r"^    (\w+): ", code, re.M)}
    flags |= {"--help", "--nproc-per-node", "--check"}  # of other programs
    for flag in re.findall(r"(--[a-z][a-z-]+)", text):
        assert flag in flags or flag.replace("--no-", "--") in flags, f"{document} names {flag}"
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", text):
        assert ((ROOT / document).parent / target).exists(), f"{document} links to {target}"
