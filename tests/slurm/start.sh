#!/usr/bin/env bash
# A Slurm of two emulated nodes, FOLDER/ready once it answers; it ends with this process, the first of a PID namespace.
# Its configuration and ports are in namespaces: a Slurm that the machine has already is not disturbed.
#   unshare --mount --net --pid --fork --kill-child --mount-proc bash start.sh FOLDER
set -euo pipefail
folder=$1 port=6817 host=$(hostname -s)
ip link set lo up
ip address add 192.0.2.1/32 dev lo # resolvers look for names only where there is more than loopback
mkdir -p /etc/slurm "$folder"/{state,log}
mount -t tmpfs none /etc/slurm
chmod 755 "$folder"
(umask 077 && head -c 1024 /dev/urandom > "$folder/key")
for gpu in 0 1; do : > "$folder/gpu$gpu"; done
echo "Name=gpu File=$folder/gpu[0-1]" > /etc/slurm/gres.conf
cat > /etc/slurm/slurm.conf << CONF
ClusterName=test
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$port
SlurmUser=root
SlurmdUser=root
AuthInfo=socket=$folder/munge,cred_expire=5
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool.%n
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/%n.pid
SlurmctldLogFile=$folder/log/slurmctld
SlurmdLogFile=$folder/log/%n
SlurmdParameters=config_overrides
PlugStackConfig=/dev/null
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
JobAcctGatherType=jobacct_gather/none
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SchedulerParameters=batch_sched_delay=0,sched_interval=2,bf_interval=2
ReturnToService=2
SlurmdTimeout=6
KillWait=20
KillOnBadExit=1
JobRequeue=0
GresTypes=gpu
NodeName=n1 NodeHostname=$host NodeAddr=127.0.0.1 Port=$((port + 1)) CPUs=8 RealMemory=16000 Gres=gpu:2
NodeName=n2 NodeHostname=$host NodeAddr=127.0.0.1 Port=$((port + 2)) CPUs=8 RealMemory=16000 Gres=gpu:2
PartitionName=cpu Nodes=n[1-2] Default=YES
PartitionName=gpu Nodes=n[1-2]
CONF
munged --force --key-file="$folder/key" --socket="$folder/munge" --pid-file="$folder/munged.pid" \
  --log-file="$folder/log/munged" --seed-file="$folder/seed"
slurmctld -c
slurmd -c -N n1
slurmd -c -N n2
until [ "$(sinfo -h -p cpu -o '%T %D')" = "idle 2" ]; do sleep 0.1; done
touch "$folder/ready"
sleep infinity & # as the first process, bash reaps what the jobs leave behind
while true; do wait || true; done
