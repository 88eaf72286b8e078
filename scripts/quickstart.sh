#!/usr/bin/env bash
# From a fresh machine to a report: packages, text, tokenizer, training, evaluation, runs/quickstart/report.html.
#
#   bash scripts/quickstart.sh                                      configs/quickstart.yaml
#   bash scripts/quickstart.sh configs/smoke.yaml [key=value ...]   another config, with settings changed
#   bash scripts/quickstart.sh configs/retrofit-smollm2.yaml        a pretrained model: its evaluation is a receipt
#
# Training runs in two processes on a machine without a GPU, in one on a GPU, and in one for each of several GPUs.
# LAUNCH=configs/accelerate/X.yaml chooses the launch file instead.
# Run it again at any time: a step is skipped if its output is newer than its inputs, and training goes on from its last
# checkpoint. Exit codes: 0 done; 2 the input is wrong; 75 stopped by a signal, run again to go on; 1 a fault.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
[ $# -gt 0 ] || set -- "${CONFIG:-configs/quickstart.yaml}"
CONFIG=$1 # "$@" is the config with its overrides
BIN=.venv/bin
export HF_HUB_OFFLINE=${HF_HUB_OFFLINE-1} # no step needs a model hub; without this, a missing network is a long wait

say() { printf '\n== %s\n' "$*"; }

# outdated OUTPUT INPUT...: true if OUTPUT is missing or older than an input.
outdated() {
  local output=$1 input
  shift
  [ -e "$output" ] || return 0
  for input in "$@"; do
    [ "$input" -nt "$output" ] && return 0
  done
  return 1
}

# evaluate "NAME OPTION..." OUTPUT SOURCE...: runs python -m eval.NAME on the run, unless OUTPUT, the last file that it
# writes, is up to date.
evaluate() {
  local name options output=$RUN/$2
  read -r name options <<<"$1"
  shift 2
  if outdated "$output" "$RUN/hf/config.json" "$@"; then
    say "eval.$name"
    interruptible "$BIN/python" -m "eval.$name" "$RUN" $options
  fi
}

# Runs a command in its own process group, and sends the group one SIGTERM when this script gets a signal. Without a
# group `accelerate launch` would die alone and leave the training processes running. Where `setpriv` is there, as on
# Linux, the command also gets a SIGTERM if this script is killed.
interruptible() {
  local group code=0 guard=
  ! setpriv --pdeathsig TERM true 2>/dev/null || guard="setpriv --pdeathsig TERM"
  set -m
  $guard "$@" &
  group=$!
  set +m
  trap 'stopping=1; trap "" INT TERM HUP USR1; kill -TERM -- "-$group" 2>/dev/null' INT TERM HUP USR1
  wait "$group" || code=$?
  while kill -0 -- "-$group" 2>/dev/null; do sleep 0.2; done
  trap - INT TERM HUP USR1
  if [ -n "${stopping:-}" ]; then
    say "stopped; run the same command again to go on"
    exit 75
  fi
  if [ "$code" -ne 0 ]; then
    say "'$*' failed with exit code $code; finished steps are kept: run the same command again to go on"
    exit "$code"
  fi
}

# Sets the array `launch`, the command that starts train.py on this machine.
choose_launch() {
  local gpus threads
  gpus=$("$BIN/python" -c 'import torch; print(torch.cuda.device_count())')
  threads=$(getconf _NPROCESSORS_ONLN)
  launch=("$BIN/accelerate" launch --quiet --num_cpu_threads_per_process "$threads" --config_file)
  if [ -n "${LAUNCH:-}" ]; then
    launch+=("$LAUNCH")
  elif [ "$gpus" -eq 0 ]; then
    launch+=(configs/accelerate/ddp-cpu-2.yaml)
  elif [ "$gpus" -eq 1 ]; then
    launch=("$BIN/python")
  else
    launch+=(configs/accelerate/gpu-8.yaml --num_processes "$gpus")
  fi
}

bash scripts/bootstrap.sh
facts=$("$BIN/python" scripts/run_facts.py "$@")
RUN=${facts%%$'\n'*}

say "text and tokenizer"
interruptible "$BIN/python" scripts/prepare_data.py "$@"

if outdated "$RUN/hf/config.json" "$CONFIG" train.py $(find model data training -name "*.py"); then
  say "training $* into $RUN"
  choose_launch
  interruptible "${launch[@]}" train.py "$@"
fi

if [ "$facts" != "$RUN" ]; then # the model was pretrained: what did its windows cost, and what did training bring back?
  if outdated "$RUN/receipt.html" "$RUN/hf/config.json" eval/receipt/*.py; then
    say "eval.receipt"
    interruptible "$BIN/python" -m eval.receipt "${facts#*$'\n'}" "$RUN"
  fi
else
  evaluate "reach --plot" reach.png eval/reach/*.py
  evaluate "recall --n 200" recall.png eval/recall/*.py "$RUN/reach.json"
  evaluate loss loss.png eval/loss.py
  evaluate relay relay.png eval/relay.py
  evaluate "heat --n 30" heat.png eval/heat.py
fi
results=("$RUN"/{recall,reach,loss,relay,heat,receipt}.json)
if outdated "$RUN/report.html" $(ls "${results[@]}" 2>/dev/null) eval/report/*.py eval/plots/*.py eval/report/templates/*; then
  say "report"
  interruptible "$BIN/python" -m eval.report "$RUN"
fi

say "done"
"$BIN/python" scripts/run_facts.py "$@" --headline
