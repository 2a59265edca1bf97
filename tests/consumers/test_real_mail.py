"""smtplib against aiosmtpd and imaplib against Dovecot, over streams: each test plays a scene of a program."""

from __future__ import annotations

import email
import email.policy
import hashlib
from pathlib import Path

import pytest

from .real_runner import need_program, play
from .real_servers import python_servers

pytestmark = pytest.mark.interop


def test_smtplib_sends_mails_one_after_the_other_and_side_by_side():
    with python_servers("smtp") as servers:
        facts = play("real_mail_scenes.py", "smtp", **servers.trunk("smtp"))
        files = Path(servers.directory, "mails").iterdir()
        mails = [email.message_from_bytes(file.read_bytes(), policy=email.policy.default) for file in files]
    assert (facts["refused"], facts["alive"]) == (500, 250)
    assert sorted(mail["Subject"] for mail in mails) == sorted(f"number {number}" for number in range(26))
    [large] = [mail for mail in mails if mail["Subject"] == "number 5"]
    [picture] = large.iter_attachments()
    assert hashlib.sha256(picture.get_content()).hexdigest() == facts["picture"]
    for mail in mails:
        text = mail.get_body().get_content()
        assert text.splitlines() == ["A line.", ".A line with a dot in front.", "Grüße."]


def test_smtplib_gives_up_on_a_server_that_says_nothing():
    # A server of HTTP waits to be spoken to.
    with python_servers("xmlrpc") as servers:
        facts = play("real_mail_scenes.py", "smtp_silence", **servers.trunk("xmlrpc"))
    assert facts == {"error": "SMTPServerDisconnected"}


def test_imaplib_stores_finds_and_fetches_mails_in_dovecot():
    need_program("imap", "dovecot-imapd", "/usr/lib/dovecot")
    with python_servers("imap") as servers:
        assert play("real_mail_scenes.py", "imap", **servers.trunk("imap")) == {
            "state": "AUTH",
            "selected": "3",
            "found": "2",
            "same": True,
            "left": "2",
        }
