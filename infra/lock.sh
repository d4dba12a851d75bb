#!/usr/bin/env bash
# Writes requirements.lock: the exact versions of everything in a fresh environment with all extras that tests need.
set -euo pipefail
cd "$(dirname "$0")/.."
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${1:-python3}" -m venv "$folder/venv"
pip=("$folder/venv/bin/python" -m pip --disable-pip-version-check)
"${pip[@]}" install --quiet torch==2.13.0 ${LOCK_FROM:+--constraint "$LOCK_FROM"}
"${pip[@]}" install --quiet --editable '.[asr,eval,serve,demo,train,gpu,dev]' ${LOCK_FROM:+--constraint "$LOCK_FROM"}
{
  echo "# What pip chose for pyproject.toml with the extras asr, eval, serve, demo, train, gpu and dev, on Python 3.11: make lock."
  echo "# To be used as: pip install -c requirements.lock -e '.[asr,demo]'"
  "${pip[@]}" freeze --exclude-editable --exclude pip --exclude setuptools | sed 's/+[a-z0-9.]*$//'
} > requirements.lock
