#!/bin/sh
# Runs inside the new conda environment, in the folder of the Snakefile.
python -m pip install --quiet --editable .
