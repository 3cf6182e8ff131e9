#!/usr/bin/env bash
# A Slurm cluster of this machine alone, for tests: munged, slurmctld and several slurmd as
# processes of whoever calls, in a folder of its own. Needs root and Debian's `slurm-wlm munge`.
#
#   tests/slurm/cluster.sh start FOLDER [NODES]    starts it; prints the variable to export
#   tests/slurm/cluster.sh node FOLDER NAME        starts one node's slurmd again
#   tests/slurm/cluster.sh stop FOLDER             ends what it started, by process id
#
# Each node has 2 CPUs, 2000 MiB and a GPU that is none (`gres/gpu`); the last one has the
# feature `a100`, the others `h200`. No cgroups, no database of accounts.
set -euo pipefail

folder=$(mkdir -p "$2" && cd "$2" && pwd)
export SLURM_CONF="$folder/slurm.conf"

free_port() {
    python3 -c 'import socket
held = [socket.socket() for _ in range('"$1"')]
for s in held: s.bind(("127.0.0.1", 0))
print(*(s.getsockname()[1] for s in held))'
}

# Runs a daemon in the background and keeps its process id. `setsid`: a Ctrl-C of the one who
# tests is not for it.
daemon() {
    local name=$1
    shift
    setsid "$@" >> "$folder/$name.out" 2>&1 < /dev/null &
    echo $! > "$folder/$name.pid"
}

node() {
    local name=$1
    mkdir -p "$folder/spool-$name"
    daemon "$name" slurmd -D -N "$name" -f "$SLURM_CONF"
}

configure() {
    local nodes=$1 ports host names=() number
    host=$(hostname -s)
    read -ra ports <<< "$(free_port $((nodes + 1)))"
    {
        cat <<CONF
ClusterName=test
SlurmctldHost=$host(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$folder/munge.socket
CredType=cred/munge
SlurmctldPort=${ports[0]}
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool-%n
SlurmctldPidFile=$folder/slurmctld.own.pid
SlurmdPidFile=$folder/slurmd-%n.own.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
DefMemPerCPU=200
SchedulerType=sched/backfill
SchedulerParameters=sched_min_interval=100000,batch_sched_delay=0,bf_interval=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PreemptExemptTime=0
GresTypes=gpu
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MaxArraySize=${CLUSTER_MAX_ARRAY:-1001}
MaxJobCount=${CLUSTER_MAX_JOBS:-20000}
MinJobAge=${CLUSTER_MIN_JOB_AGE:-300}
ReturnToService=2
SlurmdTimeout=${CLUSTER_NODE_TIMEOUT:-300}
InactiveLimit=0
KillWait=5
MpiDefault=none
SwitchType=switch/none
CONF
        for ((number = 1; number <= nodes; number++)); do
            local feature=h200
            ((number < nodes)) || feature=a100
            names+=("n$number")
            echo "NodeName=n$number NodeHostname=$host NodeAddr=127.0.0.1 Port=${ports[$number]}" \
                "CPUs=2 RealMemory=2000 Gres=gpu:1 Feature=$feature State=UNKNOWN"
        done
        local all
        all=$(IFS=, && echo "${names[*]}")
        echo "PartitionName=test Nodes=$all Default=YES MaxTime=INFINITE State=UP PriorityTier=1"
        echo "PartitionName=urgent Nodes=$all MaxTime=60 State=UP PriorityTier=100 PreemptMode=OFF"
        echo "PartitionName=closed Nodes=n1 MaxTime=60 State=DOWN"
    } > "$folder/slurm.conf"
    # A GPU that the tests' nodes count and nothing computes on.
    for name in "${names[@]}"; do
        echo "NodeName=$name Name=gpu Count=1 File=/dev/null"
    done > "$folder/gres.conf"
    printf '%s\n' "${names[@]}" > "$folder/nodes"
}

start() {
    local nodes=$1 name
    mkdir -p "$folder/state"
    # munged takes no key, log or socket from a folder that others may write.
    chmod 755 "$folder"
    [ -e "$folder/munge.key" ] || (umask 077 && head -c 1024 /dev/urandom > "$folder/munge.key")
    configure "$nodes"
    daemon munged munged --foreground --force --num-threads 2 \
        --key-file "$folder/munge.key" --socket "$folder/munge.socket" \
        --pid-file "$folder/munged.own.pid" --log-file "$folder/munged.log" \
        --seed-file "$folder/munged.seed"
    for _ in $(seq 100); do [ ! -S "$folder/munge.socket" ] || break; sleep 0.1; done
    daemon slurmctld slurmctld -D -f "$SLURM_CONF"
    while read -r name; do node "$name"; done < "$folder/nodes"
    for _ in $(seq 300); do
        if [ "$(sinfo -h -N -p test -t idle -o %N 2> /dev/null | sort -u | wc -l)" -eq "$nodes" ]; then
            echo "export SLURM_CONF=$SLURM_CONF"
            return
        fi
        sleep 0.1
    done
    echo "the nodes did not come up in 30 s; the logs lie in $folder" >&2
    tail -n 5 "$folder"/*.log "$folder"/*.out >&2 || true
    exit 1
}

stop() {
    local file pid
    # First the nodes, then the one that they tell.
    for file in "$folder"/n*.pid "$folder/slurmctld.pid" "$folder/munged.pid"; do
        [ -e "$file" ] || continue
        pid=$(cat "$file")
        kill "$pid" 2> /dev/null || true
        for _ in $(seq 50); do kill -0 "$pid" 2> /dev/null || break; sleep 0.1; done
        kill -9 "$pid" 2> /dev/null || true
        rm "$file"
    done
}

case ${1:-} in
    start) start "${3:-3}" ;;
    node) node "$3" ;;
    stop) stop ;;
    *) sed -n '2,9s/^# \{0,1\}//p' "$0" >&2; exit 2 ;;
esac
