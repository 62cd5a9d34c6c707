"""python -m tunesmith"""

import sys

if not sys.flags.safe_path:  # Python looks for modules in the folder at hand first, where somebody's yaml.py may lie
    del sys.path[0]

from tunesmith.cli import main

main()
