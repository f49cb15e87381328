#!/usr/bin/env bash
# A real S3 server for the tests: a one-machine Ceph cluster with its S3 gateway (RGW), on loopback only.
#
#   tests/stand_ins/ceph_s3.sh FOLDER [PORT]    start it and print its endpoint (PORT: 7480; its monitor takes PORT+1)
#   tests/stand_ins/ceph_s3.sh stop FOLDER      stop its processes; FOLDER itself (data, logs) is the caller's to remove
#
# FOLDER must be empty or absent. Access key XRAYACCESSKEY, secret xraysecretkey; it checks signatures like AWS.
# Exit status: 3 when Debian packages are missing, 1 for any other failure; the last line on stderr says why.
set -euo pipefail

die() { echo "ceph_s3.sh: $2" >&2; exit "$1"; }

# True while process $1 is a daemon of this folder. `kill -0` would not do: the number may have been given to
# another process since, and a dead process that nobody has reaped yet (a zombie) still answers it.
ours() { grep -qaF -- "$D/ceph.conf" "/proc/$1/cmdline" 2>/dev/null; }

stop() {
  local pids=() pid signal try
  [[ ! -f $D/pids ]] || mapfile -t pids < <(tac "$D/pids")  # the gateway first, the monitor last
  for pid in "${pids[@]}"; do
    for signal in TERM KILL; do
      ours "$pid" || break
      kill -"$signal" "$pid" 2>/dev/null || true
      for ((try = 0; try < 100; try++)); do ours "$pid" || break; sleep 0.1; done
    done
    ! ours "$pid" || die 1 "process $pid does not stop"
  done
  rm -f "$D/pids"
}

if [[ ${1:-} == stop ]]; then
  D=$(realpath -m -- "${2:?folder}")
  stop
  exit
fi

D=$(realpath -m -- "${1:?folder}")
port=${2:-7480}
mon_port=$((port + 1))

missing=
for pair in radosgw:radosgw ceph-mon:ceph-mon ceph-osd:ceph-osd ceph-mgr:ceph-mgr ceph:ceph-common; do
  command -v "${pair%:*}" >/dev/null || missing+=" ${pair#*:}"
done
[[ -z $missing ]] || die 3 "missing Debian packages:$missing"

listening() { (exec 3<>"/dev/tcp/127.0.0.1/$1") 2>/dev/null; }

[[ ! -e $D || (-d $D && -z $(ls -A "$D")) ]] || die 1 "not an empty folder: $D"
for p in "$port" "$mon_port"; do  # else another server there would be taken for this one
  ! listening "$p" || die 1 "port $p is in use"
done

mkdir -p "$D"/{mon,osd,mgr,log}
cd "$D"
fsid=$(cat /proc/sys/kernel/random/uuid)
# No admin sockets: nothing uses them, and a Unix socket's path has at most 107 bytes, which a test's
# temporary folder can exceed. The short paxos interval (1 s by default) takes 10 s off the start.
cat >ceph.conf <<C
[global]
fsid = $fsid
mon host = v1:127.0.0.1:$mon_port
mon initial members = a
public addr = 127.0.0.1
cluster addr = 127.0.0.1
ms bind msgr2 = false
auth cluster required = none
auth service required = none
auth client required = none
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 8
osd pool default pg autoscale mode = off
osd crush chooseleaf type = 0
mon allow pool size one = true
mon warn on pool no redundancy = false
paxos propose interval = 0.05
admin socket =
run dir = $D
log file = $D/log/\$name.log
mon cluster log file = $D/log/cluster.log
crash dir = $D/log
mon data = $D/mon
osd data = $D/osd
mgr data = $D/mgr
osd objectstore = bluestore
# a sparse file
bluestore block size = 8589934592
bluestore block create = true
bluestore fsck on mount = false
[client.rgw]
rgw data = $D
rgw frontends = beast endpoint=127.0.0.1:$port
rgw enable usage log = false
C

# Whatever goes wrong from here on, a signal included, leave no process behind.
failed() {
  trap '' INT TERM HUP
  jobs -p | xargs -r kill 2>/dev/null || true
  stop
  die 1 "the start failed, see $D/log"
}
trap failed EXIT
trap 'exit 1' INT TERM HUP

# Ceph 16 has a race: a client whose command reaches the monitor before the monitor's map has reached the client
# is refused ('wrong fsid', EPERM). --no-mon-config makes that rare, and what can still meet it is tried again.
# In the background, so that `failed` finds it among the jobs.
quiet() { timeout 60 "$@" --no-mon-config -c "$D/ceph.conf" </dev/null >>log/setup.out 2>&1 & wait $!; }
again() { until "$@"; do ((SECONDS < 120)) || return 1; sleep 0.3; done; }

# In the foreground (-f), so that the pid is known at once; in a session of its own, so that a Ctrl-C meant for
# the tests does not reach it; with its own output, so that a caller who reads ours to the end is not kept waiting.
start() {
  setsid "$@" -f --no-mon-config -c "$D/ceph.conf" </dev/null >>"log/$1.out" 2>&1 &
  pid=$!
  echo "$pid" >>pids
}

monmaptool --create --addv a "[v1:127.0.0.1:$mon_port]" --fsid "$fsid" monmap >>log/setup.out
quiet ceph-mon --mkfs -i a --monmap monmap
start ceph-mon -i a
osd=$(cat /proc/sys/kernel/random/uuid)
again quiet ceph osd new "$osd"
start ceph-mgr -i x
start ceph-osd -i 0 --mkfs --osd-uuid "$osd"
wait "$pid"
start ceph-osd -i 0
osd_up() {
  kill -0 "$pid" 2>/dev/null || start ceph-osd -i 0
  quiet ceph osd stat -o osd.stat && [[ $(<osd.stat) == *" 1 up"* ]]
}
again osd_up
start radosgw -n client.rgw
rgw_up() {
  kill -0 "$pid" 2>/dev/null || start radosgw -n client.rgw
  listening "$port"
}
again rgw_up
quiet radosgw-admin user create --uid=xray --display-name=xray --access-key=XRAYACCESSKEY --secret=xraysecretkey
trap - EXIT
echo "http://127.0.0.1:$port"
