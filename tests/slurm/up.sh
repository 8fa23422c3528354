#!/usr/bin/env bash
# up.sh - start a real, throw-away SLURM cluster on loopback, without systemd.
#
#   up.sh [STATE_DIR]     default: $SLURM_CI_DIR, else ${TMPDIR:-/tmp}/slurm-ci
#   . STATE_DIR/env.sh          sets SLURM_CONF (and GLOO_SOCKET_IFNAME); then: sinfo, sbatch, submitit ...
#   down.sh STATE_DIR     stops it
#
# Starts munged, (optionally mariadbd + slurmdbd, for a real `sacct`), slurmctld and N slurmd
# as ordinary daemons. Every file (keys, configuration, pid files, logs, spool) lies under
# STATE_DIR, which must be new, empty or an earlier one of this script, and at most 55
# characters long. Returns when every node has registered.
#
# Idempotent: running daemons are left alone, dead ones are started, drained nodes resumed.
# When none runs it starts afresh: no jobs and no accounting of earlier ones.
#
# Knobs (environment):
#   SLURM_CI_NODES=2        simulated nodes (one slurmd each)
#   SLURM_CI_CPUS=32        CPUs each node claims (virtual, nothing is pinned)
#   SLURM_CI_MEM_MB=500000  memory each node claims, in MB (virtual, not enforced)
#   SLURM_CI_GPUS=8         fake GPUs each node claims (0: none); SLURM sets CUDA_VISIBLE_DEVICES
#   SLURM_CI_ACCOUNTING=1   1: mariadbd + slurmdbd, so that `sacct` works (submitit's Job.state needs it); 0: none
#   SLURM_CI_PORT=36810     first of (3 + nodes) TCP ports
#   SLURM_CI_NAMES=         empty: nodes are called 127.0.0.1, 127.0.0.2 ... (they resolve anywhere);
#                           a prefix, e.g. "ci-node": ci-node1 ... (these must resolve: add them to /etc/hosts)
#   SLURM_CI_EXTRA_CONF=    further lines for slurm.conf (fresh start only), e.g. "TaskPlugin=task/affinity"
#   SLURM_CI_INSTALL=1      1: install missing Debian/Ubuntu packages with apt-get; 0: never call it
#   SLURM_CI_TIMEOUT=60     seconds to wait for each daemon and for the nodes
#
# Works as root (SlurmUser=root) or, when the packages are already installed, as any one user.
set -euo pipefail

S=${1:-${SLURM_CI_DIR:-${TMPDIR:-/tmp}/slurm-ci}}
NODES=${SLURM_CI_NODES:-2}
CPUS=${SLURM_CI_CPUS:-32}
MEM=${SLURM_CI_MEM_MB:-500000}
GPUS=${SLURM_CI_GPUS:-8}
ACCT=${SLURM_CI_ACCOUNTING:-1}
PORT=${SLURM_CI_PORT:-36810}
NAMES=${SLURM_CI_NAMES:-}
INSTALL=${SLURM_CI_INSTALL:-1}
TIMEOUT=${SLURM_CI_TIMEOUT:-60}

say() { printf 'slurm_up: %s\n' "$*" >&2; }
die() { say "ERROR: $*"; exit 1; }
export PATH="$PATH:/usr/sbin:/sbin"

# The environment of an outer SLURM job or of an earlier cluster must not leak into the daemons.
for v in $(compgen -e); do case $v in SLURM_CI_*) ;; SLURM*|SBATCH_*|SRUN_*|SUBMITIT_*) unset "$v" ;; esac; done

