#!/usr/bin/env bash
# Score a corpus once into the store, then stream fused windows while no source runs.
#
#     examples/capture_then_fuse.sh [--set KEY=VALUE ...]
#
# Run it from the folder that holds docs/, with the environment activated; two cores take a few minutes.
set -euo pipefail
examples=$(dirname "$0")
recipe=$examples/synthetic.yaml
port=${PORT:-9000}
cursor=$(mktemp -d)/cursor.json

# Sources that are not running are deployed for as long as it takes. A capture that was killed goes on where it stopped.
fusion capture "$recipe" "$@"
fusion capture "$recipe" --verify "$@"

# The store holds each source's own rows, so strategy and target may differ every time; here the better source wins.
trap 'fusion down synthetic' EXIT
fusion up "$recipe" --no-sources --set fusion.strategy=min_ce --set service.grpc_port="$port" "$@"
python "$examples/resume_a_stream.py" --address "127.0.0.1:$port" --dataset pages --cursor "$cursor"
