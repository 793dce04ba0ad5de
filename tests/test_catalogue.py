"""`clpeft list`: what the heads of the config files say, quickly."""

from __future__ import annotations

import subprocess
import sys
from importlib import metadata
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from clpeft import catalogue as module
from clpeft.catalogue import Option, catalogue, parse_header, show

CONF = Path(__file__).parents[1] / "conf"


@pytest.mark.parametrize(
    ("text", "description", "paper", "use"),
    [
        (
            "# @package strategies.ewc\n# Springs.\n# Paper: K 2017\n# Use: clpeft a=b\nlambda_: 1",
            "Springs.",
            "K 2017",
            "clpeft a=b",
        ),
        ("# What.\n# Use: clpeft\n# Paper: A: B\n", "What.", "A: B", "clpeft"),
        (
            "# What it\n#   is.\n# Paper: One;\n# two\na: 1\n# Use: no",
            "What it is.",
            "One; two",
            "",
        ),
        ("a: 1\n# Not a head", "", "", ""),
        ("", "", "", ""),
    ],
)
def test_parse_header(text: str, description: str, paper: str, use: str) -> None:
    assert parse_header(text) == {"description": description, "paper": paper, "use": use}


def test_every_config_file_is_in_the_catalogue() -> None:
    found = {
        f"{group}/{option.name}" for group, options in catalogue().items() for option in options
    }
    files = {
        str(path.relative_to(CONF).with_suffix(""))
        for path in CONF.rglob("*.yaml")
        if path.parent != CONF
    }
    assert files
    assert files <= found


def test_every_option_of_ours_says_what_it_is_and_how_it_is_used() -> None:
    for group, options in catalogue().items():
        for option in options:
            assert option.description, f"{group}/{option.name}"
            assert option.use.startswith(("clpeft ", "python ")), f"{group}/{option.name}"


def test_an_option_is_told_as_its_file_tells_it() -> None:
    lines = (CONF / "strategy" / "ewc.yaml").read_text().splitlines()
    (ewc,) = [option for option in catalogue()["strategy"] if option.name == "ewc"]
    assert lines[1] == f"# {ewc.description}"
    assert f"# Paper: {ewc.paper}" in lines
    assert f"# Use: {ewc.use}" in lines


def test_groups_come_in_the_order_of_the_main_config() -> None:
    groups = list(catalogue())
    assert groups[:3] == ["model", "peft", "strategy"]


def test_third_parties_are_named_without_being_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    def points(group: str) -> list[metadata.EntryPoint]:
        if group != "clpeft.strategies":
            return []
        return [
            metadata.EntryPoint("fancy", "no_such_package.fancy", group),
            metadata.EntryPoint("ewc", "no_such_package.ewc", group),
        ]

    monkeypatch.setattr(module, "entry_points", points)
    strategies = {option.name: option for option in catalogue()["strategy"]}
    told = "From another package: no_such_package.fancy"
    assert strategies["fancy"] == Option("fancy", told, "", "")
    # ours is not replaced
    assert "another package" not in strategies["ewc"].description


def printed(group: str | None, *, terminal: bool, width: int = 90) -> str:
    stream = StringIO()
    console = Console(file=stream, force_terminal=terminal, width=width, color_system=None)
    assert show(group, console) == 0
    return stream.getvalue()


def test_piped_output_is_one_line_per_option() -> None:
    lines = printed("strategy", terminal=False, width=40).splitlines()
    assert len(lines) == len(catalogue()["strategy"])
    (ewc,) = [line.split("\t") for line in lines if line.startswith("strategy=ewc\t")]
    (option,) = [option for option in catalogue()["strategy"] if option.name == "ewc"]
    assert ewc == ["strategy=ewc", option.description, option.paper, option.use]


def test_a_terminal_gets_tables_no_wider_than_itself() -> None:
    text = printed(None, terminal=True)
    assert "strategy (several compose: strategy=[ewc,replay])" in text
    assert "tiny_llama" in text
    assert "clpeft strategy=ewc" not in text
    assert max(map(len, text.splitlines())) <= 90


def test_one_group_shows_how_each_option_is_used() -> None:
    text = printed("strategy", terminal=True)
    assert "clpeft strategy=ewc" in text
    assert "tiny_llama" not in text


def test_an_unknown_group_is_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert show("strateg") == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(
        "clpeft: There is no config group 'strateg'. Did you mean 'strategy'"
    )


@pytest.mark.parametrize("name", ["clpeft.catalogue", "clpeft.reports"])
def test_importing_it_is_light(name: str) -> None:
    heavy = "{'torch', 'transformers', 'peft', 'datasets', 'matplotlib', 'scipy', 'wandb'}"
    code = f"import sys, {name}; sys.exit(', '.join({heavy} & {{*sys.modules}}) or 0)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr == ""
    assert done.returncode == 0
