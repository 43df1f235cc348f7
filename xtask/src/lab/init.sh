#!/bin/busybox sh
# The first process of the lab machine: mounts, loads modules, runs the scenarios named on the command line, reports each
# as a line of JSON on the second serial port, and switches the machine off.
/bin/busybox --install -s /bin
export PATH=/lab/tools:/bin HOME=/tmp
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs dev /dev
mkdir -p /dev/pts /tmp /run
mount -t devpts pts /dev/pts
mount -t tmpfs run /run
stty -F /dev/ttyS1 raw -echo
report() { echo "$1" > /dev/ttyS1; }

for module in $(cat /lab/modules); do
    insmod "/lab/$module" || echo "LAB no module $module"
done
ip link set lo up
# Large things go to a disk of their own, so that memory is for guests.
mkdir -p /dev/lab
for disk in /sys/block/vd*; do
    ln -s "../${disk##*/}" "/dev/lab/$(cat "$disk/serial")"
done
mount -t ext4 /dev/lab/scratch /tmp
chmod 1777 /tmp
# Debian's qemu takes no other one for this.
mkdir -p /var
ln -s /tmp /var/tmp
ulimit -n 4096
export POOL_TESTS_PREBUILT=1 CARGO_TARGET_DIR=/lab/target LAB_DIR=/lab RUST_BACKTRACE=0 TERM=dumb

for word in $(cat /proc/cmdline); do
    case $word in lab.scenarios=*) scenarios=${word#*=} ;; esac
done
report '{"event":"booted"}'
for entry in $(echo "$scenarios" | tr , ' '); do
    name=${entry%%:*}
    seconds=${entry##*:}
    rm -f /tmp/details.json
    echo "LAB scenario $name, at most $seconds s"
    began=$(cut -d. -f1 /proc/uptime)
    export LAB_DETAILS=/tmp/details.json
    timeout -s KILL "$seconds" sh "/lab/scenarios/$name" > /dev/console 2>&1 < /dev/null
    code=$?
    ended=$(cut -d. -f1 /proc/uptime)
    # Whatever it has left: nothing of one scenario shall disturb the next.
    kill -KILL -1 2>/dev/null
    details=$(cat /tmp/details.json 2>/dev/null || echo null)
    report "{\"event\":\"scenario\",\"name\":\"$name\",\"exit\":$code,\"seconds\":$((ended - began)),\"details\":$details}"
done
report '{"event":"done"}'
sync
poweroff -f
