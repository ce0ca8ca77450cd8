"""``python -m defectnet`` is the command ``defectnet``."""

from defectnet.cli import main

main()
