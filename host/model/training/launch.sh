#!/bin/sh
# launch.sh PROCESSES SCRIPT ARGS...: one training in several processes of one thread each (see optimise.py). Fails when one
# of them does, and ends the others then: they would wait for it. Ctrl-C ends them too: the shell has them not hear it.
set -eu
processes=$1; shift
export MASTER_ADDR=127.0.0.1 MASTER_PORT="${MASTER_PORT:-29555}" WORLD_SIZE="$processes" GLOO_SOCKET_IFNAME=lo OMP_NUM_THREADS=1
# Training allocates and frees tens of megabytes a step; glibc gives them back each time, tcmalloc keeps them (1.4 x).
for lib in /usr/lib/*/libtcmalloc_minimal.so.4; do [ -e "$lib" ] && export LD_PRELOAD="$lib"; done
rank=0 started=""
trap 'kill $started 2>/dev/null || true; wait' EXIT
trap 'exit 130' INT
trap 'exit 143' HUP TERM
while [ "$rank" -lt "$processes" ]; do
    RANK=$rank "${PYTHON:-python3}" "$@" --threads 1 & started="$started $!"; rank=$((rank + 1))
done
for process in $started; do wait "$process"; done
