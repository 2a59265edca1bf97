"""The manual page is what the parser says, has all that a page has, and is set without a complaint."""

from __future__ import annotations

import argparse
import os
import re
import shutil
import sys
from pathlib import Path

import pytest
from gevent import subprocess

from geyamux.cli.parser import COMMANDS, make_parser

ROOT = Path(__file__).parent.parent.parent
PAGE = ROOT / "man" / "geyamux.1"


def output(*command: str, **environment: str) -> str:
    """What it writes, errors included; it must succeed."""
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=20, env={**os.environ, **environment}
    )
    assert done.returncode == 0, done.stdout.decode()
    return done.stdout.decode()


def need(program: str) -> None:
    if shutil.which(program) is None:
        pytest.skip(f"no {program} (Debian: {'mandoc' if program == 'mandoc' else 'man-db'})")


def rendered() -> str:
    need("mandoc")
    return re.sub(r".\x08", "", output("mandoc", "-T", "utf8", "-O", "width=100", str(PAGE)))


def test_the_page_in_the_tree_is_what_the_parser_says(tmp_path):
    pytest.importorskip("argparse_manpage", reason="argparse-manpage is not installed")
    page = tmp_path / "page"
    # Whatever the terminal and the day.
    written = output(sys.executable, str(ROOT / "scripts/man"), str(page), COLUMNS="50", SOURCE_DATE_EPOCH="0")
    assert written == ""
    assert page.read_text() == PAGE.read_text(), "the page is out of date: run scripts/man"


def test_the_page_has_its_sections_in_order():
    titles = re.findall(r"^[A-Z][A-Z ]+$", rendered(), re.MULTILINE)
    assert titles == [
        "NAME",
        "SYNOPSIS",
        "DESCRIPTION",
        "COMMANDS",
        "OPTIONS",
        "ADDRESSES",
        "EXIT STATUS",
        "SIGNALS",
        "EXAMPLES",
        "SEE ALSO",
    ]


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_of_a_command_is_in_its_part_with_its_help(name):
    commands = next(action for action in make_parser()._actions if isinstance(action, argparse._SubParsersAction))
    part = re.search(rf"^   geyamux {name}$(.+?)^(   )?\w", rendered(), re.MULTILINE | re.DOTALL)
    words = " ".join(part[1].split())
    for action in commands.choices[name]._actions:
        if "--help" not in action.option_strings:
            shown = action.option_strings or [action.metavar]
            assert f"{shown[-1]} " in words
            assert " ".join(action.help.split()) in words


@pytest.mark.parametrize("name", COMMANDS)
def test_the_examples_of_a_command_are_shown_line_by_line(name):
    text = rendered()
    examples = [line.strip() for line in COMMANDS[name].EXAMPLES.splitlines()]
    lines = [line.strip() for line in text[text.index("\nEXAMPLES") :].splitlines()]
    assert [line for line in lines if line in examples] == examples


def test_the_page_is_set_without_a_warning():
    need("mandoc")
    done = subprocess.run(["mandoc", "-T", "lint", "-W", "warning", str(PAGE)], capture_output=True, timeout=20)
    # What has not been released has no date.
    assert [line for line in done.stdout.decode().splitlines() if "missing date" not in line] == []


def test_man_shows_the_page_without_a_warning():
    need("man")
    done = subprocess.run(
        ["man", "--warnings", "-E", "UTF-8", "-l", str(PAGE)],
        capture_output=True,
        timeout=20,
        env={**os.environ, "MANPAGER": "cat", "MANWIDTH": "100", "LC_ALL": "C.UTF-8"},
    )
    assert done.returncode == 0 and done.stderr == b""
    assert b"geyamux ping [options] ADDR" in re.sub(rb".\x08", b"", done.stdout)