mkdir -p "$S"; S=$(cd "$S" && pwd -P)
# Unix-socket paths are limited to 107 bytes and slurmstepd appends about 45 to spool/.
[ ${#S} -le 55 ] || die "state directory path too long (${#S} > 55 characters): $S"
case $S in *[[:space:]]*) die "state directory path contains blanks: $S";; esac
# A fresh start empties run/, log/, spool/, state/ and db/: never do that to somebody else's directory.
[ -z "$(ls -A "$S")" ] || [ -e "$S/.up.lock" ] || die "not empty, and not made by up.sh: $S"
exec 9>"$S/.up.lock"; flock 9

# ---------------------------------------------------------------- install
need="slurmctld slurmd sbatch:slurm-client munged:munge"
[ "$ACCT" = 1 ] && need="$need slurmdbd mariadbd:mariadb-server-core"
missing=()
for x in $need; do command -v "${x%%:*}" >/dev/null || missing+=("${x##*:}"); done
if [ ${#missing[@]} -gt 0 ]; then
  [ "$INSTALL" = 1 ] || die "missing packages: ${missing[*]}"
  sudo=; [ "$(id -u)" = 0 ] || sudo="sudo -n"
  say "installing ${missing[*]}"
  export DEBIAN_FRONTEND=noninteractive NEEDRESTART_MODE=l
  { $sudo apt-get update -q && $sudo env DEBIAN_FRONTEND=noninteractive \
      apt-get install -y -q --no-install-recommends "${missing[@]}"; } >"$S/apt.log" 2>&1 \
      || { tail -20 "$S/apt.log" >&2; die "apt-get failed"; }
fi

# ---------------------------------------------------------------- functions
# alive NAME: the pid in run/NAME.pid is a live process that belongs to this state directory.
alive() {
  local p; p=$(cat "$S/run/$1.pid" 2>/dev/null) || return 1
  [ -n "$p" ] && kill -0 "$p" 2>/dev/null || return 1
  # Not a recycled pid: our daemons have the state directory on their command line or (slurmdbd) in SLURM_CONF.
  { tr '\0' '\n' <"/proc/$p/cmdline" | grep -qF -- "$S/" ||
    tr '\0' '\n' <"/proc/$p/environ" | grep -qxF "SLURM_CONF=$S/etc/slurm.conf"; } 2>/dev/null
}
wait_for() { local end=$((SECONDS + TIMEOUT)); until "$@"; do [ $SECONDS -lt $end ] || return 1; sleep 0.1; done; }
# Start a daemon that inherits neither stdout nor the lock, or a CI step waits for ever on its pipe.
run() { local log=$1; shift; setsid "$@" </dev/null >>"$log" 2>&1 9>&-; }

umask 022
mkdir -p "$S"/{etc,run,log,spool,state,munge,dev}
chmod 755 "$S" "$S"/{etc,run,log,spool,dev}; chmod 700 "$S/munge" "$S/state"
ME=$(id -un)

if [ -n "$NAMES" ]; then PRE=$NAMES; else PRE=127.0.0.; fi
if [ "$NODES" = 1 ]; then LIST=${PRE}1; DPORTS=$((PORT + 3)); else LIST="${PRE}[1-$NODES]"; DPORTS="[$((PORT + 3))-$((PORT + 2 + NODES))]"; fi
ADDR=; [ -n "$NAMES" ] && ADDR="NodeHostname=$(hostname) NodeAddr=127.0.0.1"

anyalive=0
for f in "$S"/run/*.pid; do [ -e "$f" ] && n=$(basename "$f" .pid) && alive "$n" && anyalive=1; done

# ---------------------------------------------------------------- configuration (fresh start only)
if [ $anyalive = 0 ]; then
  for p in $(seq "$PORT" $((PORT + 2 + NODES))); do
    if (exec 3<>"/dev/tcp/127.0.0.1/$p") 2>/dev/null; then die "port $p is taken (another cluster?); set SLURM_CI_PORT"; fi
  done
  rm -rf "$S/db"
  rm -rf "$S"/state/* "$S"/spool/* "$S"/run/* "$S"/log/*
  [ -s "$S/munge/munge.key" ] || (umask 077; head -c 128 /dev/urandom >"$S/munge/munge.key")
  chmod 400 "$S/munge/munge.key"

  gres= ; grestypes=
  if [ "$GPUS" -gt 0 ]; then
    for i in $(seq 0 $((GPUS - 1))); do ln -sfn /dev/null "$S/dev/nvidia$i"; done  # slurmd insists on character devices
    grestypes="GresTypes=gpu"; gres="Gres=gpu:$GPUS"
    if [ "$GPUS" = 1 ]; then gf="$S/dev/nvidia0"; else gf="$S/dev/nvidia[0-$((GPUS - 1))]"; fi
    printf 'AutoDetect=off\nName=gpu File=%s\n' "$gf" >"$S/etc/gres.conf"
  else rm -f "$S/etc/gres.conf"; fi

  # slurmd loads a cgroup plugin although nothing here asks for one, and by default dies where no cgroup
  # file system, or a cgroup2 without systemd, is mounted. From 24.05 on the plugin can be disabled;
  # before, the v1 plugin, named explicitly, does nothing until it is used (and it is not).
  ver=$(slurmd -V | grep -oE '[0-9]+\.[0-9]+' | head -1)
  if [ "${ver/./}" -ge 2405 ]; then cg=disabled; else cg=cgroup/v1; fi
  echo "CgroupPlugin=$cg" >"$S/etc/cgroup.conf"

  if [ "$ACCT" = 1 ]; then
    acct="AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort=$((PORT + 1))
AccountingStoragePass=socket=$S/run/munge.sock
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=5"
    [ "$GPUS" -gt 0 ] && acct="$acct
AccountingStorageTRES=gres/gpu"
  else acct="AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none"; fi

  # Job ids must differ between clusters: submitit names its files after them and
  # takes a left-over <id>_0_result.pkl for the result of the new job.
  first=$(( 1000 + $(date +%s) % 60000000 ))
  cat >"$S/etc/slurm.conf" <<CONF
ClusterName=ci
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort=$PORT
SlurmUser=$ME
SlurmdUser=$ME
AuthType=auth/munge
CredType=cred/munge
# cred_expire is also how long a requeued job waits before it starts again (default 120 s)
AuthInfo=socket=$S/run/munge.sock,cred_expire=5
StateSaveLocation=$S/state
SlurmdSpoolDir=$S/spool/%n
SlurmctldPidFile=$S/run/slurmctld.pid
SlurmdPidFile=$S/run/slurmd.%n.pid
SlurmctldLogFile=$S/log/slurmctld.log
SlurmdLogFile=$S/log/slurmd.%n.log
SlurmctldDebug=info
SlurmdDebug=info
# no cgroups, no pinning
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
# the claimed CPUs and memory need not exist
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=2,sched_interval=2,batch_sched_delay=0
ReturnToService=2
JobRequeue=1
MinJobAge=3600
KillWait=5
FirstJobId=$first
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
TreeWidth=64
$grestypes
$acct
NodeName=$LIST $ADDR Port=$DPORTS CPUs=$CPUS RealMemory=$MEM $gres State=UNKNOWN
# jobs in "debug" are pre-empted (user signal, GraceTime, requeue) by jobs in "high"
PartitionName=debug Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=20
PartitionName=high Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
${SLURM_CI_EXTRA_CONF:-}
CONF
  if [ "$ACCT" = 1 ]; then
    (umask 077; cat >"$S/etc/slurmdbd.conf" <<CONF
AuthType=auth/munge
AuthInfo=socket=$S/run/munge.sock
DbdHost=localhost
DbdAddr=127.0.0.1
DbdPort=$((PORT + 1))
SlurmUser=$ME
LogFile=$S/log/slurmdbd.log
PidFile=$S/run/slurmdbd.pid
StorageType=accounting_storage/mysql
StorageHost=localhost
StorageUser=$ME
StorageLoc=slurm_acct_db
DebugLevel=info
CONF
    )
  fi
fi
export SLURM_CONF=$S/etc/slurm.conf
cat >"$S/env.sh" <<ENV
export SLURM_CONF=$S/etc/slurm.conf
# gloo: do not depend on the host name resolving to a usable interface
export GLOO_SOCKET_IFNAME=\${GLOO_SOCKET_IFNAME:-lo}
ENV

ctld_answers() { timeout 10 scontrol ping 2>/dev/null | grep -q 'is UP'; }
dbd_answers() { timeout 10 sacctmgr -n -P list cluster format=cluster >/dev/null 2>"$S/log/sacctmgr.err"; }

# ---------------------------------------------------------------- start
cd "$S"
t0=$(date +%s%N)
if ! alive munged; then
  run "$S/log/munged.out" munged --key-file="$S/munge/munge.key" --socket="$S/run/munge.sock" \
    --pid-file="$S/run/munged.pid" --log-file="$S/log/munged.log" --seed-file="$S/munge/munged.seed" \
    || { cat "$S/log/munged.out" "$S/log/munged.log" >&2; die "munged failed"; }
  wait_for test -S "$S/run/munge.sock" || die "no munge socket"
fi

if [ "$ACCT" = 1 ]; then
  if ! alive mariadbd; then
    mkdir -p "$S/db/data"; chmod 700 "$S/db" "$S/db/data"
    # An empty data directory will do: without grant tables mariadbd needs no system tables (it grumbles),
    # and slurmdbd creates its own database. nosync and no doublewrite: this data need not survive a crash.
    # No TCP and no passwords: the socket lies in a 0700 directory.
    dbopts=(--no-defaults --datadir="$S/db/data" --socket="$S/db/mysql.sock" --pid-file="$S/run/mariadbd.pid"
      --skip-networking --skip-grant-tables --innodb-log-file-size=8M --innodb-buffer-pool-size=64M
      --innodb-flush-log-at-trx-commit=0 --innodb-lock-wait-timeout=900
      --loose-innodb-flush-method=nosync --loose-skip-innodb-doublewrite)
    [ "$(id -u)" = 0 ] && dbopts+=(--user=root)
    # Not through run(): mariadbd stays in the foreground, and a waiting subshell would keep our stdout open.
    setsid mariadbd "${dbopts[@]}" </dev/null >>"$S/log/mariadbd.log" 2>&1 9>&- &
    wait_for test -S "$S/db/mysql.sock" || { tail "$S/log/mariadbd.log" >&2; die "mariadbd failed"; }
    wait_for alive mariadbd || die "no mariadbd pid file"
  fi
  # slurmdbd has no -f: it looks for its configuration beside SLURM_CONF.
  alive slurmdbd || MYSQL_UNIX_PORT="$S/db/mysql.sock" run "$S/log/slurmdbd.out" slurmdbd || { cat "$S/log/slurmdbd.out" >&2; die "slurmdbd failed"; }
  wait_for dbd_answers || { tail "$S/log/slurmdbd.log" "$S/log/sacctmgr.err" >&2; die "slurmdbd does not answer"; }
  [ -n "$(sacctmgr -n -P list cluster ci format=cluster 2>/dev/null)" ] || sacctmgr -i -Q add cluster ci >/dev/null
fi

if ! alive slurmctld; then
  run "$S/log/slurmctld.out" slurmctld -f "$SLURM_CONF" || { cat "$S/log/slurmctld.out" >&2; die "slurmctld failed"; }
  # A slurmd that comes first retries its registration only seconds later.
  wait_for ctld_answers || { tail -n 20 "$S/log/slurmctld.log" >&2; die "slurmctld does not answer"; }
fi
for i in $(seq "$NODES"); do
  alive "slurmd.${PRE}$i" || run "$S/log/slurmd.out" slurmd -f "$SLURM_CONF" -N "${PRE}$i" || { cat "$S/log/slurmd.out" >&2; die "slurmd failed"; }
done

# ---------------------------------------------------------------- wait
ready() {  # every node has registered (a busy node of a running cluster is fine)
  local st; st=$(sinfo -h -N -p debug -o %T 2>/dev/null) || return 1
  [ "$(wc -l <<<"$st")" = "$NODES" ] && ! grep -qvE '^(idle|mixed|allocated|completing)$' <<<"$st"
}
if [ $anyalive = 1 ] && ! ready; then
  # A daemon was killed under running jobs ("Duplicate jobid", "Kill task failed", ...): take the nodes back.
  bad=$(sinfo -h -N -p debug -t down,drain,fail -o %N 2>/dev/null | sort -u | paste -sd,)
  [ -z "$bad" ] || scontrol update "NodeName=$bad" State=RESUME || true
fi
wait_for ready || { sinfo -N -l >&2 || true; sinfo -R >&2 || true; tail -n 15 "$S"/log/slurmctld.log >&2; die "nodes did not become idle in $TIMEOUT s"; }
say "up in $(( ($(date +%s%N) - t0) / 1000000 )) ms; use: . $S/env.sh"
sinfo -N -l >&2
