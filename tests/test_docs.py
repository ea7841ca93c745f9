"""What the README and docs/ show works: Python blocks run, commands parse."""

import re
import shlex
from pathlib import Path

import jax
import pytest
import tyro

from cluster import cli

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(language):
    found = []
    for page in PAGES:
        for match in re.finditer(rf"```{language}\n(.*?)```", page.read_text(), re.DOTALL):
            line = page.read_text()[: match.start()].count("\n") + 1
            found.append(pytest.param(match.group(1), id=f"{page.name}:{line}"))
    return found


@pytest.mark.parametrize("code", blocks("python"))
def test_python_blocks_run(code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with jax.numpy_rank_promotion("allow"):  # what the tests ask of our code, not of a reader's
        exec(compile(code, "block", "exec"), {"__name__": "__main__"})


@pytest.mark.parametrize("text", blocks("console"))
def test_commands_parse(text):
    lines = re.sub(r"\\\n", " ", text).splitlines()
    commands = [line.split("learned-opt ", 1)[1] for line in lines if "learned-opt " in line]
    for command in commands:
        arguments = shlex.split(command, comments=True)
        tyro.cli(cli._parser(arguments), prog="learned-opt", args=arguments)


def test_links_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\((?!http|#)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
