#!/usr/bin/env bash
# A real SLURM of one node, as root in a container: what the tests marked `slurm` run on, and a
# place to try a batch script before a queue of hours.
#
#   launch/slurm/one_node_cluster.sh start     install what is missing, start, wait until it is idle
#   launch/slurm/one_node_cluster.sh status    say what runs; exit code 1 if it is not up
#   launch/slurm/one_node_cluster.sh stop      cancel every job and end the daemons
#
# ONE_NODE_DIR is where its logs and its state lie (/var/lib/one-node-slurm). The state is kept over
# a stop, so that job ids go on counting and an old one never names a new job.
set -euo pipefail

DIR=${ONE_NODE_DIR:-/var/lib/one-node-slurm}
CONF=/etc/slurm/slurm.conf
MARK='# written by one_node_cluster.sh'
SECONDS_TO_WAIT=60
# more than a small machine has: tiny runs find room at once, and batch files as they stand
CPUS=$(($(nproc) > 32 ? $(nproc) : 32))

say() { echo "one-node cluster: $*"; }
fail() {
    echo "one-node cluster: $*" >&2
    exit 1
}

as_root() { [[ $(id -u) -eq 0 ]] || fail "this needs root, in a container of its own."; }

install_missing() {
    if command -v slurmctld slurmd munged sbatch >/dev/null; then return; fi
    command -v apt-get >/dev/null || fail "SLURM is missing, and there is no apt-get to install it."
    say "installing slurm-wlm and munge (log: $DIR/install.log)"
    {
        apt-get update -qq
        DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
            slurm-wlm munge
    } >"$DIR/install.log" 2>&1 || fail "the installation failed: $(tail -n 1 "$DIR/install.log")"
}

configure() {
    if [[ -f $CONF ]] && ! grep -qxF "$MARK" "$CONF"; then
        fail "$CONF belongs to another cluster; remove it if this machine is not part of one."
    fi
    local memory
    memory=$((1024 * 1024)) # nothing is enforced
    mkdir -p "$DIR/state" "$DIR/spool" /etc/slurm
    cat >"$CONF" <<CONFIG
$MARK
ClusterName=one-node
SlurmctldHost=localhost
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# a requeued job waits for as long as its old credentials are valid; 120 seconds unless told
AuthInfo=cred_expire=5
# no control groups in an unprivileged container
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
# look for work at once, and every few seconds in any case
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=5,bf_interval=5,batch_sched_delay=1,sched_min_interval=0
JobRequeue=1
# from SIGTERM to SIGKILL; time for one training step and one checkpoint
KillWait=30
# how long \`scontrol show job\` knows an ended job
MinJobAge=600
ReturnToService=2
SlurmdParameters=config_overrides
SlurmctldPidFile=$DIR/slurmctld.pid
SlurmdPidFile=$DIR/slurmd.pid
SlurmctldLogFile=$DIR/slurmctld.log
SlurmdLogFile=$DIR/slurmd.log
StateSaveLocation=$DIR/state
SlurmdSpoolDir=$DIR/spool
# GPUs in name only, so that a batch file that asks for some is tried as it stands
GresTypes=gpu
NodeName=localhost NodeAddr=127.0.0.1 CPUs=$CPUS RealMemory=$memory Gres=gpu:4 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
CONFIG
    {
        echo "$MARK"
        for device in null zero full random; do echo "Name=gpu File=/dev/$device"; done
    } >/etc/slurm/gres.conf
}

# alive PIDFILE: a zombie is not, which a container without an init process may keep for ever
alive() {
    local pid
    pid=$(cat "$1" 2>/dev/null) && [[ -n $pid ]] && grep -q '^State:[[:space:]]*[^Z]' "/proc/$pid/status" 2>/dev/null
}

# wait_until WHAT COMMAND...: COMMAND is tried every fifth of a second
wait_until() {
    local what=$1 deadline=$((SECONDS + SECONDS_TO_WAIT))
    shift
    until "$@"; do
        ((SECONDS < deadline)) || fail "$what did not happen within $SECONDS_TO_WAIT seconds; see $DIR"
        sleep 0.2
    done
}

munge_works() { munge --no-input 2>/dev/null | unmunge >/dev/null 2>&1; }
works() { [[ $1 =~ ^(idle|mixed|allocated|completing)$ ]]; }
is_idle() {
    local state
    state=$(sinfo --noheader --format=%T 2>/dev/null) || return 1
    works "$state" && return
    # what it was found unfit for before a stop may be mended by now
    if [[ $state =~ ^(drain|down) ]]; then
        scontrol update NodeName=localhost State=RESUME 2>/dev/null || true
    fi
    return 1
}
no_jobs() { [[ -z $(squeue --noheader 2>/dev/null) ]]; }

start() {
    as_root
    mkdir -p "$DIR"
    install_missing
    if ! munge_works; then
        [[ -f /etc/munge/munge.key ]] || mungekey --create
        chown munge: /etc/munge/munge.key
        install -d -o munge -g munge -m 0755 /run/munge
        setpriv --reuid munge --regid munge --clear-groups munged --force \
            --pid-file=/run/munge/munged.pid >>"$DIR/munged.log" 2>&1
        wait_until "an answer of munged" munge_works
    fi
    if ! alive "$DIR/slurmctld.pid" || ! alive "$DIR/slurmd.pid"; then
        configure
        # without standard streams of ours, which would hold a caller's pipe open
        alive "$DIR/slurmctld.pid" || slurmctld </dev/null >>"$DIR/start.log" 2>&1
        alive "$DIR/slurmd.pid" || slurmd -N localhost </dev/null >>"$DIR/start.log" 2>&1
    fi
    wait_until "an idle node" is_idle
    say "up: $(sinfo --noheader --format='%D node, %c CPUs, %T'); logs in $DIR"
}

# end NAME PIDFILE: SIGTERM, and SIGKILL if that does not help
end() {
    alive "$2" || return 0
    local pid deadline=$((SECONDS + 15))
    pid=$(cat "$2")
    kill "$pid"
    while alive "$2"; do
        if ((SECONDS >= deadline)); then kill -KILL "$pid" && break; fi
        sleep 0.2
    done
    rm -f "$2"
    say "$1 ended"
}

stop() {
    as_root
    if alive "$DIR/slurmctld.pid" && alive "$DIR/slurmd.pid"; then
        squeue --noheader --format=%A | sort -u | xargs --no-run-if-empty scancel
        wait_until "the end of all jobs" no_jobs
    fi
    end slurmd "$DIR/slurmd.pid"
    end slurmctld "$DIR/slurmctld.pid"
    end munged /run/munge/munged.pid
    say "down"
}

status() {
    if alive "$DIR/slurmctld.pid" && alive "$DIR/slurmd.pid" && is_idle; then
        say "up: $(sinfo --noheader --format='%D node, %c CPUs, %T'); logs in $DIR"
        return
    fi
    say "down"
    return 1
}

case ${1:-} in
start | stop | status) "$1" ;;
*) fail "use: $0 start|stop|status" ;;
esac
