#!/usr/bin/env bash
# Examine real servers with tiny models and write a JSON file for each into OUT. Run it from the repository's root.
#
#   pip install --target SITE 'llama-cpp-python[server]==0.3.36' gguf==0.19.0 openai fastapi uvicorn
#   SITE=SITE bash results/conformance/served/run.sh OUT        # LLAMA_SERVER=FILE adds llama.cpp's own server
set -uo pipefail
out=$(realpath "$1") python=$PWD/.venv/bin/python port=8150
models=$(mktemp -d)
PYTHONPATH=$SITE "$python" results/conformance/served/make_models.py "$models" || exit

# examine NAME "ARGUMENTS" SERVER...: start the server in the folder of the models, examine it, stop it
examine() {
    local name=$1 arguments=$2 log=$models/$1.log
    shift 2
    (cd "$models" && PYTHONPATH=$SITE HF_HUB_OFFLINE=1 exec "$@" --host 127.0.0.1 --port $port) >"$log" 2>&1 &
    local server=$!
    until (: </dev/tcp/127.0.0.1/$port) 2>/dev/null; do
        kill -0 $server || return 1
        sleep 0.5
    done
    sleep 3 # llama.cpp's server listens before its model is loaded
    echo "== $name"
    # shellcheck disable=SC2086
    "$python" -m eval.conformance.served --endpoint http://127.0.0.1:$port --json "$out/$name.json" \
        --window 8 --layers 4 $arguments
    echo "exit code $?"
    kill $server
    wait $server
}

llama_cpp=("$python" -m llama_cpp.server --logits_all true --n_ctx 4096 --n_threads 1 --n_threads_batch 1)
for model in olmo2 olmo2-w9 llama; do
    examine "llama-cpp-python-$model" "--model $model" "${llama_cpp[@]}" --model $model.gguf --model_alias $model
done
small_cache=("$python" -c "import functools, runpy, llama_cpp
llama_cpp.Llama.__init__ = functools.partialmethod(llama_cpp.Llama.__init__, swa_full=False)
runpy.run_module('llama_cpp.server', run_name='__main__')" "${llama_cpp[@]:3}")
examine llama-cpp-python-olmo2-small-cache "--model olmo2 --length 2500" \
    "${small_cache[@]}" --model olmo2.gguf --model_alias olmo2

for model in hf hf-w9 hf-none; do
    [ -d "$models/$model" ] || cp -r "$models/hf" "$models/$model"
done
sed -i 's/"sliding_window": 8/"sliding_window": 9/' "$models/hf-w9/config.json"
sed -i 's/"sliding_window": 8/"sliding_window": null/' "$models/hf-none/config.json"
for model in hf hf-w9 hf-none; do
    examine "transformers-serve-$model" "--model $model --compare text --generate 8 --texts 40 --max-requests 5000" \
        "$python" -m transformers.cli.transformers serve $model --device cpu
done

if [ -n "${LLAMA_SERVER:-}" ]; then
    server=("$LLAMA_SERVER" -c 4096 -t 1 -tb 1)
    for model in olmo2 olmo2-w9 llama; do
        examine "llama-server-$model" "--model $model" "${server[@]}" -m $model.gguf --alias $model
    done
    examine llama-server-olmo2-no-cache-ram "--model olmo2" "${server[@]}" -m olmo2.gguf --alias olmo2 --cache-ram 0
fi
