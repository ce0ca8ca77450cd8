#!/bin/sh
# Runs inside the new conda environment, in the folder of the Snakefile.
python -m pip install --quiet --editable .
# mattersim asks for them without using them; built for another torch, they break its import.
python -m pip uninstall --quiet --yes torchvision torchaudio
