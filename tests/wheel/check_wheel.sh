#!/usr/bin/env bash
# Builds the wheel as a user's pip would and runs it in environments of its own: with the torch that this project is developed
# with and, where the disk has room, with the CUDA build of an older torch and no GPU, which shows that one wheel serves both
# and that the CUDA half loads. MINIFOCUS_BUILD=cpu checks a wheel without that half.
set -euo pipefail
if (($#)); then # it takes none, and --help is no reason to build a wheel
  sed -n '2,/^set /{s/^# //p}' "$0"
  [[ $1 == --help || $1 == -h ]] && exit 0 || exit 2
fi
cd "$(dirname "$0")/../.."
export MINIFOCUS_BUILD=${MINIFOCUS_BUILD:-all} MINIFOCUS_BACKEND=native
export PIP_COMPILE=0 # pip would compile every module of torch; Python compiles those that are used
unset PYTHONDONTWRITEBYTECODE
sources=$PWD
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

# An environment without a pip of its own: that of .venv, which `make install` brings up to date, installs into it.
environment() { python3 -m venv --without-pip "$1"; }
pip() { "$sources/.venv/bin/python" -m pip --python "$1/bin/python" "${@:2}"; }

environment "$scratch/developed-with"
pip "$scratch/developed-with" wheel --quiet --no-deps --wheel-dir "$scratch" .
wheel=$(echo "$scratch"/minifocus-*.whl)
[[ $wheel == *-cp310-abi3-linux_*.whl ]] || { echo "not one wheel for every Python >= 3.10: $wheel"; exit 1; }
echo "built ${wheel##*/}" # .ci/run waits for this line
pip "$scratch/developed-with" install --quiet --constraint constraints.txt "$wheel"
cd "$scratch" # away from the sources, so that the installed package is the one that is used
developed-with/bin/python "$sources/tests/wheel/check_installed.py" "$sources"
others=$(developed-with/bin/python -m zipfile -l "$wheel" | awk 'NR > 1 {print $1}' | grep -Ev '^minifocus(/|-[0-9.]+\.dist-info/)' || true)
[[ -z $others ]] || { echo "in the wheel, and not of the library: $others"; exit 1; }
pip developed-with uninstall --quiet --yes sentencepiece tqdm jinja2
developed-with/bin/python "$sources/tests/wheel/check_bare.py" "$sources"

[[ $MINIFOCUS_BUILD == all ]] || exit 0
free=$(($(df --output=avail -k . | tail -1) / 1024 / 1024))
if ((free < 10)); then
  echo "LEFT OUT: the wheel in the CUDA build of torch 2.11, which needs 10 GB of disk; $free GB are free"
  exit 0
fi
rm -rf developed-with
environment older
pip older install --quiet --no-cache-dir torch==2.11.0 "$wheel"
older/bin/python "$sources/tests/wheel/check_installed.py" "$sources"
