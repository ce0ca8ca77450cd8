#!/bin/sh
# Pin one environment: envs/lock.sh PYTHON NAME writes envs/NAME.txt from the extras in pyproject.toml.
set -eu
python=$1 name=$2
case $name in
  main) extras=workflow,learn,dev ;;
  *) extras=$name,test ;;
esac
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
"$python" -m venv "$scratch"
"$scratch/bin/python" -m pip install -qq torch==2.13.0
"$scratch/bin/python" -m pip install -qq ".[$extras]"
{
  echo "# Pinned by \`make lock\` from the extras [$extras] of pyproject.toml; Python 3.11."
  "$scratch/bin/python" -m pip freeze --exclude defectnet | sed 's/^\(torch==[0-9.]*\)+.*/\1/'
} > "envs/$name.txt"
