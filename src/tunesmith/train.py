"""Moved to training.py; removed with the next commit."""
from tunesmith.training import *  # noqa
