#!/usr/bin/env bash
# Run a command, and run it again when a fault ends it: a lost host, a full bucket, a killed process.
#
# usage: bash launch/supervise.sh COMMAND...    for instance
#   bash launch/supervise.sh python -m diffjax train --config=configs/imagenet256.py --workdir=runs/a
#
# On several hosts, one on each. It ends with the exit code of the command where running it again would not help: 0,
# finished; 2, a mistake in what was given; 130, 143, interrupted; 141, nobody reads the output. SIGINT and SIGTERM are
# passed on to the command, which writes its checkpoint. After anything else it waits and starts the command again; the
# wait doubles up to five minutes. A command that ran for ten minutes or longer got somewhere: counting and waiting start
# anew.
#
# DIFFJAX_RESTARTS  how often in a row it starts again (default 20), before it ends with the code of the last fault
# DIFFJAX_WAIT      seconds of the first wait (default 10)
set -um  # job control: the command gets signals from here alone, and its own are not turned off

restarts="${DIFFJAX_RESTARTS:-20}" first="${DIFFJAX_WAIT:-10}" longest=300 lasting=600
if [ $# = 0 ] || ! [[ "$restarts" =~ ^[0-9]+$ && "$first" =~ ^[0-9]+$ ]]; then
  echo "supervise: give a command, and whole numbers in DIFFJAX_RESTARTS and DIFFJAX_WAIT" >&2
  exit 2
fi

child="" asked=""
pass_on() {  # SIGNAL EXIT_CODE
  asked="$2"
  if [ -n "$child" ]; then kill -s "$1" "$child" 2>/dev/null; fi
}
trap 'pass_on INT 130' INT
trap 'pass_on TERM 143' TERM

run() {  # COMMAND... -> code: what it ended with. `wait` also returns when a signal arrives.
  "$@" &
  child=$!
  wait "$child"
  code=$?
  while kill -0 "$child" 2>/dev/null; do
    wait "$child"
    code=$?
  done
  child=""
}

count=0 seconds="$first"
while true; do
  started=$SECONDS
  run "$@"
  case "$code" in
    0 | 2 | 130 | 141 | 143) exit "$code" ;;
  esac
  if [ -n "$asked" ]; then exit "$code"; fi  # asked to stop, and could not do it well
  if [ $((SECONDS - started)) -ge "$lasting" ]; then count=0 seconds="$first"; fi
  if [ "$count" -ge "$restarts" ]; then
    echo "supervise: ended with $code after $count restarts in a row; giving up" >&2
    exit "$code"
  fi
  count=$((count + 1))
  echo "supervise: ended with $code; restart $count of at most $restarts in a row, in $seconds s" >&2
  run sleep "$seconds"
  if [ -n "$asked" ]; then exit "$asked"; fi
  seconds=$((seconds * 2 < longest ? seconds * 2 : longest))
done
