#!/usr/bin/env bash
# Runs the parts of a target, one after the other, within LIMIT seconds together. One that fails, or is cut off at its
# own SECONDS, does not keep the others from running. What they say is also in FOLDER/TARGET.log. The exit status is 1
# where a part failed, was cut off or never begun. The last line names the folder.
#
#   gpu_parts.sh TARGET LIMIT FOLDER --part NAME SECONDS COMMAND... [--part NAME SECONDS COMMAND...]...
set -uo pipefail

target=$1 limit=$2 folder=$3
shift 3
mkdir -p "$folder" || exit 1
exec > >(trap '' INT TERM && exec tee "$folder/$target.log") 2>&1
log=$! failed=0 running='' told=()

finish() {
  printf '\n'
  ((${#told[@]})) && printf '%s\n' "${told[@]}"
  echo "$target: results in $folder"
  # Not before the log is written whole.
  exec > /dev/null 2>&1
  wait "$log"
  exit "$1"
}
trap '[[ -z $running ]] || { kill -INT "$running"; wait "$running"; }; finish 130' INT TERM

# Interrupted, Python ends in good order: pytest tells what it has found until then. Started by a shell in the
# background it would ignore that.
heed=()
env --default-signal=INT true 2> /dev/null && heed=(env --default-signal=INT)

run() {
  local name=$1 seconds=$2 left=$((limit - SECONDS)) began=$SECONDS status=0 outcome
  shift 2
  ((seconds > left)) && seconds=$left
  if ((seconds <= 0)); then
    outcome="NOT BEGUN: nothing is left of $limit s"
  else
    printf '\n%s\n' "$target: $name ..."
    timeout --signal=INT --kill-after=10 "$seconds" "${heed[@]}" "$@" < /dev/null &
    running=$!
    wait "$running" || status=$?
    running=''
    outcome="in $((SECONDS - began)) s"
    if ((status == 0)); then
      outcome="done $outcome"
    elif ((SECONDS - began >= seconds)) && [[ $status == 124 || $status == 137 ]]; then
      outcome="CUT OFF $outcome"
    else
      outcome="FAILED $outcome, exit status $status"
    fi
    echo "$target: $name $outcome"
  fi
  [[ $outcome == done* ]] || failed=1
  told+=("$target: $name $outcome")
}

part=()
for word in "$@" --part; do
  if [[ $word != --part ]]; then
    part+=("$word")
  elif ((${#part[@]})); then
    run "${part[@]}"
    part=()
  fi
done
finish "$failed"
