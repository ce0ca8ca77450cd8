#!/bin/sh
# Pin one environment: envs/lock.sh PYTHON NAME writes envs/NAME.txt from the extras in pyproject.toml.
# The list is complete and meant for `pip install --no-deps`, after torch.
set -eu
python=$1 name=$2
case $name in
  main) extras=workflow,learn,optimade,amorphous,dev ;;
  *) extras=$name,test ;;
esac
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
"$python" -m venv "$scratch"
"$scratch/bin/python" -m pip install -qq torch==2.13.0
"$scratch/bin/python" -m pip install -qq torch==2.13.0 ".[$extras]"
# Left out: torchvision and torchaudio, which mattersim asks for without using them and which break its import when
# they were built for another torch; and the CUDA libraries, which torch brings along in its GPU build.
"$scratch/bin/python" -m pip freeze --exclude defectnet --exclude torchvision --exclude torchaudio > "$scratch/freeze"
{
  echo "# Pinned by \`make lock\` from the extras [$extras] of pyproject.toml; Python 3.11."
  sed -e 's/^\(torch==[0-9.]*\)+.*/\1/' -e '/^nvidia-ml-py/b' -e '/^nvidia-/d' -e '/^cuda-/d' -e '/^triton==/d' \
    "$scratch/freeze"
} > "envs/$name.txt"
