#!/bin/sh
# What only a GPU can prove, in one run of under ten minutes: the tests that need CUDA, then short benchmarks.
#   sh benchmarks/h200.sh [FOLDER]
# Receipts and logs go to FOLDER ($OUT, or ./h200, where it is left out). Everything is tried; the exit code is 1
# where anything failed. PYTHON names the interpreter: .venv/bin/python of `make env`, else python3.
set -u
folder=${1:-${OUT:-h200}}
python=${PYTHON:-.venv/bin/python}
[ -x "$python" ] || python=python3
mkdir -p "$folder"
failed=0

try() { # NAME SECONDS COMMAND...
    name=$1 seconds=$2
    shift 2
    began=$(date +%s)
    if timeout "$seconds" "$@" >"$folder/$name.log" 2>&1; then said=ok; else said="failed ($?)" failed=1; fi
    echo "$name: $said in $(($(date +%s) - began)) s; $(tail -n 1 "$folder/$name.log")"
}

"$python" -c "import torch; assert torch.cuda.is_available(), 'no GPU'; print(torch.cuda.get_device_name())" || exit 1
try tests 300 "$python" -m pytest -q -m gpu tests
try train_speed 100 "$python" -m benchmarks.train_speed --quick --out "$folder/train_speed.json"
try train 80 "$python" -m colossus train run.minutes=1 run.folder="$folder/run"
try long_windows 100 "$python" -m colossus train model.window=1024 model.hidden_size=512 data.seq_len=32768 \
    run.steps=5 run.folder="$folder/long_windows"
exit $failed
