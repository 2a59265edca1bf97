"""The command line as a whole: help, version, exit codes, and what is said of arguments that make no sense."""

from __future__ import annotations

import argparse
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from gevent import subprocess as gevent_subprocess

import geyamux
from commands.program import run
from geyamux.cli.main import main
from geyamux.cli.parser import COMMANDS, make_parser
from tunnels.running import ENVIRONMENT, GEYAMUX

NAMES = list(COMMANDS)


def parser_of(name: str) -> argparse.ArgumentParser:
    (choices,) = (action.choices for action in make_parser()._actions if isinstance(action.choices, dict))
    return choices[name]


@pytest.mark.parametrize("name", NAMES)
def test_the_help_of_a_command_names_each_option_and_has_examples(name: str):
    out = run(name, "--help").out
    for action in parser_of(name)._actions:
        for option in action.option_strings or [action.metavar]:
            assert re.search(rf"(^|[\s,\[(|]){re.escape(option)}\b", out, re.MULTILINE), option
        assert action.help, f"{action} has no help"
    examples = out.partition("\nexamples:\n")[2].partition("\naddresses:\n")[0]
    assert examples.count(f"geyamux {name} ") >= 2


@pytest.mark.parametrize("name", NAMES)
def test_each_example_of_a_help_is_taken_by_the_parser(name: str):
    text = re.sub(r"\\\n\s+", "", COMMANDS[name].EXAMPLES)
    found = []
    for example in re.findall(r"^(?: *|.*\$ +)geyamux (.+)$", text, re.MULTILINE):
        options, rest = make_parser().parse_known_args(shlex.split(re.split(r"  | \| ", example)[0]))
        found.append(options.command)
        # What it is for may stand behind it.
        assert not any(word.startswith("-") for word in rest), example
    assert found.count(name) >= 2


def test_the_help_names_each_command_and_exit_code():
    out = run("--help").out
    for name in NAMES:
        assert re.search(rf"^ +{name} +\S", out, re.MULTILINE)
    for code in "012":
        assert re.search(rf"^ +{code}  \S", out, re.MULTILINE)


def test_the_version_is_that_of_the_package():
    assert run("--version").out == f"geyamux {geyamux.__version__}\n"


def test_the_console_script_runs_the_same():
    pyproject = (Path(geyamux.__file__).parent.parent / "pyproject.toml").read_text()
    assert re.search(r'^\[project\.scripts\]\ngeyamux = "geyamux\.cli\.main:main"$', pyproject, re.MULTILINE)
    # What an installer makes of that line.
    script = "import sys; from geyamux.cli.main import main; sys.exit(main())"
    done = subprocess.run([sys.executable, "-c", script, "--version"], env=ENVIRONMENT, capture_output=True, check=True)
    assert done.stdout.decode() == f"geyamux {geyamux.__version__}\n"


FORWARD = ["forward", "--listen", "0", "--to", "80"]

