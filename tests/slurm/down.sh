#!/usr/bin/env bash
# down.sh - stop what up.sh started in a state directory, and nothing else.
#
#   down.sh [STATE_DIR] [--purge]    default: $SLURM_CI_DIR, else ${TMPDIR:-/tmp}/slurm-ci
#
# Cancels the cluster's jobs, then ends the daemons by pid file. --purge also removes STATE_DIR.
set -uo pipefail

S=${SLURM_CI_DIR:-${TMPDIR:-/tmp}/slurm-ci}
PURGE=0; for a in "$@"; do case $a in --purge) PURGE=1 ;; *) S=$a ;; esac; done
[ -d "$S" ] || { echo "slurm_down: nothing at $S" >&2; exit 0; }
S=$(cd "$S" && pwd -P) || exit 1
if [ ! -e "$S/env.sh" ] || [ ! -d "$S/run" ]; then
  echo "slurm_down: $S is no up.sh state directory" >&2; exit 1
fi
export SLURM_CONF=$S/etc/slurm.conf PATH="$PATH:/usr/sbin:/sbin"

# ours PID: a live process that belongs to this state directory (not a recycled pid).
ours() {
  local p=$1; kill -0 "$p" 2>/dev/null || return 1
  { tr '\0' '\n' <"/proc/$p/cmdline" | grep -qF -- "$S/" ||
    tr '\0' '\n' <"/proc/$p/environ" | grep -qxF "SLURM_CONF=$SLURM_CONF"; } 2>/dev/null
}
# gone PID: ended, or a zombie that a lazy (or absent) init has not reaped.
gone() { ! kill -0 "$1" 2>/dev/null || grep -qs '^State:[[:space:]]*Z' "/proc/$1/status"; }
# stop NAME: SIGTERM, then SIGKILL after 15 s, to the daemon in run/NAME.pid.
stop() {
  local n=$1 p; p=$(cat "$S/run/$n.pid" 2>/dev/null) || return 0
  if [ -n "$p" ] && ours "$p"; then
    kill "$p" 2>/dev/null
    for _ in $(seq 300); do gone "$p" && break; sleep 0.05; done
    gone "$p" || { echo "slurm_down: $n ($p) ignored SIGTERM, killing it" >&2; kill -9 "$p"; }
  fi
  rm -f "$S/run/$n.pid"
}

if p=$(cat "$S/run/slurmctld.pid" 2>/dev/null) && ours "$p"; then
  # Running jobs would outlive slurmd (slurmstepd survives it by design).
  mapfile -t ids < <(timeout 10 squeue -h -o %A 2>/dev/null | sort -u)
  if [ ${#ids[@]} -gt 0 ]; then
    timeout 20 scancel --full --signal=KILL "${ids[@]}" 2>/dev/null
    timeout 20 scancel "${ids[@]}" 2>/dev/null
    for _ in $(seq 100); do [ -z "$(timeout 10 squeue -h 2>/dev/null)" ] && break; sleep 0.2; done
  fi
fi
for f in "$S"/run/slurmd.*.pid; do [ -e "$f" ] && stop "$(basename "$f" .pid)"; done
stop slurmctld; stop slurmdbd; stop mariadbd; stop munged
[ $PURGE = 1 ] && rm -rf "$S"
echo "slurm_down: stopped" >&2
