#!/usr/bin/env bash
# From a fresh machine to a report: packages, text, tokenizer, training, evaluation, runs/quickstart/report.html.
#
#   bash scripts/quickstart.sh                       configs/quickstart.yaml
#   bash scripts/quickstart.sh configs/smoke.yaml    another config (or CONFIG=configs/smoke.yaml)
#
# Run it again at any time: what is finished and newer than what it was made from is skipped, and training goes on from
# its last checkpoint. Exit codes: 0 done; 2 the input is wrong; 75 stopped by a signal, run again to go on; 1 a fault.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
CONFIG=${1:-${CONFIG:-configs/quickstart.yaml}}
LAUNCH=${LAUNCH:-configs/accelerate/ddp-cpu-2.yaml}
BIN=.venv/bin
export HF_HUB_OFFLINE=${HF_HUB_OFFLINE-1} # nothing here needs a model hub; without this, a missing network is a long wait

say() { printf '\n== %s\n' "$*"; }

# outdated OUTPUT INPUT...: OUTPUT is missing, or older than one of what it was made from.
outdated() {
  local output=$1 input
  shift
  [ -e "$output" ] || return 0
  for input in "$@"; do
    [ "$input" -nt "$output" ] && return 0
  done
  return 1
}

# evaluate "NAME OPTION..." LAST_OUTPUT SOURCE...: python -m eval.NAME on the run, unless LAST_OUTPUT, the file it writes
# last, is fresh.
evaluate() {
  local name options output=$RUN/$2
  read -r name options <<<"$1"
  shift 2
  if outdated "$output" "$RUN/hf/config.json" "$@"; then
    say "eval.$name"
    interruptible "$BIN/python" -m "eval.$name" "$RUN" $options
  fi
}

# Runs a command in a process group of its own and hands it one SIGTERM when we are asked to stop: `accelerate launch`
# would die of it alone and leave the training it started behind.
interruptible() {
  local group code=0
  set -m
  "$@" &
  group=$!
  set +m
  trap 'stopping=1; trap "" INT TERM; kill -TERM -- "-$group" 2>/dev/null' INT TERM
  wait "$group" || code=$?
  while kill -0 -- "-$group" 2>/dev/null; do sleep 0.2; done
  trap - INT TERM
  if [ -n "${stopping:-}" ]; then
    say "stopped; run the same command again to go on"
    exit 75
  fi
  if [ "$code" -ne 0 ]; then
    say "'$*' ended with exit code $code; what is finished is kept: run the same command again to go on"
    exit "$code"
  fi
}

bash scripts/bootstrap.sh
RUN=$("$BIN/python" scripts/run_facts.py folder "$CONFIG")

say "text and tokenizer"
interruptible "$BIN/python" scripts/prepare_data.py "$CONFIG"

if outdated "$RUN/hf/config.json" "$CONFIG" train.py $(find model data training -name "*.py"); then
  say "training $CONFIG into $RUN"
  interruptible "$BIN/accelerate" launch --quiet --config_file "$LAUNCH" \
    --num_cpu_threads_per_process "$(getconf _NPROCESSORS_ONLN)" train.py "$CONFIG"
fi

evaluate "reach --plot" reach.png eval/reach/*.py
evaluate "recall --n 200" recall.png eval/recall/*.py "$RUN/reach.json"
evaluate loss loss.png eval/loss.py
evaluate relay relay.png eval/relay.py
evaluate "heat --n 30" heat.png eval/heat.py
if outdated "$RUN/report.html" "$RUN"/{recall,reach,loss,relay,heat}.json eval/report/*.py eval/plots/*.py eval/report/templates/*; then
  say "report"
  interruptible "$BIN/python" -m eval.report "$RUN"
fi

say "done"
"$BIN/python" scripts/run_facts.py headline "$RUN"
