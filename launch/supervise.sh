#!/usr/bin/env bash
# Run a command, and run it again when a fault ends it: a lost host, a killed process, a step that hangs.
#
# usage: bash launch/supervise.sh COMMAND...    for instance
#   bash launch/supervise.sh python -m diffjax train --config=configs/imagenet256.py --workdir=runs/a
#
# On several hosts, one on each. It ends with the exit code of the command where running it again would not help: 0,
# finished; 2, a mistake in what was given; 130, 143, interrupted; 141, nobody reads the output. SIGINT and SIGTERM are
# passed on to the command, which writes its checkpoint, and so is SIGHUP, as SIGTERM. After anything else it waits and
# starts the command again; the wait doubles up to five minutes. A new checkpoint in the folder of `--workdir=` is
# progress: after it counting and waiting start anew.
#
# DIFFJAX_RESTARTS  how often it starts again without progress (default 20), before it ends with the last exit code
# DIFFJAX_WAIT      seconds of the first wait (default 10)
set -um  # job control: the command gets signals from here alone, and its own are not turned off

restarts="${DIFFJAX_RESTARTS:-20}" first="${DIFFJAX_WAIT:-10}" longest=300
if [ $# = 0 ] || ! [[ "$restarts" =~ ^[0-9]+$ && "$first" =~ ^[0-9]+$ ]]; then
  echo "supervise: give a command, and whole numbers in DIFFJAX_RESTARTS and DIFFJAX_WAIT" >&2
  exit 2
fi
restarts=$((10#$restarts)) first=$((10#$first))

checkpoints=""
for argument in "$@"; do
  case "$argument" in --workdir=*) checkpoints="${argument#*=}/checkpoints" ;; esac
done

latest() {  # the name of the newest complete checkpoint
  if [ -d "$checkpoints" ]; then ls "$checkpoints" | grep -x "[0-9]*" | sort -n | tail -n 1; fi
}

child="" asked=""  # the signal that asked to stop
pass_on() {
  if [ -n "$child" ]; then kill -s "$asked" "$child" 2>/dev/null; fi
}
trap 'asked=INT; pass_on' INT
trap 'asked=TERM; pass_on' TERM HUP

run() {  # COMMAND... -> code: what it ended with
  "$@" &
  child=$!
  if [ -n "$asked" ]; then pass_on; fi  # it came before there was a child
  # `wait` returns early, with another code, when a signal arrives.
  while wait -f "$child"; kill -0 "$child" 2>/dev/null; do :; done
  wait "$child"
  code=$?
  child=""
}

count=0 seconds="$first" reached="$(latest)"
while true; do
  run "$@"
  case "$code" in
    0 | 2 | 130 | 141 | 143) exit "$code" ;;
  esac
  if [ -n "$asked" ]; then exit "$code"; fi  # asked to stop, and could not do it well
  if [ "$(latest)" != "$reached" ]; then count=0 seconds="$first" reached="$(latest)"; fi
  if [ "$count" -ge "$restarts" ]; then
    echo "supervise: ended with $code after $count restarts without progress; giving up" >&2
    exit "$code"
  fi
  count=$((count + 1))
  echo "supervise: ended with $code; restart $count of at most $restarts without progress, in $seconds s" >&2
  run sleep "$seconds"
  if [ "$asked" = INT ]; then exit 130; elif [ "$asked" = TERM ]; then exit 143; fi
  seconds=$((seconds * 2 < longest ? seconds * 2 : longest))
done
