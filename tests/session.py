"""The command line as the leader of a session of its own, whose terminal is its standard input; what the closing of
that terminal does is named by HANGUP, SIG_DFL or SIG_IGN."""

from __future__ import annotations

import fcntl
import os
import signal
import termios

from tunesmith import cli

signal.signal(signal.SIGHUP, getattr(signal, os.environ.get("HANGUP", "SIG_DFL")))
os.setsid()
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
cli.main()