NO_SENSE = [
    ([], "the following arguments are required: COMMAND"),
    (["frobnicate"], "invalid choice: 'frobnicate'"),
    (["forward"], "one of the arguments --dial --listen is required"),
    (["forward", "--dial", "1", "--listen", "2", "--to", "3"], "not allowed with argument --dial"),
    (["forward", "--listen", "0"], "one of the arguments --to --from is required"),
    (["forward", "--dial", "nonsense", "--to", "80"], "argument --dial: 'nonsense' is no address"),
    (["forward", "--listen", "exec:cat", "--to", "80"], "--listen: exec: is for --dial"),
    (["forward", "--listen", "0", "--to", "exec:cat"], "--to: exec: is for --dial"),
    (["forward", "--listen", "0", "--from", "exec:cat"], "--from: exec: is for --dial"),
    (["forward", "--dial", "0", "--to", "80"], "--dial: port 0 is for who listens"),
    (["forward", "--dial", "1", "--to", "0"], "--to: port 0 is for who listens"),
    (["forward", "--listen", "stdio:", "--from", "stdio:"], "stdio: can be one end only"),
    (["forward", "--dial", "1", "--to", "stdio:", "--from", "stdio:"], "stdio: can be one end only"),
    ([*FORWARD, "--keepalive", "-1"], "argument --keepalive: '-1' is no number of seconds"),
    ([*FORWARD, "--window", "1K"], "argument --window: must be at least 256K"),
    ([*FORWARD, "--max-streams", "0"], "argument --max-streams: must be at least 1"),
    ([*FORWARD, "--max-streams", "9" * 20], "argument --max-streams: must be at most"),
    ([*FORWARD, "--retry-max-interval", "0"], "argument --retry-max-interval: must be more than 0 seconds"),
    ([*FORWARD, "--max-retries", "many"], "argument --max-retries: 'many' is no count"),
    ([*FORWARD, "--drain", "soon"], "argument --drain: 'soon' is no number of seconds"),
    # As of variables that are not set: nothing may go unprotected because of it.
    ([*FORWARD, "--cert", ""], "argument --cert: no file is named"),
    ([*FORWARD, "--key", ""], "argument --key: no file is named"),
    ([*FORWARD, "--ca", ""], "argument --ca: no file is named"),
    ([*FORWARD, "--control", ""], "argument --control: no file is named"),
    (["forward", "--dial", "1", "--to", "80", "--server-name", ""], "argument --server-name: '' is no name"),
    ([*FORWARD, "--key", "key.pem"], "--key is for a certificate: give --cert, too"),
    ([*FORWARD, "--ca", "ca.pem"], "who listens with TLS needs a certificate: give --cert"),
    ([*FORWARD, "--cert", "x", "--server-name", "relay"], "--server-name is for who dials"),
    (["forward", "--dial", "stdio:", "--to", "80", "--ca", "ca.pem"], "TLS does not go over stdio:"),
    (["forward", "--dial", "exec:cat", "--to", "80", "--ca", "ca.pem"], "TLS does not go over exec:cat"),
    (["forward", "--dial", "unix:/x", "--to", "80", "--ca", "ca.pem"], "give --server-name: the name in the"),
    (["forward", "--dial", ":1", "--to", "80", "--ca", "ca.pem"], "give --server-name: the name in the"),
    ([*FORWARD, "--dry-run"], "unrecognized arguments: --dry-run"),
    (["ping"], "the following arguments are required: ADDR"),
    (["ping", "--ca", "ca.pem", "exec:cat"], "TLS does not go over exec:cat"),
]


@pytest.fixture
def no_logging(monkeypatch: pytest.MonkeyPatch) -> None:
    """The test's process keeps its own."""
    monkeypatch.setattr("geyamux.cli.logs.set_up", lambda *words, **more: None)


@pytest.mark.usefixtures("no_logging")
@pytest.mark.parametrize(("words", "why"), NO_SENSE, ids=[" ".join(words)[:60] for words, _ in NO_SENSE])
def test_arguments_that_make_no_sense_end_it_with_2_and_a_reason(
    words: list[str], why: str, capsys: pytest.CaptureFixture[str]
):
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    *usage, last = err.splitlines()
    assert usage[0].startswith("usage: geyamux") and why in last and ": error: " in last


@pytest.mark.parametrize("words", [NO_SENSE[4][0], NO_SENSE[8][0], NO_SENSE[26][0]], ids=" ".join)
def test_the_process_says_so_too(words: list[str]):
    done = run(*words, code=2)
    assert done.out == "" and "Traceback" not in done.err


FAILURES = [
    ["forward", "--dial", "127.0.0.1:1", "--to", "80", "--max-retries", "0"],
    ["forward", "--dial", "unix:/no/such/place", "--to", "80", "--max-retries", "0"],
    ["forward", "--dial", "127.0.0.1:1", "--to", "80", "--cert", "/no/such/file"],
    ["ping", "127.0.0.1:1"],
    ["bench", "127.0.0.1:1"],
    ["top", "/no/such/socket"],
]


@pytest.mark.parametrize("words", FAILURES, ids=[" ".join(words) for words in FAILURES])
def test_a_failure_ends_it_with_1_and_one_line(words: list[str]):
    done = run(*words, code=1)
    assert done.out == ""
    assert done.err.startswith(f"geyamux {words[0]}: ") and done.err.count("\n") == 1


def test_what_another_says_does_not_steer_the_terminal():
    words = ["forward", "--dial", "unix:/no/\x1b[31m\n", "--to", "80", "--max-retries", "0"]
    err = run(*words, code=1).err
    assert "\x1b" not in err and err.count("\n") == 1 and "\\x1b[31m\\n" in err


def test_a_reader_who_has_seen_enough_ends_it_without_a_word():
    command = f"{shlex.join(GEYAMUX)} forward --help | head -n 1"
    done = gevent_subprocess.run(["/bin/sh", "-c", command], env=ENVIRONMENT, capture_output=True, timeout=20)
    assert done.stdout.startswith(b"usage: ") and done.stderr == b""
