#!/usr/bin/env bash
# Build or repair .venv: PyTorch, every pinned package, the project itself. Does nothing when all of it is in place.
#   ERRATA_DEVICE=cpu|cuda   which build of PyTorch and vLLM (default: cuda where nvidia-smi works)
set -euo pipefail
cd "$(dirname "$0")/.."

say() { printf 'install: %s\n' "$*"; }
die() { printf 'install: %s\n' "$*" >&2; exit 1; }

python=$(command -v python3.11) && "$python" -c '' 2>/dev/null || die "Errata needs Python 3.11 (python3.11 on the PATH)."
if [ -z "${ERRATA_DEVICE:-}" ]; then
    if nvidia-smi >/dev/null 2>&1; then ERRATA_DEVICE=cuda; else ERRATA_DEVICE=cpu; fi
fi
case $ERRATA_DEVICE in cpu | cuda) ;; *) die "ERRATA_DEVICE is '$ERRATA_DEVICE'; it is cpu or cuda." ;; esac

torch=requirements/torch-$ERRATA_DEVICE.txt
rest=(requirements/{service,worker,"node-$ERRATA_DEVICE",stack,dev}.txt)
stamp=$(cat "$torch" "${rest[@]}" "$0" pyproject.toml | sha256sum | cut -d' ' -f1)

exec 9<"$0" && flock 9 # two makes at once: the second waits, and finds the work done
if [ "$(cat .venv/stamp 2>/dev/null)" = "$stamp" ] && .venv/bin/python -c '' 2>/dev/null; then exit; fi

# Kept only if it is a whole Python 3.11 environment made in this place: scripts in it hold its path.
if [ -e .venv/unfinished ] || ! grep -qsF "$PWD/.venv" .venv/bin/activate ||
    ! .venv/bin/python -c 'import sys, pip; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null; then
    say "making .venv with $("$python" --version)"
    rm -rf .venv
    "$python" -m venv .venv
fi
touch .venv/unfinished # a package that was being written when this script died looks installed
rm -f .venv/stamp

pip() { .venv/bin/python -m pip --disable-pip-version-check "$@"; }
names() { sed '/^[# ]/d; s/[= ].*//' "$@" | tr 'A-Z_.' 'a-z--' | sort; }

say "PyTorch for $ERRATA_DEVICE (some 200 MB, CUDA 3 GB; from pip's own indexes first)"
if ! pip -qq install --no-deps -r "$torch" 2>.venv/log; then
    [ "$ERRATA_DEVICE" = cpu ] || { cat .venv/log >&2; die "no PyTorch."; }
    say "not found there: trying PyTorch's CPU index"
    pip -qq install --no-deps -r "$torch" --extra-index-url https://download.pytorch.org/whl/cpu
fi
say "the other $(names "${rest[@]}" | wc -l) packages, vLLM among them: a minute or two"
pip -qq install --no-deps --require-hashes "${rest[@]/#/--requirement=}"
strays=$(comm -23 <(pip list --format=freeze 2>.venv/log | names) <(names "$torch" "${rest[@]}") | grep -vx errata || true)
# shellcheck disable=SC2086  # a list of names
if [ -n "$strays" ]; then say "removing what is no longer pinned:" $strays && pip -qq uninstall --yes $strays; fi
say "the project itself"
pip -qq install --no-deps --no-build-isolation --editable .
say "checking that it imports"
.venv/bin/python -c 'import celery, fastapi, transformers, vllm' 2>.venv/log || { cat .venv/log >&2; die "the environment is broken."; }

echo "$stamp" >.venv/stamp
rm .venv/unfinished
say "done in $SECONDS s"
