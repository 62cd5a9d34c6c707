"""Moved to checking.py; removed with the next commit."""
from tunesmith.checking import *  # noqa
